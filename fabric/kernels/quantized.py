"""Quantised weights: one record for every format.

format   values                scales                          activations
fp8      e4m3 (finite only)    per row, or per block of 128²   e4m3 per token, per 128, or static
int8     -127 … 127            per row                         int8 per token (W8A8)
int8     -127 … 127            per row, or per group           as they are (weight-only)
int4     0 … 15                per row, or per group           as they are, or int8 per group

Groups are 32 to 128 inputs of one row. Levels of int4 stand for level * scale + minimum (as in
AWQ, Lin et al. 2023, and in the Q4_1 of GGUF), without minimums for (level - 8) * scale.
What a product with them is: quantized_linear.py.

Shape legend: N out, K in, C groups of inputs, A and C blocks of rows and of columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from math import gcd

import torch
from torch import Tensor

FP8_MAX = 448.0  # the largest e4m3fn number
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
    """A [N, K] weight, about `values` * `scales`, or + `minimums`.

    `values`: [N, K] float8_e4m3fn or int8; for int4 levels, uint8 [N, K / 2] (K a multiple of 8),
    the even input in the low half: the bytes of compressed-tensors' packed int32.
    `scales_AC`: float32, one for each `block` = (rows, inputs), the last ones may be cut short.
    `minimums_AC`: of int4 only; both may be float16 then, in which a group of 32 takes 5 bits each.
    `input_scale`: with `Activations.STATIC` only.
    """

    format: WeightFormat
    values: Tensor
    scales_AC: Tensor
    block: tuple[int, int]
    activations: Activations
    minimums_AC: Tensor | None = None
    input_scale: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        rows, columns = self.values.shape
        return rows, columns * (2 if self.format is WeightFormat.INT4 else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        minimums = 0 if self.minimums_AC is None else self.minimums_AC.nbytes
        return self.values.nbytes + self.scales_AC.nbytes + minimums

    def to(self, device: torch.device) -> QuantizedWeight:
        """The same weight there."""
        minimums_AC = self.minimums_AC
        return replace(
            self,
            values=self.values.to(device),
            scales_AC=self.scales_AC.to(device),
            minimums_AC=None if minimums_AC is None else minimums_AC.to(device),
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
        four = self.format is WeightFormat.INT4
        if self.minimums_AC is not None and not (four and self.block[0] == 1):
            raise ValueError("minimums are for int4, a row at a time")
        dtype = torch.float32
        if self.minimums_AC is not None and self.scales_AC.dtype == torch.float16:
            dtype = torch.float16
        for name, numbers in (("scales", self.scales_AC), ("minimums", self.minimums_AC)):
            if numbers is not None and (numbers.dtype, tuple(numbers.shape)) != (dtype, blocks):
                raise ValueError(f"{name} are {tuple(numbers.shape)}, not {dtype} {blocks}")
        if (self.input_scale is not None) != (self.activations is Activations.STATIC):
            raise ValueError("a static input scale goes with static activations, and only there")

    def row_scales(self) -> Tensor:
        """[N, C]: the scales with one line a row."""
        return self._by_row(self.scales_AC)

    def row_minimums(self) -> Tensor:
        """[N, C], of int4: what level 0 stands for."""
        if self.minimums_AC is None:
            return self.row_scales() * -8.0
        return self._by_row(self.minimums_AC)

    def _by_row(self, numbers_AC: Tensor) -> Tensor:
        return numbers_AC.repeat_interleave(self.block[0], dim=0)[: self.shape[0]]

    def rows(self, first: int, last: int) -> QuantizedWeight:
        """Rows [first, last), a view where blocks allow."""
        height = self.block[0]
        whole = first % height == 0 and (last % height == 0 or last == self.shape[0])

        def part(numbers_AC: Tensor) -> Tensor:
            if whole:
                return numbers_AC[first // height : -(-last // height)]
            return self._by_row(numbers_AC)[first:last]

        return replace(
            self,
            values=self.values[first:last],
            scales_AC=part(self.scales_AC),
            minimums_AC=None if self.minimums_AC is None else part(self.minimums_AC),
            block=self.block if whole else (1, self.block[1]),
        )

    def columns(self, first: int, last: int) -> QuantizedWeight:
        """Inputs [first, last), copied. Where they begin or end inside a block, blocks become so
        narrow that none is cut: the numbers stay. Raises `ValueError` for int4 unless both are
        multiples of 8."""
        width, total = self.block[1], self.shape[1]
        cuts = [cut for cut in (first, last) if 0 < cut < total]
        if self.format is WeightFormat.INT4 and any(cut % 8 for cut in cuts):
            raise ValueError(f"int4 is cut at multiples of 8 inputs, not at {first} and {last}")
        narrow = gcd(width, *cuts) if any(cut % width for cut in cuts) else width
        if width >= total:  # one block a row, wherever it is cut
            narrow = last - first

        def part(numbers_AC: Tensor) -> Tensor:
            if width >= total:
                return numbers_AC
            by_narrow = numbers_AC.repeat_interleave(width // narrow, dim=1)
            return by_narrow[:, first // narrow : -(-last // narrow)].contiguous()

        halved = 2 if self.format is WeightFormat.INT4 else 1
        return replace(
            self,
            values=self.values[:, first // halved : last // halved].contiguous(),
            scales_AC=part(self.scales_AC),
            minimums_AC=None if self.minimums_AC is None else part(self.minimums_AC),
            block=(self.block[0], narrow),
        )


Weight = Tensor | QuantizedWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How a weight is quantised. A scale for each `rows` x `columns`; None: all inputs of a row.

    `minimum`: of int4, a minimum beside each scale, both float16.
    """

    format: WeightFormat
    activations: Activations
    rows: int = 1
    columns: int | None = None
    minimum: bool = False


