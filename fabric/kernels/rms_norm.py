"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019).

Shape legend: T tokens, H heads of a token, K what is normed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fabric.kernels.launch import Launch


def rms_norm_reference(x_TK: Tensor, weight_K: Tensor, eps: float) -> Tensor:
    """Over the last axis, which may be a head. Same dtype as `x_TK`.

    Computed in float32, rounded to the model's dtype, then scaled: the order that models were
    trained with and that transformers keeps.
    """
    wide = x_TK.float()
    inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * inverse).to(x_TK.dtype) * weight_K


@triton.jit
def rms_norm_kernel(
    x_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    y_ptr: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    width: tl.tensor,
    x_token: tl.tensor,
    y_token: tl.tensor,
    eps: tl.tensor,
    HAS_DELTA: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """ROWS rows a program; row r is head r % heads of token r // heads."""
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col_K = tl.arange(0, BLOCK)
    mask = (row_R < rows)[:, None] & (col_K < width)[None, :]
    token_R = (row_R // heads).to(tl.int64)
    inside_RK = ((row_R % heads) * width)[:, None] + col_K[None, :]
    x_at = x_ptr + token_R[:, None] * x_token + inside_RK
    x = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    if HAS_DELTA:
        delta_at = delta_ptr + row_R.to(tl.int64)[:, None] * width + col_K[None, :]
        x += tl.load(delta_at, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(x_ptr.dtype.element_ty)
        tl.store(x_at, rounded, mask=mask)
        x = rounded.to(tl.float32)
    inverse_R = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    normed = (x * inverse_R[:, None]).to(x_ptr.dtype.element_ty).to(tl.float32)
    weight_K = tl.load(weight_ptr + col_K, mask=col_K < width, other=0.0).to(tl.float32)
    y = (normed * weight_K[None, :]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + token_R[:, None] * y_token + inside_RK, y, mask=mask)


def rms_norm(
    x: Tensor,
    weight_K: Tensor,
    eps: float,
    *,
    out: Tensor,
    delta_TK: Tensor | None = None,
    launch: Launch,
) -> None:
    """out = norm(x) * weight; `x` and `out` are [T, K] or [T, H, K], tokens any stride apart.

    With `delta_TK` (contiguous; what a layer adds to the residual stream `x`): x += delta first,
    rounded, in place. `out` may be `x` where there is no delta.
    """
    tokens, width = x.shape[0], x.shape[-1]
    heads = x.shape[1] if x.dim() == 3 else 1
    if x.stride(-1) != 1 or out.stride(-1) != 1 or out.shape != x.shape:
        raise ValueError("rms_norm needs rows without gaps, and an output of the input's shape")
    if delta_TK is not None and (heads != 1 or not delta_TK.is_contiguous()):
        raise ValueError("a delta goes with [T, K] and is contiguous")
    rows = launch.size("ROWS")
    rms_norm_kernel[(triton.cdiv(tokens * heads, rows),)](
        x,
        x if delta_TK is None else delta_TK,
        weight_K,
        out,
        tokens * heads,
        heads,
        width,
        x.stride(0),
        out.stride(0),
        eps,
        HAS_DELTA=delta_TK is not None,
        ROWS=rows,
        BLOCK=triton.next_power_of_2(width),
        **launch.options(),
    )
