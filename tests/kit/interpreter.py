"""Triton's interpreter, made honest: what it computes silently wrong is mended or refused.

What it gets wrong by itself (3.9), each with a test in tests/kernels/test_interpreter.py:

* `tl.dot` of bfloat16 multiplies the bit patterns as integers, and that of float16 sums in float16;
* float32 -> bfloat16 truncates, and float32 -> fp8 loses the carry of a mantissa that rounds up;
* arithmetic on bfloat16 and fp8 works on bit patterns: kernels widen first, so here it is refused;
* a mask that combines a block with a scalar comes out as integers, which loads refuse;
* reads and writes out of bounds pass: here every address must lie in a tensor of the launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

_TORCH = {
    tl.float64: torch.float64,
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5: torch.float8_e5m2,
}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NUMPY_BITS = {1: numpy.uint8, 2: numpy.uint16, 4: numpy.uint32, 8: numpy.uint64}
_BIT_PATTERNS = (tl.bfloat16, tl.float8e4nv, tl.float8e4b8, tl.float8e5)


class OutOfBounds(AssertionError):
    """A kernel touched memory that belongs to none of its arguments."""


class _Bounds:
    """The addresses that the launch under way may touch."""

    def __init__(self) -> None:
        self.starts: Any = None
        self.ends: Any = None

    def set(self, tensors: list[Tensor]) -> None:
        spans = sorted(_span(tensor) for tensor in tensors if tensor.numel())
        merged: list[list[int]] = []
        for start, end in spans:
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        self.starts = numpy.array([0, *(start for start, _ in merged)], numpy.uint64)
        self.ends = numpy.array([0, *(end for _, end in merged)], numpy.uint64)

    def require(self, addresses: Any, mask: Any, size: int, what: str) -> None:
        touched = numpy.broadcast_to(addresses, mask.shape)[mask]
        if touched.size == 0:
            return
        index = numpy.searchsorted(self.starts, touched, side="right") - 1
        if not (touched + numpy.uint64(size) <= self.ends[index]).all():
            raise OutOfBounds(f"a kernel {what} outside of its arguments")


def _span(tensor: Tensor) -> tuple[int, int]:
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _tensors(arguments: Iterator[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, TensorDescriptor):
            yield argument.base
        elif isinstance(argument, Tensor):
            yield argument


def _converted(data: Any, source: Any, target: Any, rounding: Any = None) -> Any:
    """Bits of `target` from bits of `source`, rounded to nearest even as torch and the GPU do."""
    values = numpy.ascontiguousarray(data).reshape(-1)
    bits = torch.from_numpy(values.view(_numpy_signed(values.dtype.itemsize)))
    wide = bits.view(_TORCH[source]).to(_TORCH[target])
    size = wide.element_size()
    return wide.view(_BITS[size]).numpy().view(_NUMPY_BITS[size]).reshape(data.shape)


def _numpy_signed(size: int) -> Any:
    return {1: numpy.uint8, 2: numpy.int16, 4: numpy.int32, 8: numpy.int64}[size]


def _wide(handle: Any) -> Any:
    kind = handle.dtype.scalar
    if kind in _BIT_PATTERNS:
        return _converted(handle.data, kind, tl.float32).view(numpy.float32)
    if kind == tl.float16:
        return handle.data.astype(numpy.float32)
    if kind in (tl.int8, tl.uint8):
        return handle.data.astype(numpy.float64)  # exact, and BLAS knows it
    return handle.data


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, imprecise: Any) -> Any:
    product = numpy.matmul(_wide(a), _wide(b)).astype(d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def mend_interpreter() -> None:
    """Patch triton's interpreter in this process, once."""
    builder = interpreter.InterpreterBuilder
    if builder.create_dot is _dot:
        return
    bounds = _Bounds()
    interpreter._convert_float = _converted
    builder.create_dot = _dot
    _mend_casts(builder)
    _check_bounds(builder, bounds)
    _know_arguments(bounds)


def _mend_casts(builder: Any) -> None:
    cast, binary = builder.cast_impl, builder.binary_op

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        pair = (source.dtype.scalar, target.scalar)
        if pair[0] in _BIT_PATTERNS and pair[1] not in (*_BIT_PATTERNS, tl.float32):
            wide = interpreter.TensorHandle(_wide(source), tl.float32)
            return cast(self, wide, target)
        return cast(self, source, target)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if lhs.dtype.scalar in _BIT_PATTERNS or rhs.dtype.scalar in _BIT_PATTERNS:
            raise TypeError(f"arithmetic on {lhs.dtype.scalar}: widen to float32 first")
        return binary(self, lhs, rhs, op)

    builder.cast_impl, builder.binary_op = cast_impl, binary_op


def _check_bounds(builder: Any, bounds: _Bounds) -> None:
    load, store = builder.create_masked_load, builder.create_masked_store

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        mask = interpreter.TensorHandle(mask.data.astype(bool), tl.int1)
        bounds.require(ptrs.data, mask.data, size, "reads")
        return load(self, ptrs, mask, *rest, **named)

    def create_masked_store(
        self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any
    ) -> Any:
        mask = interpreter.TensorHandle(mask.data.astype(bool), tl.int1)
        bounds.require(ptrs.data, mask.data, value.data.dtype.itemsize, "writes")
        return store(self, ptrs, value, mask, *rest, **named)

    builder.create_masked_load = create_masked_load
    builder.create_masked_store = create_masked_store


def _know_arguments(bounds: _Bounds) -> None:
    """A launch says what may be touched."""
    launch = interpreter.GridExecutor.__call__

    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        bounds.set(list(_tensors(iter([*arguments, *keywords.values()]))))
        return launch(self, *arguments, **keywords)

    interpreter.GridExecutor.__call__ = call
