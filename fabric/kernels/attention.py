"""Causal attention of new tokens over their sequence's KV pages, with grouped queries and a window.

Shape legend: T new tokens of all sequences, Q new tokens of one, L visible positions, H query
heads, G kv heads, E head_dim, X blocks, P page (positions a block).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Queries that are scored at once: bounds the scores to QUERY_ROWS * H * L floats.
QUERY_ROWS = 256


def write_pages_reference(
    pages_XGPE: Tensor, x_TGE: Tensor, block_T: Tensor, slot_T: Tensor
) -> None:
    """Put each token's keys (or values) at its slot of its block."""
    pages_XGPE[block_T, :, slot_T] = x_TGE


def read_pages_reference(pages_XGPE: Tensor, blocks_B: Tensor) -> Tensor:
    """The blocks of one sequence, one after the other: [G, B * P, E]."""
    return pages_XGPE[blocks_B].transpose(0, 1).flatten(1, 2)


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
