"""The interpreter as `kit/interpreter.py` mends it: every mend has a test that fails without it."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from kit.guarded import Guarded
from triton.runtime.errors import InterpreterError


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def cast_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0)
    tl.store(y_ptr + at, x.to(y_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def add_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, x + x)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]
)
def test_a_dot_of_narrow_numbers_is_their_product(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = ((torch.randn(32, 32, generator=generator) * 2).to(dtype) for _ in range(2))
    c = torch.empty(32, 32, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    dot_kernel[(1,)](a, b, c, SIZE=32)
    # Sums of 32 float32 products: 32 * 2^-24 of their magnitudes.
    exact = a.double() @ b.double()
    assert (c - exact).abs().max() <= 32 * 2**-24 * (a.double().abs() @ b.double().abs()).max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_cast_rounds_to_nearest_even(dtype: torch.dtype) -> None:
    """Ties, carries into the exponent and subnormals: all of them lie on this grid."""
    x = torch.cat([torch.arange(1, 512) * 2.0**-p for p in (0, 3, 9, 15)]) * (1 + 2.0**-9)
    y = torch.empty(len(x), dtype=dtype)
    cast_kernel[(1,)](x, y, len(x), BLOCK=2048)
    torch.testing.assert_close(y.float(), x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_arithmetic_on_bit_patterns_is_refused(dtype: torch.dtype) -> None:
    x = torch.ones(16).to(dtype)
    with pytest.raises(InterpreterError, match="widen to float32"):
        add_kernel[(1,)](x, torch.empty_like(x), BLOCK=16)


def test_a_read_beyond_a_tensor_is_refused() -> None:
    x, y = torch.zeros(64), torch.zeros(64)
    with pytest.raises(InterpreterError, match="reads outside"):
        add_kernel[(1,)](x[:31], y, BLOCK=32)


def test_a_write_beyond_a_tensor_is_refused() -> None:
    x, y = torch.zeros(64), torch.zeros(64)
    with pytest.raises(InterpreterError, match="writes outside"):
        add_kernel[(1,)](x, y[:31], BLOCK=32)


def test_a_guarded_buffer_notices_a_touched_band() -> None:
    guarded = Guarded()
    x = guarded.empty((3, 5), torch.float32)
    assert x.isnan().all() and x.is_contiguous()
    guarded.check()
    x.as_strided((16,), (1,))[15] = 1.0
    with pytest.raises(AssertionError, match="band"):
        guarded.check()
