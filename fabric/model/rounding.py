"""Rounding one matrix with the inputs it will meet in view."""

from __future__ import annotations

import torch
from torch import Tensor

from fabric.kernels.quantized import QuantizedWeight, Scheme, WeightFormat, round_to_scales

INT4_LARGEST = 7.0
_SHRINKS = torch.linspace(1.1, 0.65, 13)  # of a group's scale: cutting its largest weight may pay
_DAMPING = 0.01  # of the mean diagonal, as in the paper: keeps the Hessian invertible
_BLOCK = 64  # columns whose errors are spread inside the block first


def round_by_error(weight_NK: Tensor, x_TK: Tensor, scheme: Scheme) -> QuantizedWeight:
    """int4 groups by GPTQ (Frantar et al. 2023): column by column, what rounding one column gets
    wrong in the outputs on `x_TK` is made up for by the columns not rounded yet.

    Scales are chosen before: per group, the one with the least error weighted by the inputs' mean
    squares. Weight [N, K], inputs [T, K], both float32.
    """
    assert scheme.format is WeightFormat.INT4
    width = scheme.columns or weight_NK.shape[1]
    hessian_KK = x_TK.T @ x_TK / len(x_TK)
    scales_NC = _scales(weight_NK, hessian_KK.diagonal(), width)
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
            scale_N = scales_NC[:, column // width]
            rounded_N = (left_NK[:, column] / scale_N).round().clamp(-8, 7) * scale_N
            error_N = (left_NK[:, column] - rounded_N) / upper_KK[column, column]
            left_NK[:, column] = rounded_N
            if column + 1 < end:
                left_NK[:, column + 1 : end] -= torch.outer(
                    error_N, upper_KK[column, column + 1 : end]
                )
            errors[:, column - begin] = error_N
        left_NK[:, end:] -= errors @ upper_KK[begin:end, end:]
    return round_to_scales(left_NK, scheme, scales_NC)


def _scales(weight_NK: Tensor, weight_K: Tensor, width: int) -> Tensor:
    rows, columns = weight_NK.shape
    padding = -columns % width
    groups_NCW = torch.nn.functional.pad(weight_NK, (0, padding)).view(rows, -1, width)
    importance_CW = torch.nn.functional.pad(weight_K, (0, padding)).view(-1, width)
    widest_NC = groups_NCW.abs().amax(dim=-1) / INT4_LARGEST
    widest_NC = torch.where(widest_NC == 0, 1.0, widest_NC)
    best_NC = widest_NC.clone()
    least_NC = torch.full_like(widest_NC, torch.inf)
    for shrink in _SHRINKS:
        scale_NC1 = (widest_NC * shrink)[..., None]
        rounded_NCW = (groups_NCW / scale_NC1).round().clamp(-8, 7) * scale_NC1
        error_NC = ((rounded_NCW - groups_NCW) ** 2 * importance_CW).sum(dim=-1)
        better = error_NC < least_NC
        least_NC = torch.where(better, error_NC, least_NC)
        best_NC = torch.where(better, scale_NC1[..., 0], best_NC)
    return best_NC
