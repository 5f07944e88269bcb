"""Drawing tokens on the GPU: the Triton twin of `fabric.kernels.sampling.TorchSampling.draw`.

Same filters, same ties, same Philox numbers (see there). One program a row, which never sorts: the
cut of a filter is a logit and, among equals, a token id. The logit is found by bisecting the 32
bits of a key that orders as floats do; the row, 0.5 MB of a large vocabulary, stays in L2.
Weights are float32 and their sums float64, so a draw differs from the float64 reference only where
its uniform number lies within about 1e-5 of the border between two tokens.

Shape legend: R rows, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fabric.kernels.launch import Launch
from fabric.kernels.sampling import GREEDY_BELOW, Draw, NoFiniteLogit, TorchSampling

DRAW_LAUNCH = Launch(sizes=(("BLOCK", 4096),), warps=16, stages=1)


@triton.jit
def order_key(z: tl.tensor) -> tl.tensor:
    """uint32 that orders as float32 does; -0 as 0."""
    bits = (z + 0.0).to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, ~bits, bits | 0x80000000)


@triton.jit
def key_logit(key: tl.tensor) -> tl.tensor:
    """The float32 that has this key."""
    bits = tl.where(key >= 0x80000000, key & 0x7FFFFFFF, ~key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def row_at(row_ptr: tl.tensor, col: tl.tensor, vocab: tl.tensor) -> tl.tensor:
    """Logits; NaN, and what lies beyond the row, as -inf."""
    z = tl.load(row_ptr + col, mask=col < vocab, other=float("-inf"))
    return tl.where(z == z, z, float("-inf"))


@triton.jit
def id_of_tie(
    row: tl.tensor,
    vocab: tl.tensor,
    cut: tl.tensor,
    needed: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The id of the `needed`-th token (from 1, in order of id) whose key is `cut`."""
    seen = 0
    found = vocab
    for start in range(0, vocab, BLOCK):
        col = start + tl.arange(0, BLOCK)
        tie = (order_key(row_at(row, col, vocab)) == cut) & (col < vocab)
        rank = tl.cumsum(tie.to(tl.int32), axis=0) + seen
        found = tl.minimum(found, tl.min(tl.where(tie & (rank == needed), col, vocab), axis=0))
        seen += tl.sum(tie.to(tl.int32), axis=0)
    return found


