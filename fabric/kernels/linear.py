"""Linear layers: y = x @ weight^T + bias. Weights are [N, K], as checkpoints store them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

# Rows of the vocabulary widened to float32 at a time: bounds the copy to 16,384 * K * 4 bytes.
VOCAB_ROWS = 16_384


def linear_reference(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """[T, N] in the dtype of `x_TK`."""
    return linear(x_TK, weight_NK, bias_N)


def logits_reference(x_RK: Tensor, weight_VK: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """float32 [R, V]. Products of narrow inputs, but sums and results are float32: logits near 16
    in bfloat16 are 0.06 to 0.125 apart, so rounding them would make ties between tokens."""
    wide = x_RK.float()
    parts = [linear(wide, rows.float()) for rows in weight_VK.split(VOCAB_ROWS)]
    logits_RV = torch.cat(parts, dim=-1)
    return logits_RV if bias_V is None else logits_RV + bias_V.float()
