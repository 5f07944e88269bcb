"""Activations to fp8 or int8, each with a scale: a token's, or that of 128 columns of a token.

A scale is the largest magnitude over the largest number of the format (448 or 127), so nothing is
clipped; zeros get a scale of 1. Rounding is to nearest even.

float8_e4m3fnuz (AMD's gfx942) is another number format: the same bits mean half as much, and what
is -0 in e4m3fn is its NaN. Weights are converted once (`to_e4m3fnuz`), activations never leave
`quantize` in the wrong one.

Shape legend: T tokens, K columns, J groups of columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fabric.kernels.launch import Launch

GROUP_COLUMNS = 128  # of a block scale (DeepSeek-V3, 2024)


def largest(dtype: torch.dtype) -> float:
    """What the largest magnitude of a token becomes. Raises `ValueError` for other formats."""
    if dtype == torch.int8:
        return 127.0
    if dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz):
        return torch.finfo(dtype).max
    raise ValueError(f"{dtype} is no format of activations")


def quantize_reference(
    x_TK: Tensor, dtype: torch.dtype, group: int | None = None
) -> tuple[Tensor, Tensor]:
    """(quantized [T, K], float32 scales [T, J]): a scale every `group` columns (None: one)."""
    tokens, columns = x_TK.shape
    x_TJG = x_TK.float().view(tokens, -1, group or columns)
    peak_TJ = x_TJG.abs().amax(dim=-1)
    scale_TJ = torch.where(peak_TJ > 0, peak_TJ / largest(dtype), 1.0)
    scaled = (x_TJG / scale_TJ[..., None]).view(tokens, columns)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale_TJ


def to_e4m3fnuz(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same numbers, exactly, for a GPU whose fp8 is e4m3fnuz: the bits stay (-0 becomes 0), the
    scale doubles. NaN, which no checkpoint holds, would become -240 / 2: `ValueError`."""
    if weight.dtype != torch.float8_e4m3fn:
        raise ValueError(f"{weight.dtype} is not float8_e4m3fn")
    bits = weight.view(torch.uint8)
    if bool(((bits & 0x7F) == 0x7F).any()):
        raise ValueError("a weight is not a number")
    return torch.where(bits == 0x80, 0, bits).view(torch.float8_e4m3fnuz), scale * 2


@triton.jit
def quantize_kernel(
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    columns: tl.tensor,
    groups: tl.tensor,
    x_token: tl.tensor,
    LARGEST: tl.constexpr,
    INTEGER: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One group of columns of one token a program."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    inside = tl.arange(0, BLOCK)
    mask = inside < columns
    col = group * columns + inside
    x = tl.load(x_ptr + token * x_token + col, mask=mask, other=0.0).to(tl.float32)
    peak = tl.max(tl.abs(x), axis=0)
    # div_rn: the reference's rounding, not the approximate division of the hardware.
    scale = tl.where(peak > 0.0, tl.div_rn(peak, LARGEST), 1.0)
    y = tl.clamp(tl.div_rn(x, tl.zeros([BLOCK], tl.float32) + scale), -LARGEST, LARGEST)
    if INTEGER:
        # Adding 1.5 * 2^23 leaves no bits behind the point: round to nearest even.
        y = (y + 12582912.0) - 12582912.0
    tl.store(y_ptr + token * (groups * columns) + col, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + token * groups + group, scale)


def quantize(x_TK: Tensor, *, out: Tensor, scales_TJ: Tensor, launch: Launch) -> None:
    """Fill `out` [T, K] (its dtype is the format) and its float32 scales [T, J]; J = 1: per token.

    Tokens of `x_TK` may be any stride apart.
    """
    tokens, columns = x_TK.shape
    groups = scales_TJ.shape[1]
    if columns % groups or x_TK.stride(1) != 1:
        raise ValueError(f"{columns} columns are not {groups} whole groups without gaps")
    quantize_kernel[(tokens, groups)](
        x_TK,
        out,
        scales_TJ,
        columns // groups,
        groups,
        x_TK.stride(0),
        LARGEST=largest(out.dtype),
        INTEGER=out.dtype == torch.int8,
        BLOCK=triton.next_power_of_2(columns // groups),
        **launch.options(),
    )