@triton.jit
def draw_kernel(
    logits_ptr: tl.tensor,
    row_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    choice_ptr: tl.tensor,
    position_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    out_ptr: tl.tensor,
    vocab: tl.tensor,
    row_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One draw a program; -1 where a row has no finite logit."""
    entry = tl.program_id(0)
    row = logits_ptr + tl.load(row_ptr + entry).to(tl.int64) * row_stride
    warmth = tl.load(temperature_ptr + entry)
    top_k = tl.load(top_k_ptr + entry)
    top_p = tl.load(top_p_ptr + entry).to(tl.float64)
    min_p = tl.load(min_p_ptr + entry)
    lanes = tl.arange(0, BLOCK)

    best_lanes = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        best_lanes = tl.maximum(best_lanes, row_at(row, start + lanes, vocab))
    best = tl.max(best_lanes, axis=0)
    if (best == float("-inf")) | (best == float("inf")):
        tl.store(out_ptr + entry, -1)
        return

    # min_p: the lowest key whose weight is large enough; bisection, as the weight grows with it.
    low = order_key(tl.full([1], float("-inf"), tl.float32))
    high = order_key(tl.zeros([1], tl.float32) + best)
    if min_p > 0.0:
        for _ in range(32):
            middle = low + (high - low) // 2
            enough = tl.exp((key_logit(middle) - best) / warmth) >= min_p
            high = tl.where(enough, middle, high)
            low = tl.where(enough, low, tl.minimum(middle + 1, high))
        low = high
    cut = tl.max(low, axis=0)
    last = vocab  # tokens of the cut's key are kept up to this id

    if top_k > 0:
        # The highest key that at least top_k tokens reach.
        low_k = cut
        high_k = tl.max(order_key(tl.zeros([1], tl.float32) + best), axis=0)
        for _ in range(32):
            middle = low_k + (high_k - low_k + 1) // 2
            count = tl.zeros([BLOCK], tl.int32)
            for start in range(0, vocab, BLOCK):
                key = order_key(row_at(row, start + lanes, vocab))
                count += (key >= middle).to(tl.int32)
            reached = tl.sum(count, axis=0) >= top_k
            low_k = tl.where(reached, middle, low_k)
            high_k = tl.where(reached, high_k, tl.maximum(middle - 1, low_k))
        above = tl.zeros([BLOCK], tl.int32)
        for start in range(0, vocab, BLOCK):
            above += (order_key(row_at(row, start + lanes, vocab)) > low_k).to(tl.int32)
        cut = low_k
        last = id_of_tie(row, vocab, cut, top_k - tl.sum(above, axis=0), BLOCK)

    if top_p < 1.0:
        total = kept_mass(row, vocab, warmth, best, cut, cut, last, BLOCK)
        wanted = top_p * total
        # The highest key with which the mass reaches what is wanted.
        low_p = cut
        high_p = tl.max(order_key(tl.zeros([1], tl.float32) + best), axis=0)
        for _ in range(32):
            middle = low_p + (high_p - low_p + 1) // 2
            reached = kept_mass(row, vocab, warmth, best, middle, cut, last, BLOCK) >= wanted
            low_p = tl.where(reached, middle, low_p)
            high_p = tl.where(reached, high_p, tl.maximum(middle - 1, low_p))
        above_mass = kept_mass(row, vocab, warmth, best, low_p + 1, cut, last, BLOCK)
        weight = tl.exp((key_logit(low_p) - best) / warmth).to(tl.float64)
        needed = tl.maximum(tl.ceil((wanted - above_mass) / weight), 1.0).to(tl.int32)
        tie_last = id_of_tie(row, vocab, low_p, needed, BLOCK)
        last = tl.where(low_p == cut, tl.minimum(tie_last, last), tie_last)
        cut = low_p

    total = kept_mass(row, vocab, warmth, best, cut, cut, last, BLOCK)
    seed = tl.load(seed_ptr + entry)
    zero = tl.zeros([1], tl.uint32)
    c0, c1, _, _ = tl.philox(
        seed,
        zero + tl.load(position_ptr + entry).to(tl.uint32),
        zero + tl.load(choice_ptr + entry).to(tl.uint32),
        zero,
        zero,
    )
    noise = ((c0.to(tl.uint64) << 32) | c1.to(tl.uint64)) >> 11
    target = tl.max(noise.to(tl.float64), axis=0) * 1.1102230246251565e-16 * total
    running = target * 0.0
    token = vocab
    final = 0
    for start in range(0, vocab, BLOCK):
        col = start + lanes
        z = row_at(row, col, vocab)
        key = order_key(z)
        kept = ((key > cut) | ((key == cut) & (col <= last))) & (col < vocab)
        mass = tl.where(kept, tl.exp((z - best) / warmth), 0.0).to(tl.float64)
        passed = kept & (running + tl.cumsum(mass, axis=0) > target)
        token = tl.minimum(token, tl.min(tl.where(passed, col, vocab), axis=0))
        running += tl.sum(mass, axis=0)
        final = tl.maximum(final, tl.max(tl.where(mass > 0, col, 0), axis=0))
    # Sums taken in two orders may differ in the last bit: the last token that can be drawn, then.
    tl.store(out_ptr + entry, tl.where(token < vocab, token, final))


@triton.jit
def kept_mass(
    row: tl.tensor,
    vocab: tl.tensor,
    warmth: tl.tensor,
    best: tl.tensor,
    least: tl.tensor,
    cut: tl.tensor,
    last: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Mass (float64; the likeliest token has 1) of the tokens with keys from `least` on that the
    cut lets through."""
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, vocab, BLOCK):
        col = start + tl.arange(0, BLOCK)
        z = row_at(row, col, vocab)
        key = order_key(z)
        kept = (key >= least) & ((key > cut) | ((key == cut) & (col <= last))) & (col < vocab)
        sums += tl.where(kept, tl.exp((z - best) / warmth), 0.0).to(tl.float64)
    return tl.sum(sums, axis=0)


def draw_tokens(logits_RV: Tensor, draws: Sequence[Draw], *, out: Tensor, launch: Launch) -> None:
    """`out` (int32, one an entry of `draws`) gets the tokens, -1 for a row without a finite logit.

    float32 logits, rows any stride apart.
    """
    if logits_RV.dtype != torch.float32 or logits_RV.stride(1) != 1:
        raise ValueError("draws are from float32 logits without gaps")
    device = logits_RV.device

    def column(values: list[int] | list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    cold = [draw.temperature < GREEDY_BELOW for draw in draws]
    signed = [draw.seed - (1 << 64) if draw.seed >> 63 else draw.seed for draw in draws]
    draw_kernel[(len(draws),)](
        logits_RV,
        column([draw.row for draw in draws], torch.int32),
        column(signed, torch.int64),
        column([draw.choice for draw in draws], torch.int32),
        column([draw.position for draw in draws], torch.int32),
        column(
            [1.0 if c else d.temperature for d, c in zip(draws, cold, strict=True)], torch.float32
        ),
        column([draw.top_p for draw in draws], torch.float64),
        column([draw.min_p for draw in draws], torch.float32),
        column([1 if c else d.top_k for d, c in zip(draws, cold, strict=True)], torch.int32),
        out,
        logits_RV.shape[1],
        logits_RV.stride(0),
        BLOCK=launch.size("BLOCK"),
        **launch.options(),
    )


class TritonSampling(TorchSampling):
    """`SamplingKernels` on a GPU: draws in one kernel; greedy and ranks are torch's."""

    def __init__(self, launch: Launch = DRAW_LAUNCH) -> None:
        self._launch = launch

    def draw(self, logits_RV: Tensor, draws: Sequence[Draw]) -> list[int]:
        """One token an entry. Raises `NoFiniteLogit`."""
        out = torch.empty(len(draws), dtype=torch.int32, device=logits_RV.device)
        draw_tokens(logits_RV, draws, out=out, launch=self._launch)
        tokens: list[int] = out.tolist()
        for draw, token in zip(draws, tokens, strict=True):
            if token < 0:
                raise NoFiniteLogit(f"row {draw.row} of the logits has no finite value")
        return tokens
