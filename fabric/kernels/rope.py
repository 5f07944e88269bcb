"""Rotary position embedding (Su et al. 2021), half-split pairing: element i turns with i + E/2."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_reference(x_THE: Tensor, cos_TE2: Tensor, sin_TE2: Tensor) -> Tensor:
    """Every head of every token turned by its position's angles (float32); rounded once."""
    first, second = x_THE.float().chunk(2, dim=-1)
    cos, sin = cos_TE2[:, None], sin_TE2[:, None]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x_THE.dtype)
