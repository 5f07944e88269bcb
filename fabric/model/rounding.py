"""Rounding one matrix with the inputs it will meet in view."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fabric.kernels.quantized import (
    FP8_MAX,
    QuantizedWeight,
    Scheme,
    WeightFormat,
    half_scales,
    quantize_weight,
    round_to_scales,
)

_GREATEST_LEVEL = 15.0
_SHRINKS = torch.linspace(1.1, 0.65, 7)  # of a group's range: cutting its ends may pay
_DAMPING = 0.01  # of the mean diagonal, as in the paper: keeps the Hessian invertible
_BLOCK = 32  # columns whose errors are spread inside the block first
_ROWS_AT_ONCE = 8_192  # bounds the copies of a vocabulary


def round_by_error(weight_NK: Tensor, x_TK: Tensor, scheme: Scheme) -> QuantizedWeight:
    """GPTQ (Frantar et al. 2023): column by column, what rounding one column gets wrong in the
    outputs on `x_TK` is made up for by the columns not rounded yet.

    Scales are chosen before: those of groups with minimums have the least error weighted by the
    inputs' mean squares, all others hold the largest number. Weight [N, K], inputs [T, K], both
    float32; a scale is for one row.
    """
    assert scheme.rows == 1
    width = scheme.columns or weight_NK.shape[1]
    hessian_KK = x_TK.T @ x_TK / len(x_TK)
    diagonal = hessian_KK.diagonal()
    grid = _Grid.of(weight_NK, diagonal.clone(), scheme)
    diagonal += _DAMPING * diagonal.mean() + 1e-8
    inverse_KK = torch.cholesky_inverse(torch.linalg.cholesky(hessian_KK))
    upper_KK = torch.linalg.cholesky(inverse_KK, upper=True)
    left_NK = weight_NK.clone()
    columns = weight_NK.shape[1]
    for begin in range(0, columns, _BLOCK):
        end = min(begin + _BLOCK, columns)
        # Columns as rows: what a column owes to those before it is one product of contiguous rows.
        block_KN = left_NK[:, begin:end].T.contiguous()
        errors_KN = torch.zeros_like(block_KN)
        for at, column in enumerate(range(begin, end)):
            owed_N = errors_KN[:at].T @ upper_KK[begin:column, column]
            numbers_N = block_KN[at] - owed_N
            block_KN[at] = grid.nearest(numbers_N, column // width)
            errors_KN[at] = (numbers_N - block_KN[at]) / upper_KK[column, column]
        left_NK[:, begin:end] = block_KN.T
        left_NK[:, end:] -= errors_KN.T @ upper_KK[begin:end, end:]
    return round_to_scales(left_NK, scheme, grid.scales_NC, grid.minimums_NC)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Grid:
    """The numbers that a weight may become, [N, C] as `QuantizedWeight` has them."""

    format: WeightFormat
    scales_NC: Tensor
    minimums_NC: Tensor | None

    @staticmethod
    def of(weight_NK: Tensor, importance_K: Tensor, scheme: Scheme) -> _Grid:
        if scheme.minimum:
            width = scheme.columns or weight_NK.shape[1]
            scales_NC, minimums_NC = _grids(weight_NK, importance_K, width)
            return _Grid(format=scheme.format, scales_NC=scales_NC, minimums_NC=minimums_NC)
        scales_NC = quantize_weight(weight_NK, scheme).scales_AC
        return _Grid(format=scheme.format, scales_NC=scales_NC, minimums_NC=None)

    def nearest(self, numbers_N: Tensor, group: int) -> Tensor:
        """To a column's numbers."""
        scale_N = self.scales_NC[:, group].float()
        if self.minimums_NC is not None:
            return _on_grid(numbers_N, scale_N, self.minimums_NC[:, group].float())
        scaled_N = numbers_N / scale_N
        if self.format is WeightFormat.FP8:
            narrow_N = scaled_N.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
            return narrow_N.float() * scale_N
        low, high = (-8, 7) if self.format is WeightFormat.INT4 else (-127, 127)
        return scaled_N.round().clamp(low, high) * scale_N


