"""Causal attention of many new tokens a sequence over its KV pages: chunks of prompts, resumed and
prefix-hit ones, and speculative tokens.

A tile packs queries and the query heads of one kv head into its rows, so that a group of any size
shares the keys it reads. Ragged: a tile belongs to one sequence, and the host lists the tiles.

Shape legend: T new tokens of all sequences, S sequences, Q new tokens of one, H query heads, G kv
heads, E head_dim, X blocks, P page, N tiles; K: keys, values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fabric.kernels.attention import attention_reference
from fabric.kernels.launch import Launch
from fabric.kernels.paged_attention import DOT_ROWS_MIN, PagedKv, gather_reference


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prefill:
    """The sequences of a step, int32: sequence s owns `counts_S[s]` tokens from `starts_S[s]` on,
    at positions first[s], +1, ...; `rows_S` are its rows in the block tables. Tile n is the rows
    from `tile_rows_N[n]` on of sequence `tile_sequences_N[n]`; see `tiles`."""

    starts_S: Tensor
    counts_S: Tensor
    first_S: Tensor
    rows_S: Tensor
    tile_sequences_N: Tensor
    tile_rows_N: Tensor


def tiles(counts: Sequence[int], group: int, rows: int) -> tuple[list[int], list[int]]:
    """(sequence, first row) of every tile: a sequence of Q tokens has Q * group rows, row r is head
    r % group of token r // group. Later rows see more keys, so each sequence's last tile is listed
    first: what takes longest starts first."""
    found = [
        (sequence, first)
        for sequence, count in enumerate(counts)
        for first in reversed(range(0, count * group, rows))
    ]
    return [sequence for sequence, _ in found], [first for _, first in found]


def prefill_attention_reference(q_THE: Tensor, kv: PagedKv, prefill: Prefill) -> Tensor:
    """[T, H, E], zero where no sequence has tokens: gathers pages, then plain attention."""
    out_THE = torch.zeros(q_THE.shape, dtype=q_THE.dtype, device=q_THE.device)
    columns = (prefill.starts_S, prefill.counts_S, prefill.first_S, prefill.rows_S)
    for start, count, first, row in zip(*(each.tolist() for each in columns), strict=True):
        q_QHE = q_THE[start : start + count]
        keys_GLE, values_GLE = gather_reference(kv, row, first + len(q_QHE))
        attended = attention_reference(
            q_QHE, keys_GLE, values_GLE, offset=first, scale=kv.scale, window=kv.window
        )
        out_THE[start : start + count] = attended.view_as(q_QHE)
    return out_THE


@triton.jit
def prefill_attention_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    table_ptr: tl.tensor,
    start_ptr: tl.tensor,
    count_ptr: tl.tensor,
    first_ptr: tl.tensor,
    row_ptr: tl.tensor,
    tile_sequence_ptr: tl.tensor,
    tile_row_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    head_dim: tl.tensor,
    q_token: tl.tensor,
    out_token: tl.tensor,
    block_stride: tl.tensor,
    table_width: tl.tensor,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FP8: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One tile of ROWS (query, head) pairs of one kv head a program."""
    group = tl.program_id(0)
    tile = tl.program_id(1)
    sequence = tl.load(tile_sequence_ptr + tile)
    tile_row = tl.load(tile_row_ptr + tile)
    begin_token = tl.load(start_ptr + sequence)
    count = tl.load(count_ptr + sequence)
    first = tl.load(first_ptr + sequence)
    table_at = table_ptr + tl.load(row_ptr + sequence).to(tl.int64) * table_width
    row = tile_row + tl.arange(0, ROWS)
    query = row // GROUP
    head = group * GROUP + row % GROUP
    position = first + query
    dim = tl.arange(0, DIM)
    q_mask = (query < count)[:, None] & (dim < head_dim)[None, :]
    token = (begin_token + query).to(tl.int64)
    inside_token = head[:, None] * head_dim + dim[None, :]
    q = tl.load(q_ptr + token[:, None] * q_token + inside_token, mask=q_mask, other=0.0)
    score_scale = scale * 1.4426950408889634  # log2(e): powers of two are what hardware has
    if FP8:
        score_scale *= tl.load(k_scale_ptr + group)
    head_at = group.to(tl.int64) * PAGE * head_dim
    end = first + tl.minimum((tile_row + ROWS - 1) // GROUP, count - 1) + 1
    oldest = first + tile_row // GROUP - window + 1 if window > 0 else 0
    start = tl.maximum(oldest, 0) // BLOCK * BLOCK
    # Finite, so that a row that sees nothing of a tile is no inf - inf.
    best = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    attended = tl.zeros([ROWS, DIM], tl.float32)
    for at in range(start, end, BLOCK):
        key = at + tl.arange(0, BLOCK)
        inside = (key >= oldest) & (key < end)
        block = tl.load(table_at + key // PAGE, mask=inside, other=0).to(tl.int64)
        place = block * block_stride + head_at + (key % PAGE) * head_dim
        kv_mask = inside[:, None] & (dim < head_dim)[None, :]
        k = tl.load(k_ptr + place[:, None] + dim[None, :], mask=kv_mask, other=0.0)
        v = tl.load(v_ptr + place[:, None] + dim[None, :], mask=kv_mask, other=0.0)
        visible = key[None, :] <= position[:, None]
        if window > 0:
            visible = visible & (key[None, :] > position[:, None] - window)
        scores = tl.dot(q, k.to(q.dtype).T, input_precision="ieee") * score_scale
        scores = tl.where(visible, scores, -1.0e30)
        higher = tl.maximum(best, tl.max(scores, axis=1))
        weight = tl.where(visible, tl.exp2(scores - higher[:, None]), 0.0)
        fade = tl.exp2(best - higher)
        total = total * fade + tl.sum(weight, axis=1)
        attended = attended * fade[:, None]
        attended = tl.dot(weight.to(q.dtype), v.to(q.dtype), attended, input_precision="ieee")
        best = higher
    attended = attended / total[:, None]
    if FP8:
        attended *= tl.load(v_scale_ptr + group)
    out_at = out_ptr + token[:, None] * out_token + inside_token
    tl.store(out_at, attended.to(out_ptr.dtype.element_ty), mask=q_mask)


def prefill_attention(
    q_THE: Tensor, kv: PagedKv, prefill: Prefill, *, out: Tensor, launch: Launch
) -> None:
    """out [T, H, E]; query i of a sequence sees the keys up to its own position.

    The tiles in `prefill` are those of `tiles(counts, H // G, launch.size("ROWS"))`.
    """
    _, heads, head_dim = q_THE.shape
    _, _, kv_heads, page, _ = kv.pages_XKGPE.shape
    if q_THE.stride()[1:] != (head_dim, 1) or out.stride()[1:] != (head_dim, 1):
        raise ValueError("heads lie side by side in queries and output")
    k_pages, v_pages = kv.pages_XKGPE.unbind(1)
    k_scale, v_scale = (q_THE, q_THE) if kv.scales_KG is None else kv.scales_KG.unbind(0)
    prefill_attention_kernel[(kv_heads, len(prefill.tile_rows_N))](
        q_THE,
        k_pages,
        v_pages,
        k_scale,
        v_scale,
        kv.tables_XB,
        prefill.starts_S,
        prefill.counts_S,
        prefill.first_S,
        prefill.rows_S,
        prefill.tile_sequences_N,
        prefill.tile_rows_N,
        out,
        kv.scale,
        kv.window or 0,
        head_dim,
        q_THE.stride(0),
        out.stride(0),
        kv.pages_XKGPE.stride(0),
        kv.tables_XB.stride(0),
        GROUP=heads // kv_heads,
        DIM=max(triton.next_power_of_2(head_dim), DOT_ROWS_MIN),
        PAGE=page,
        FP8=kv.scales_KG is not None,
        ROWS=launch.size("ROWS"),
        BLOCK=launch.size("BLOCK"),
        **launch.options(),
    )
