"""What a product with a quantised weight means: the references.

W8A8 sums are exact integers, so their order is nobody's business: every executor gives the same
bits. Of a product of integers whose inputs may be spread over workers (`ChunkedSum`) every chunk is
a product of its own, with scales of its own for its activations: no worker needs to know another
one's largest input, and any number of workers gives the same bits.

Shape legend: T tokens, N out, K in, C groups of inputs.
"""

from __future__ import annotations

from itertools import accumulate
from math import gcd

import torch
from torch import Tensor

from fabric.kernels.quantized import (
    FP8_MAX,
    ROWS_AT_ONCE,
    Activations,
    QuantizedWeight,
    WeightFormat,
    block_greatest,
    dequantize,
    numbers_of,
    spread_scales,
)
from fabric.kernels.summation import ChunkedSum

INT8_LEVELS = 127


def group_width(weight: QuantizedWeight, chunked: ChunkedSum | None) -> int | None:
    """How many inputs of a chunk are scaled together; None: all of it. A divisor of the weight's
    groups that cuts none at the border of a chunk, and the same for every worker's slice."""
    width = weight.block[1]
    if width >= weight.shape[1]:
        return None
    return gcd(width, *accumulate(chunked.sizes[:-1])) if chunked is not None else width


def spread_linear_reference(
    x_TK: Tensor, weight: QuantizedWeight, chunked: ChunkedSum, rank: int = 0
) -> list[Tensor]:
    """float32 [T, N] for each of a rank's pieces, of its inputs `x_TK` and its columns."""
    width = group_width(weight, chunked)
    stack: list[Tensor] = []
    first = 0
    for chunk, merges in zip(chunked.runs[rank], chunked.chunk_merges(rank), strict=True):
        last = first + chunked.sizes[chunk]
        columns = weight.columns(first, last)
        stack.append(quantized_linear_reference(x_TK[:, first:last], columns, width=width))
        for _ in range(merges):
            top = stack.pop()
            stack[-1] = stack[-1] + top
        first = last
    return stack


def quantized_linear_reference(
    x_TK: Tensor, weight: QuantizedWeight, *, width: int | None = None
) -> Tensor:
    """float32 [T, N]: x @ weight^T in the weight's format, sums exact or in float32. `width`: as in
    `integer_product_reference`."""
    step = max(ROWS_AT_ONCE // weight.block[0], 1) * weight.block[0]
    total = weight.shape[0]
    slices = [weight.rows(first, min(first + step, total)) for first in range(0, total, step)]
    if weight.activations is Activations.KEPT:
        wide = x_TK.float()
        return torch.cat([wide @ dequantize(rows).T for rows in slices], dim=-1)
    if weight.format is WeightFormat.FP8:
        rounded = fake_fp8(x_TK, weight)
        return torch.cat([rounded @ dequantize(rows).T for rows in slices], dim=-1)
    parts = [integer_product_reference(x_TK, r, levels=INT8_LEVELS, width=width) for r in slices]
    return torch.cat(parts, dim=-1)


def fake_fp8(x_TK: Tensor, weight: QuantizedWeight) -> Tensor:
    """float32 [T, K]: activations as they are after a trip through e4m3."""
    wide = x_TK.float()
    width = weight.block[1] if weight.activations is Activations.GROUP else wide.shape[1]
    if weight.input_scale is not None:
        spread = torch.full_like(wide, weight.input_scale)
    else:
        scales = block_greatest(wide.abs(), (1, width)) / FP8_MAX
        spread = spread_scales(torch.where(scales == 0, 1.0, scales), (1, width), *wide.shape)
    return (wide / spread).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * spread


def integer_product_reference(
    x_TK: Tensor, weight: QuantizedWeight, *, levels: int, width: int | None = None
) -> Tensor:
    """float32 [T, N]: inputs rounded to -levels … levels, exact integer sums of each group of
    inputs, then float(sum) * (input scale * weight scale), groups added in order. int4: of levels,
    and to each group's product (float(sum of inputs) * input scale) * minimum is added.

    `width`: how many inputs share a group (None: the weight's own; a divisor of it). Inputs have
    one scale a token (or the static one); activations by group, and a weight-only product that
    is done in integers (`levels` 32,767), have one a token and group. float64 holds the
    sums exactly: they stay below 127 * 32,767 * K.
    """
    rows, columns = weight.shape
    width = width or weight.block[1]
    whole = weight.activations in (Activations.TOKEN, Activations.STATIC)
    values_TK, x_scales_TC = quantize_activations(
        x_TK, levels=levels, width=columns if whole else width, static=weight.input_scale
    )
    numbers_NK = numbers_of(weight).double()
    scales_NC = weight.row_scales().float()
    minimums_NC = weight.row_minimums().float() if weight.format is WeightFormat.INT4 else None
    result = torch.zeros(len(x_TK), rows, device=x_TK.device)
    for group, begin in enumerate(range(0, columns, width)):
        end = min(begin + width, columns)
        sums_TN = values_TK[:, begin:end].double() @ numbers_NK[:, begin:end].T
        x_scale_T1 = x_scales_TC[:, min(group, x_scales_TC.shape[1] - 1), None]
        of = begin // weight.block[1]
        product_TN = sums_TN.float() * (x_scale_T1 * scales_NC[:, of])
        if minimums_NC is not None:
            inputs_T1 = values_TK[:, begin:end].double().sum(dim=1, keepdim=True)
            product_TN += (inputs_T1.float() * x_scale_T1) * minimums_NC[:, of]
        result += product_TN
    return result


def quantize_activations(
    x_TK: Tensor, *, levels: int, width: int, static: float | None = None
) -> tuple[Tensor, Tensor]:
    """Whole numbers in float32 [T, K], and scales [T, C]. Round half to even, on x * (levels /
    largest): the one multiplication that kernels do."""
    wide = x_TK.float()
    if static is not None:
        scale = torch.tensor(static, device=wide.device)
        rounded = (wide * (1.0 / scale)).round().clamp(-levels, levels)
        return rounded, scale.expand(len(wide), 1)
    largest_TC = block_greatest(wide.abs(), (1, width))
    # Not `levels / largest_TC`, which torch computes as levels * (1 / largest_TC).
    inverse_TC = torch.full_like(largest_TC, levels) / largest_TC
    inverse_TC = torch.where(largest_TC == 0, 0.0, inverse_TC)
    rounded = (wide * spread_scales(inverse_TC, (1, width), *wide.shape)).round()
    return rounded.clamp(-levels, levels), largest_TC / levels