def quantize_weight(weight_NK: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Round to nearest. The scale is the largest magnitude of its block / the largest value; with
    minimums a block's least number is level 0, its greatest level 15."""
    block = (scheme.rows, scheme.columns or weight_NK.shape[1])
    wide = weight_NK.float()
    if scheme.minimum:
        least_AC = -block_greatest(-wide, block)
        steps_AC = (block_greatest(wide, block) - least_AC) / 15.0
        return round_to_scales(weight_NK, scheme, half_scales(steps_AC), least_AC.half())
    largest = {WeightFormat.FP8: FP8_MAX, WeightFormat.INT8: 127.0, WeightFormat.INT4: 7.0}
    scales_AC = block_greatest(wide.abs(), block) / largest[scheme.format]
    return round_to_scales(weight_NK, scheme, torch.where(scales_AC == 0, 1.0, scales_AC))


def half_scales(scales_AC: Tensor) -> Tensor:
    """In float16, 1 where that is zero: such a block is its minimum."""
    halves_AC = scales_AC.half()
    return torch.where(halves_AC == 0, 1.0, halves_AC)


def round_to_scales(
    weight_NK: Tensor, scheme: Scheme, scales_AC: Tensor, minimums_AC: Tensor | None = None
) -> QuantizedWeight:
    """As `quantize_weight`, with given scales: values beyond the format's range are cut off."""
    block = (scheme.rows, scheme.columns or weight_NK.shape[1])
    wide_NK = weight_NK.float()
    if minimums_AC is not None:
        wide_NK = wide_NK - spread_scales(minimums_AC.float(), block, *wide_NK.shape)
    scaled_NK = wide_NK / spread_scales(scales_AC.float(), block, *wide_NK.shape)
    if scheme.format is WeightFormat.FP8:
        values = scaled_NK.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    elif scheme.format is WeightFormat.INT8:
        values = scaled_NK.round().clamp(-127, 127).to(torch.int8)
    else:
        middle = 8 if minimums_AC is None else 0
        values = pack_int4((scaled_NK.round() + middle).clamp(0, 15).to(torch.uint8))
    return QuantizedWeight(
        format=scheme.format,
        values=values,
        scales_AC=scales_AC,
        minimums_AC=minimums_AC,
        block=block,
        activations=scheme.activations,
    )


def pack_int4(levels_NK: Tensor) -> Tensor:
    """uint8 in 0 … 15, [N, K] -> uint8 [N, K / 2]."""
    return levels_NK[:, 0::2] | (levels_NK[:, 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 [N, K / 2] -> uint8 in 0 … 15, [N, K]."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def dequantize(weight: QuantizedWeight) -> Tensor:
    """float32 [N, K]: what the weight stands for."""
    scales_NK = spread_scales(weight.scales_AC.float(), weight.block, *weight.shape)
    if weight.format is not WeightFormat.INT4:
        return numbers_of(weight) * scales_NK
    if weight.minimums_AC is None:
        return (numbers_of(weight) - 8.0) * scales_NK
    minimums_NK = spread_scales(weight.minimums_AC.float(), weight.block, *weight.shape)
    return numbers_of(weight) * scales_NK + minimums_NK


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
    kinds = {
        (p.format, p.block[1], p.activations, p.shape[1], p.scales_AC.dtype, p.minimums_AC is None)
        for p in parts
    }
    if len(kinds) > 1:
        return None
    whole = all(p.block[0] == first.block[0] and p.shape[0] % p.block[0] == 0 for p in parts)
    scales = [part.scales_AC if whole else part.row_scales() for part in parts]
    minimums_AC = None
    if first.minimums_AC is not None:
        minimums_AC = torch.cat([part.row_minimums() for part in parts])
    static = [part.input_scale for part in parts if part.input_scale is not None]
    return QuantizedWeight(
        format=first.format,
        values=torch.cat([_bytes(part.values) for part in parts]).view(first.values.dtype),
        scales_AC=torch.cat(scales),
        minimums_AC=minimums_AC,
        block=first.block if whole else (1, first.block[1]),
        activations=first.activations,
        input_scale=max(static) if static else None,
    )


def numbers_of(weight: QuantizedWeight) -> Tensor:
    """float32 [N, K] before scaling; of int4 the levels."""
    int4 = weight.format is WeightFormat.INT4
    return (unpack_int4(weight.values) if int4 else weight.values).float()


def block_greatest(wide_NK: Tensor, block: tuple[int, int]) -> Tensor:
    """The greatest number of each block, [A, C]."""
    rows, columns = wide_NK.shape
    height, width = block
    padding = (0, -columns % width, 0, -rows % height)
    padded = torch.nn.functional.pad(wide_NK, padding, value=-torch.inf)
    return padded.view(-(-rows // height), height, -(-columns // width), width).amax(dim=(1, 3))


def spread_scales(scales_AC: Tensor, block: tuple[int, int], rows: int, columns: int) -> Tensor:
    """[N, K] (or [N, 1]): each block's scale at all of its places."""
    by_row = scales_AC.repeat_interleave(block[0], dim=0)[:rows]
    return by_row.repeat_interleave(block[1], dim=1)[:, :columns]


def _bytes(values: Tensor) -> Tensor:
    """torch can't concatenate every narrow dtype."""
    return values.view(torch.uint8)
