"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019)."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_reference(x_TK: Tensor, weight_K: Tensor, eps: float) -> Tensor:
    """Over the last axis, which may be a head. Same dtype as `x_TK`.

    Computed in float32, rounded to the model's dtype, then scaled: the order that models were
    trained with and that transformers keeps.
    """
    wide = x_TK.float()
    inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * inverse).to(x_TK.dtype) * weight_K
