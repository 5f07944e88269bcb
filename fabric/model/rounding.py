"""Rounding one matrix with the inputs it will meet in view."""

from __future__ import annotations

import torch
from torch import Tensor

from fabric.kernels.quantized import QuantizedWeight, Scheme, half_scales, round_to_scales

_GREATEST_LEVEL = 15.0
_SHRINKS = torch.linspace(1.1, 0.65, 13)  # of a group's range: cutting its ends may pay
_DAMPING = 0.01  # of the mean diagonal, as in the paper: keeps the Hessian invertible
_BLOCK = 64  # columns whose errors are spread inside the block first
_ROWS_AT_ONCE = 8_192  # bounds the copies of a vocabulary


def round_by_error(weight_NK: Tensor, x_TK: Tensor, scheme: Scheme) -> QuantizedWeight:
    """int4 groups with minimums by GPTQ (Frantar et al. 2023): column by column, what rounding one
    column gets wrong in the outputs on `x_TK` is made up for by the columns not rounded yet.

    Scales and minimums are chosen before: per group those with the least error weighted by the
    inputs' mean squares. Weight [N, K], inputs [T, K], both float32.
    """
    assert scheme.minimum
    width = scheme.columns or weight_NK.shape[1]
    hessian_KK = x_TK.T @ x_TK / len(x_TK)
    halves = _grids(weight_NK, hessian_KK.diagonal(), width)
    scales_NC, minimums_NC = (numbers.float() for numbers in halves)
    diagonal = hessian_KK.diagonal()
    diagonal += _DAMPING * diagonal.mean() + 1e-8
    inverse_KK = torch.cholesky_inverse(torch.linalg.cholesky(hessian_KK))
    upper_KK = torch.linalg.cholesky(inverse_KK, upper=True)
    left_NK = weight_NK.clone()
    columns = weight_NK.shape[1]
    for begin in range(0, columns, _BLOCK):
        end = min(begin + _BLOCK, columns)
        errors = torch.zeros(len(left_NK), end - begin)
        for column in range(begin, end):
            grid = scales_NC[:, column // width], minimums_NC[:, column // width]
            rounded_N = _on_grid(left_NK[:, column], *grid)
            error_N = (left_NK[:, column] - rounded_N) / upper_KK[column, column]
            left_NK[:, column] = rounded_N
            if column + 1 < end:
                left_NK[:, column + 1 : end] -= torch.outer(
                    error_N, upper_KK[column, column + 1 : end]
                )
            errors[:, column - begin] = error_N
        left_NK[:, end:] -= errors @ upper_KK[begin:end, end:]
    return round_to_scales(left_NK, scheme, *halves)


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
