"""SwiGLU's gate: y = silu(gate) * up (Shazeer 2020)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import silu

from fabric.kernels.launch import Launch


def silu_mul_reference(gate_up_TN: Tensor) -> Tensor:
    """[T, N / 2] from the gate (first half of the columns) and up (second half); rounded once."""
    gate, up = gate_up_TN.float().chunk(2, dim=-1)
    return (silu(gate) * up).to(gate_up_TN.dtype)


@triton.jit
def silu_mul_kernel(
    x_ptr: tl.tensor, y_ptr: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """BLOCK columns of one token a program."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < width
    gate_at = x_ptr + token * (2 * width) + col
    gate = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_at + width, mask=mask, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + token * width + col, y.to(y_ptr.dtype.element_ty), mask=mask)


def silu_mul(gate_up_TN: Tensor, *, out: Tensor, launch: Launch) -> None:
    """out [T, N / 2] from contiguous [T, N]: gate columns first, then up."""
    tokens, width = out.shape
    if gate_up_TN.shape != (tokens, 2 * width) or not gate_up_TN.is_contiguous():
        raise ValueError("silu_mul needs contiguous gate and up columns, twice the output's")
    block = launch.size("BLOCK")
    silu_mul_kernel[(tokens, triton.cdiv(width, block))](
        gate_up_TN, out, width, BLOCK=block, **launch.options()
    )
