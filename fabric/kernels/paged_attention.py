"""Attention of one new token a sequence over its KV pages: what decoding does.

Long contexts are split over programs (flash-decoding; Dao et al. 2023). A split is a fixed number
of keys, counted from position 0, and the parts are joined in order: so a row's result depends on
its own length alone, never on what else is in the batch. The softmax is online (Milakov &
Gimelshein 2018).

Shape legend: S sequences, H query heads, G kv heads, E head_dim, X blocks, P page, B blocks of a
sequence, N splits; K: keys, values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fabric.kernels.attention import attention_reference, read_pages_reference
from fabric.kernels.launch import Launch

DOT_ROWS_MIN = 16  # the smallest tile of a tensor core


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PagedKv:
    """One layer's pages, [X, 2, G, P, E] with blocks any stride apart, and how to attend to them.

    `tables_XB`: int32 block tables. `scale`: of the scores. `window`: a query sees only the last
    `window` positions, itself included. fp8 pages hold key / scale and value / scale, with float32
    `scales_KG` [2, G].
    """

    pages_XKGPE: Tensor
    tables_XB: Tensor
    scale: float
    window: int | None = None
    scales_KG: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.pages_XKGPE.element_size() == 1) != (self.scales_KG is not None):
            raise ValueError("fp8 pages need scales, and only they")
        if not self.pages_XKGPE[0].is_contiguous():
            raise ValueError("the pages of a block have no gaps")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decoding:
    """The decoding sequences of a step, int32: which rows of q and out are theirs, their rows in
    the block tables, and how many keys each sees (0: padding, gets zeros). `longest` bounds the
    lengths, on the host."""

    tokens_S: Tensor
    rows_S: Tensor
    lengths_S: Tensor
    longest: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Partials:
    """Scratch for splits, float32: results [S, H, N, E] and log2 of the softmax sums [S, H, N]."""

    attended_SHNE: Tensor
    sums_SHN: Tensor


def paged_attention_reference(q_THE: Tensor, kv: PagedKv, decoding: Decoding) -> Tensor:
    """[T, H, E], zero where no sequence decodes: gathers pages, then plain attention."""
    out_THE = torch.zeros(q_THE.shape, dtype=q_THE.dtype, device=q_THE.device)
    for token, row, length in zip(
        decoding.tokens_S.tolist(),
        decoding.rows_S.tolist(),
        decoding.lengths_S.tolist(),
        strict=True,
    ):
        if length == 0:
            continue
        q_HE = q_THE[token]
        keys_GLE, values_GLE = gather_reference(kv, row, length)
        attended = attention_reference(
            q_HE[None],
            keys_GLE,
            values_GLE,
            offset=length - 1,
            scale=kv.scale,
            window=kv.window,
        )
        out_THE[token] = attended.view_as(q_HE)
    return out_THE


def gather_reference(kv: PagedKv, row: int, length: int) -> tuple[Tensor, Tensor]:
    """The first `length` keys and values of one sequence, [G, L, E], float32 if they were fp8."""
    page = kv.pages_XKGPE.shape[3]
    blocks_B = kv.tables_XB[row, : -(-length // page)].long()
    found = []
    for which in range(2):
        pages = kv.pages_XKGPE[:, which]
        if kv.scales_KG is None:
            found.append(read_pages_reference(pages, blocks_B)[:, :length])
            continue
        # torch has no indexed reads of fp8: the bytes are gathered, then seen as fp8 again.
        bytes_GLE = read_pages_reference(pages.view(torch.uint8), blocks_B)[:, :length]
        wide = bytes_GLE.contiguous().view(pages.dtype).float()
        found.append(wide * kv.scales_KG[which][:, None, None])
    return found[0], found[1]


@triton.jit
def paged_attention_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    table_ptr: tl.tensor,
    token_ptr: tl.tensor,
    row_ptr: tl.tensor,
    length_ptr: tl.tensor,
    out_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    head_dim: tl.tensor,
    q_token: tl.tensor,
    out_token: tl.tensor,
    out_head: tl.tensor,
    out_split: tl.tensor,
    block_stride: tl.tensor,
    table_width: tl.tensor,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    FP8: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """All query heads of one kv head of one sequence, over one split of its keys, a program."""
    sequence = tl.program_id(0)
    group = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(length_ptr + sequence)
    begin = tl.maximum(length - window, 0) if window > 0 else 0
    end = tl.minimum((split + 1) * SPLIT_KEYS, length)
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    head = group * GROUP + row
    q_mask = (row < GROUP)[:, None] & (dim < head_dim)[None, :]
    token = tl.load(token_ptr + sequence).to(tl.int64)
    part = sequence.to(tl.int64) if SPLIT else token
    out_at = out_ptr + part * out_token + head[:, None] * out_head + dim[None, :]
    if (split * SPLIT_KEYS >= length) | (end <= begin):
        # Nothing to see here. The join leaves this split out; without splits this is padding.
        if not SPLIT:
            nothing = tl.zeros([ROWS, DIM], out_ptr.dtype.element_ty)
            tl.store(out_at, nothing, mask=q_mask)
        return
    table_at = table_ptr + tl.load(row_ptr + sequence).to(tl.int64) * table_width
    q_at = q_ptr + token * q_token + head[:, None] * head_dim + dim[None, :]
    q = tl.load(q_at, mask=q_mask, other=0.0)
    score_scale = scale * 1.4426950408889634  # log2(e): powers of two are what hardware has
    if FP8:
        score_scale *= tl.load(k_scale_ptr + group)
    head_at = group.to(tl.int64) * PAGE * head_dim
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    attended = tl.zeros([ROWS, DIM], tl.float32)
    start = tl.maximum(split * SPLIT_KEYS, begin // BLOCK * BLOCK)
    for at in range(start, end, BLOCK):
        key = at + tl.arange(0, BLOCK)
        inside = (key >= begin) & (key < end)
        block = tl.load(table_at + key // PAGE, mask=inside, other=0).to(tl.int64)
        place = block * block_stride + head_at + (key % PAGE) * head_dim
        kv_mask = inside[:, None] & (dim < head_dim)[None, :]
        k = tl.load(k_ptr + place[:, None] + dim[None, :], mask=kv_mask, other=0.0)
        v = tl.load(v_ptr + place[:, None] + dim[None, :], mask=kv_mask, other=0.0)
        scores = tl.dot(q, k.to(q.dtype).T, input_precision="ieee") * score_scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, axis=1))
        weight = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(best - higher)
        total = total * fade + tl.sum(weight, axis=1)
        attended = attended * fade[:, None]
        attended = tl.dot(weight.to(q.dtype), v.to(q.dtype), attended, input_precision="ieee")
        best = higher
    attended = attended / total[:, None]
    if FP8:
        attended *= tl.load(v_scale_ptr + group)
    if SPLIT:
        out_at += split * out_split
        sums_at = sum_ptr + (part * out_token + head * out_head) // head_dim
        tl.store(sums_at + split, best + tl.log2(total), mask=row < GROUP)
    tl.store(out_at, attended.to(out_ptr.dtype.element_ty), mask=q_mask)


@triton.jit
def join_splits_kernel(
    partial_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    token_ptr: tl.tensor,
    length_ptr: tl.tensor,
    out_ptr: tl.tensor,
    window: tl.tensor,
    head_dim: tl.tensor,
    heads: tl.tensor,
    splits: tl.tensor,
    out_token: tl.tensor,
    SPLIT_KEYS: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
    """One head of one sequence a program; the parts in order, so always the same sum."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    length = tl.load(length_ptr + sequence)
    dim = tl.arange(0, DIM)
    token = tl.load(token_ptr + sequence).to(tl.int64)
    out_at = out_ptr + token * out_token + head * head_dim + dim
    if length == 0:
        tl.store(out_at, tl.zeros([DIM], out_ptr.dtype.element_ty), mask=dim < head_dim)
        return
    begin = tl.maximum(length - window, 0) if window > 0 else 0
    part = (sequence.to(tl.int64) * heads + head) * splits
    best = float("-inf")
    total = 0.0
    attended = tl.zeros([DIM], tl.float32)
    for split in range(begin // SPLIT_KEYS, (length - 1) // SPLIT_KEYS + 1):
        log_sum = tl.load(sum_ptr + part + split)
        partial_at = partial_ptr + (part + split) * head_dim + dim
        partial = tl.load(partial_at, mask=dim < head_dim, other=0.0)
        higher = tl.maximum(best, log_sum)
        fade = tl.exp2(best - higher)
        weight = tl.exp2(log_sum - higher)
        total = total * fade + weight
        attended = attended * fade + partial * weight
        best = higher
    tl.store(out_at, (attended / total).to(out_ptr.dtype.element_ty), mask=dim < head_dim)


def split_count(longest: int, launch: Launch) -> int:
    """How many splits sequences of up to `longest` keys have."""
    return max(-(-longest // launch.size("SPLIT_KEYS")), 1)


def paged_attention(
    q_THE: Tensor,
    kv: PagedKv,
    decoding: Decoding,
    *,
    out: Tensor,
    scratch: Partials | None,
    launch: Launch,
) -> None:
    """out [T, H, E] of queries [T, H, E], each at the last of the keys that its sequence sees; only
    the rows of decoding sequences are read and written.

    Tokens of `q_THE` and `out` may be any stride apart. `scratch` holds at least
    `split_count(decoding.longest)` splits; None if there is one.
    """
    _, heads, head_dim = q_THE.shape
    sequences = len(decoding.rows_S)
    _, _, kv_heads, page, _ = kv.pages_XKGPE.shape
    splits = split_count(decoding.longest, launch)
    if splits > 1 and (scratch is None or scratch.sums_SHN.shape[2] < splits):
        raise ValueError(f"{splits} splits need scratch")
    if q_THE.stride()[1:] != (head_dim, 1) or out.stride()[1:] != (head_dim, 1):
        raise ValueError("heads lie side by side in queries and output")
    parts = scratch if splits > 1 else None
    target = out if parts is None else parts.attended_SHNE
    k_pages, v_pages = kv.pages_XKGPE.unbind(1)
    k_scale, v_scale = (q_THE, q_THE) if kv.scales_KG is None else kv.scales_KG.unbind(0)
    group = heads // kv_heads
    dim = max(triton.next_power_of_2(head_dim), DOT_ROWS_MIN)
    paged_attention_kernel[(sequences, kv_heads, splits)](
        q_THE,
        k_pages,
        v_pages,
        k_scale,
        v_scale,
        kv.tables_XB,
        decoding.tokens_S,
        decoding.rows_S,
        decoding.lengths_S,
        target,
        q_THE if parts is None else parts.sums_SHN,
        kv.scale,
        kv.window or 0,
        head_dim,
        q_THE.stride(0),
        target.stride(0),
        target.stride(1),
        0 if parts is None else target.stride(2),
        kv.pages_XKGPE.stride(0),
        kv.tables_XB.stride(0),
        GROUP=group,
        ROWS=max(triton.next_power_of_2(group), DOT_ROWS_MIN),
        DIM=dim,
        PAGE=page,
        FP8=kv.scales_KG is not None,
        SPLIT=parts is not None,
        SPLIT_KEYS=launch.size("SPLIT_KEYS"),
        BLOCK=launch.size("BLOCK"),
        **launch.options(),
    )
    if parts is not None:
        join_splits_kernel[(sequences, heads)](
            parts.attended_SHNE,
            parts.sums_SHN,
            decoding.tokens_S,
            decoding.lengths_S,
            out,
            kv.window or 0,
            head_dim,
            heads,
            parts.sums_SHN.shape[2],
            out.stride(0),
            SPLIT_KEYS=launch.size("SPLIT_KEYS"),
            DIM=dim,
            num_warps=2,
        )
