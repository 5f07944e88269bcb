"""Causal attention of new tokens over their sequence's KV pages, with grouped queries and a window.

Shape legend: T new tokens of all sequences, Q new tokens of one, L visible positions, H query
heads, G kv heads, E head_dim, X blocks, P page (positions a block).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Queries that are scored at once: bounds the scores to QUERY_ROWS * H * L floats.
QUERY_ROWS = 256
E4M3_MAX = 448.0  # the largest float8_e4m3fn


def write_pages_reference(
    pages_XGPE: Tensor, x_TGE: Tensor, block_T: Tensor, slot_T: Tensor
) -> None:
    """Put each token's keys (or values) at its slot of its block."""
    pages_XGPE[block_T, :, slot_T] = x_TGE


def read_pages_reference(pages_XGPE: Tensor, blocks_B: Tensor) -> Tensor:
    """The blocks of one sequence, one after the other: [G, B * P, E]."""
    return pages_XGPE[blocks_B].transpose(0, 1).flatten(1, 2)


@dataclass(frozen=True, slots=True)
class PageScales:
    """Of the keys, or the values, of one layer's pages: float32 [G] by head, for e4m3 pages; None:
    pages hold the numbers themselves."""

    scale_G: Tensor | None

    @staticmethod
    def both(scales_KG: Tensor | None) -> tuple[PageScales, PageScales]:
        """For keys, for values."""
        keys_G, values_G = (None, None) if scales_KG is None else scales_KG.unbind()
        return PageScales(keys_G), PageScales(values_G)

    def write(self, pages_XGPE: Tensor, x_TGE: Tensor, block_T: Tensor, slot_T: Tensor) -> None:
        """As `write_pages_reference`; fp8 saturates."""
        if self.scale_G is None:
            return write_pages_reference(pages_XGPE, x_TGE, block_T, slot_T)
        scaled_TGE = (x_TGE.float() / self.scale_G[:, None]).clamp(-E4M3_MAX, E4M3_MAX)
        # As bytes: torch has no indexed assignment of fp8.
        bytes_TGE = scaled_TGE.to(torch.float8_e4m3fn).view(torch.uint8)
        write_pages_reference(pages_XGPE.view(torch.uint8), bytes_TGE, block_T, slot_T)
        return None

    def read(self, pages_XGPE: Tensor, blocks_B: Tensor) -> Tensor:
        """As `read_pages_reference`; float32 from fp8."""
        if self.scale_G is None:
            return read_pages_reference(pages_XGPE, blocks_B)
        bytes_GLE = read_pages_reference(pages_XGPE.view(torch.uint8), blocks_B)
        return bytes_GLE.view(torch.float8_e4m3fn).float() * self.scale_G[:, None, None]


def attention_reference(
    q_QHE: Tensor,
    keys_GLE: Tensor,
    values_GLE: Tensor,
    *,
    offset: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """[Q, H * E] in the dtype of `q_QHE`; scores, softmax and sums are float32.

    Query i sits at key index offset + i; it sees the keys up to there, and if `window` is given
    only the last `window` of them.
    """
    keys, values = keys_GLE.float(), values_GLE.float()
    rows = [
        _attend(rows, keys, values, offset=offset + start * QUERY_ROWS, scale=scale, window=window)
        for start, rows in enumerate(q_QHE.split(QUERY_ROWS))
    ]
    return torch.cat(rows).to(q_QHE.dtype)


def _attend(
    q_QHE: Tensor, keys: Tensor, values: Tensor, *, offset: int, scale: float, window: int | None
) -> Tensor:
    groups, length, head_dim = keys.shape
    queries, heads, _ = q_QHE.shape
    # Query heads of one kv head are neighbours: [G, H/G * Q, E] shares its keys without a copy.
    q = q_QHE.float().view(queries, groups, heads // groups, head_dim).permute(1, 2, 0, 3)
    scores = q.flatten(1, 2) @ keys.transpose(1, 2) * scale
    scores = scores.view(groups, heads // groups, queries, length)
    at_Q1 = torch.arange(offset, offset + queries, device=keys.device)[:, None]
    key_L = torch.arange(length, device=keys.device)
    hidden_QL = key_L > at_Q1
    if window is not None:
        hidden_QL |= key_L <= at_Q1 - window
    weights = scores.masked_fill(hidden_QL, float("-inf")).softmax(dim=-1)
    attended = (weights.flatten(1, 2) @ values).view(groups, heads // groups, queries, head_dim)
    return attended.permute(2, 0, 1, 3).reshape(queries, heads * head_dim)