def _on_grid(numbers: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    levels = ((numbers - minimum) / scale).round().clamp(0, _GREATEST_LEVEL)
    return levels * scale + minimum


def _grids(weight_NK: Tensor, importance_K: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Scales and minimums of groups, float16 [N, C] both."""
    padding = (0, -weight_NK.shape[1] % width)
    importance_CW = torch.nn.functional.pad(importance_K, padding).view(-1, width)
    found = []
    for rows_NK in weight_NK.split(_ROWS_AT_ONCE):
        # A group that is cut short is filled up with its last number, which counts nothing.
        wide_NK = torch.nn.functional.pad(rows_NK[None], padding, mode="replicate")[0]
        found.append(_best_grids(wide_NK.view(len(rows_NK), -1, width), importance_CW))
    scales, minimums = zip(*found, strict=True)
    return torch.cat(scales), torch.cat(minimums)


def _best_grids(groups_NCW: Tensor, importance_CW: Tensor) -> tuple[Tensor, Tensor]:
    low_NC, high_NC = groups_NCW.aminmax(dim=-1)
    best_scale_NC, best_minimum_NC = (
        half_scales((high_NC - low_NC) / _GREATEST_LEVEL),
        low_NC.half(),
    )
    least_NC = torch.full_like(low_NC, torch.inf)
    for shrink in _SHRINKS:
        scale_NC1 = half_scales((high_NC - low_NC) * shrink / _GREATEST_LEVEL)[..., None].float()
        minimum_NC1 = (high_NC + low_NC)[..., None] / 2 - scale_NC1 * _GREATEST_LEVEL / 2
        levels_NCW = ((groups_NCW - minimum_NC1) / scale_NC1).round().clamp(0, _GREATEST_LEVEL)
        scale_NC, minimum_NC = _fitted(groups_NCW, levels_NCW, importance_CW)
        usable_NC = scale_NC > 0
        scale_NC = half_scales(torch.where(usable_NC, scale_NC, scale_NC1[..., 0]))
        minimum_NC = torch.where(usable_NC, minimum_NC, minimum_NC1[..., 0]).half()
        grid = scale_NC.float()[..., None], minimum_NC.float()[..., None]
        error_NCW = _on_grid(groups_NCW, *grid) - groups_NCW
        error_NC = (error_NCW**2 * importance_CW).sum(dim=-1)
        better_NC = error_NC < least_NC
        least_NC = torch.where(better_NC, error_NC, least_NC)
        best_scale_NC = torch.where(better_NC, scale_NC, best_scale_NC)
        best_minimum_NC = torch.where(better_NC, minimum_NC, best_minimum_NC)
    return best_scale_NC, best_minimum_NC


def _fitted(groups_NCW: Tensor, levels_NCW: Tensor, importance_CW: Tensor) -> tuple[Tensor, Tensor]:
    """The line through (level, number) with the least weighted squares: scale (0 where there is
    none) and minimum, [N, C]."""
    weight_CW = importance_CW / importance_CW.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    level_NC1 = (levels_NCW * weight_CW).sum(dim=-1, keepdim=True)
    number_NC1 = (groups_NCW * weight_CW).sum(dim=-1, keepdim=True)
    away_NCW = (levels_NCW - level_NC1) * weight_CW
    spread_NC = (away_NCW * (levels_NCW - level_NC1)).sum(dim=-1)
    scale_NC = (away_NCW * (groups_NCW - number_NC1)).sum(dim=-1) / spread_NC.clamp(min=1e-30)
    scale_NC = torch.where(spread_NC > 1e-6, scale_NC, 0.0)
    return scale_NC, number_NC1[..., 0] - scale_NC * level_NC1[..., 0]
