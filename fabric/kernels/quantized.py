"""Quantised weights: one record for every format, and what a product with them means.

format   values                scales                          activations
fp8      e4m3 (finite only)    per row, or per block of 128²   e4m3 per token, per 128, or static
int8     -127 … 127            per row                         int8 per token (W8A8)
int8     -127 … 127            per row, or per group           as they are (weight-only)
int4     -8 … 7                per row, or per group           as they are (weight-only)

Groups are 32 to 128 inputs of one row. W8A8 sums are exact integers, so their order is nobody's
business: every executor gives the same bits.

Shape legend: T tokens, N out, K in, C groups of inputs, A and C blocks of rows and of columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

FP8_MAX = 448.0  # the largest e4m3fn number
INT8_LEVELS = 127
# Rows widened to float32 at a time: bounds the copy of a vocabulary to 16,384 * K * 4 bytes.
ROWS_AT_ONCE = 16_384


class WeightFormat(StrEnum):
    """What one weight is stored as."""

    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"


class Activations(StrEnum):
    """What becomes of the inputs of a product."""

    KEPT = "kept"  # weight-only
    TOKEN = "token"  # rounded to the weight's format, one scale a token
    GROUP = "group"  # one scale a token and group of columns, as wide as the weight's blocks
    STATIC = "static"  # one scale for all, from calibration: `input_scale`


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedWeight:
    """A [N, K] weight, about `values` * `scales`.

    `values`: [N, K] float8_e4m3fn or int8; for int4 uint8 [N, K / 2] (K a multiple of 8), the even
    input in the low half, 8 added to each: the bytes of compressed-tensors' packed int32.
    `scales_AC`: float32, one for each `block` = (rows, inputs), the last ones may be cut short.
    `input_scale`: with `Activations.STATIC` only.
    """

    format: WeightFormat
    values: Tensor
    scales_AC: Tensor
    block: tuple[int, int]
    activations: Activations
    input_scale: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        rows, columns = self.values.shape
        return rows, columns * (2 if self.format is WeightFormat.INT4 else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales_AC.nbytes

    def to(self, device: torch.device) -> QuantizedWeight:
        """The same weight there."""
        return QuantizedWeight(
            format=self.format,
            values=self.values.to(device),
            scales_AC=self.scales_AC.to(device),
            block=self.block,
            activations=self.activations,
            input_scale=self.input_scale,
        )

    def check(self) -> None:
        """Raise `ValueError` if the parts don't fit each other."""
        rows, columns = self.shape
        dtypes = {
            WeightFormat.FP8: torch.float8_e4m3fn,
            WeightFormat.INT8: torch.int8,
            WeightFormat.INT4: torch.uint8,
        }
        if self.values.dtype != dtypes[self.format] or self.values.dim() != 2:
            raise ValueError(f"values of {self.format} are {self.values.dtype}")
        if self.format is WeightFormat.INT4 and columns % 8:
            raise ValueError(f"int4 needs inputs in eights, not {columns}")
        blocks = (-(-rows // self.block[0]), -(-columns // self.block[1]))
        if self.scales_AC.dtype != torch.float32 or tuple(self.scales_AC.shape) != blocks:
            raise ValueError(f"scales are {tuple(self.scales_AC.shape)}, not float32 {blocks}")
        if (self.input_scale is not None) != (self.activations is Activations.STATIC):
            raise ValueError("a static input scale goes with static activations, and only there")

    def row_scales(self) -> Tensor:
        """float32 [N, C]: the scales with one line a row."""
        return self.scales_AC.repeat_interleave(self.block[0], dim=0)[: self.shape[0]]

    def rows(self, first: int, last: int) -> QuantizedWeight:
        """Rows [first, last), a view where blocks allow."""
        whole = first % self.block[0] == 0 and (last % self.block[0] == 0 or last == self.shape[0])
        scales_AC = (
            self.scales_AC[first // self.block[0] : -(-last // self.block[0])]
            if whole
            else self.row_scales()[first:last]
        )
        return QuantizedWeight(
            format=self.format,
            values=self.values[first:last],
            scales_AC=scales_AC,
            block=self.block if whole else (1, self.block[1]),
            activations=self.activations,
            input_scale=self.input_scale,
        )


Weight = Tensor | QuantizedWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How a weight is quantised. A scale for each `rows` x `columns`; None: all inputs of a row."""

    format: WeightFormat
    activations: Activations
    rows: int = 1
    columns: int | None = None


def quantize_weight(weight_NK: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Round to nearest, symmetric, scale = largest magnitude of its block / largest value."""
    block = (scheme.rows, scheme.columns or weight_NK.shape[1])
    largest = {WeightFormat.FP8: FP8_MAX, WeightFormat.INT8: 127.0, WeightFormat.INT4: 7.0}
    scales_AC = _block_maximum(weight_NK.float(), block) / largest[scheme.format]
    return round_to_scales(weight_NK, scheme, torch.where(scales_AC == 0, 1.0, scales_AC))


def round_to_scales(weight_NK: Tensor, scheme: Scheme, scales_AC: Tensor) -> QuantizedWeight:
    """As `quantize_weight`, with given scales: values beyond the format's range are cut off."""
    block = (scheme.rows, scheme.columns or weight_NK.shape[1])
    scaled_NK = weight_NK.float() / _spread(scales_AC, block, *weight_NK.shape)
    if scheme.format is WeightFormat.FP8:
        values = scaled_NK.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    elif scheme.format is WeightFormat.INT8:
        values = scaled_NK.round().clamp(-127, 127).to(torch.int8)
    else:
        values = pack_int4(scaled_NK.round().clamp(-8, 7).to(torch.int8))
    return QuantizedWeight(
        format=scheme.format,
        values=values,
        scales_AC=scales_AC,
        block=block,
        activations=scheme.activations,
    )


def pack_int4(values_NK: Tensor) -> Tensor:
    """int8 in -8 … 7, [N, K] -> uint8 [N, K / 2]."""
    shifted = (values_NK + 8).to(torch.uint8)
    return shifted[:, 0::2] | (shifted[:, 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 [N, K / 2] -> int8 in -8 … 7, [N, K]."""
    halves = torch.stack([packed & 15, packed >> 4], dim=-1)
    return halves.flatten(-2).to(torch.int8) - 8


def dequantize(weight: QuantizedWeight) -> Tensor:
    """float32 [N, K]: what the weight stands for."""
    return _numbers(weight) * _spread(weight.scales_AC, weight.block, *weight.shape)


def expand(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """[N, K] in `dtype`, some rows at a time."""
    rows = weight.shape[0]
    step = max(ROWS_AT_ONCE // weight.block[0], 1) * weight.block[0]
    parts = [
        dequantize(weight.rows(first, min(first + step, rows))).to(dtype)
        for first in range(0, rows, step)
    ]
    return torch.cat(parts)


def stack_weights(parts: list[QuantizedWeight]) -> QuantizedWeight | None:
    """Rows of several weights of the same inputs, one under the other. None if they differ in
    format. Static input scales become the largest of them, as in vLLM: one input, one rounding."""
    first = parts[0]
    if len(parts) == 1:
        return first
    kinds = {(part.format, part.block[1], part.activations, part.shape[1]) for part in parts}
    if len(kinds) > 1:
        return None
    whole = all(p.block[0] == first.block[0] and p.shape[0] % p.block[0] == 0 for p in parts)
    scales = [part.scales_AC if whole else part.row_scales() for part in parts]
    static = [part.input_scale for part in parts if part.input_scale is not None]
    return QuantizedWeight(
        format=first.format,
        values=torch.cat([_bytes(part.values) for part in parts]).view(first.values.dtype),
        scales_AC=torch.cat(scales),
        block=first.block if whole else (1, first.block[1]),
        activations=first.activations,
        input_scale=max(static) if static else None,
    )


def quantized_linear_reference(x_TK: Tensor, weight: QuantizedWeight) -> Tensor:
    """float32 [T, N]: x @ weight^T in the weight's format, sums exact or in float32."""
    step = max(ROWS_AT_ONCE // weight.block[0], 1) * weight.block[0]
    total = weight.shape[0]
    slices = [weight.rows(first, min(first + step, total)) for first in range(0, total, step)]
    if weight.activations is Activations.KEPT:
        wide = x_TK.float()
        return torch.cat([wide @ dequantize(rows).T for rows in slices], dim=-1)
    if weight.format is WeightFormat.FP8:
        rounded = fake_fp8(x_TK, weight)
        return torch.cat([rounded @ dequantize(rows).T for rows in slices], dim=-1)
    parts = [integer_product_reference(x_TK, rows, levels=INT8_LEVELS) for rows in slices]
    return torch.cat(parts, dim=-1)


def fake_fp8(x_TK: Tensor, weight: QuantizedWeight) -> Tensor:
    """float32 [T, K]: activations as they are after a trip through e4m3."""
    wide = x_TK.float()
    width = weight.block[1] if weight.activations is Activations.GROUP else wide.shape[1]
    if weight.input_scale is not None:
        spread = torch.full_like(wide, weight.input_scale)
    else:
        scales = _block_maximum(wide, (1, width)) / FP8_MAX
        spread = _spread(torch.where(scales == 0, 1.0, scales), (1, width), *wide.shape)
    return (wide / spread).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * spread


def integer_product_reference(
    x_TK: Tensor, weight: QuantizedWeight, *, levels: int, width: int | None = None
) -> Tensor:
    """float32 [T, N]: inputs rounded to -levels … levels, exact integer sums of each group of
    inputs, then float(sum) * (input scale * weight scale), groups added in order.

    `width`: how many inputs share a group (None: the weight's own; a divisor of it). Inputs have
    one scale a token with int8 activations (or the static one); a weight-only product that is
    done in integers (`levels` 32,767) has one a token and group. float64 holds the
    sums exactly: they stay below 127 * 32,767 * K.
    """
    rows, columns = weight.shape
    width = width or weight.block[1]
    whole = weight.activations in (Activations.TOKEN, Activations.STATIC)
    values_TK, x_scales_TC = quantize_activations(
        x_TK, levels=levels, width=columns if whole else width, static=weight.input_scale
    )
    numbers_NK = _numbers(weight).double()
    scales_NC = weight.row_scales()
    result = torch.zeros(len(x_TK), rows, device=x_TK.device)
    for group, begin in enumerate(range(0, columns, width)):
        end = min(begin + width, columns)
        sums_TN = values_TK[:, begin:end].double() @ numbers_NK[:, begin:end].T
        x_scale_T1 = x_scales_TC[:, min(group, x_scales_TC.shape[1] - 1), None]
        scale_N = scales_NC[:, begin // weight.block[1]]
        result += sums_TN.float() * (x_scale_T1 * scale_N)
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
    largest_TC = _block_maximum(wide, (1, width))
    # Not `levels / largest_TC`, which torch computes as levels * (1 / largest_TC).
    inverse_TC = torch.full_like(largest_TC, levels) / largest_TC
    inverse_TC = torch.where(largest_TC == 0, 0.0, inverse_TC)
    rounded = (wide * _spread(inverse_TC, (1, width), *wide.shape)).round()
    return rounded.clamp(-levels, levels), largest_TC / levels


def _numbers(weight: QuantizedWeight) -> Tensor:
    """float32 [N, K] before scaling."""
    int4 = weight.format is WeightFormat.INT4
    return (unpack_int4(weight.values) if int4 else weight.values).float()


def _block_maximum(wide_NK: Tensor, block: tuple[int, int]) -> Tensor:
    """Largest magnitude of each block, [A, C]."""
    rows, columns = wide_NK.shape
    height, width = block
    padded = torch.nn.functional.pad(wide_NK.abs(), (0, -columns % width, 0, -rows % height))
    return padded.view(-(-rows // height), height, -(-columns // width), width).amax(dim=(1, 3))


def _spread(scales_AC: Tensor, block: tuple[int, int], rows: int, columns: int) -> Tensor:
    """[N, K] (or [N, 1]): each block's scale at all of its places."""
    by_row = scales_AC.repeat_interleave(block[0], dim=0)[:rows]
    return by_row.repeat_interleave(block[1], dim=1)[:, :columns]


def _bytes(values: Tensor) -> Tensor:
    """torch can't concatenate every narrow dtype."""
    return values.view(torch.uint8)
