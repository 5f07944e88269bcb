"""Products of tokens with the weights of their experts: one launch for all experts.

The (token, expert) pairs are sorted by expert; a tile holds pairs of one expert, which padding
fills (Gale et al. 2023, MegaBlocks). The schedule is made on the device with shapes that don't
depend on the routing, so a step with experts can be captured as a graph.

Shape legend: T tokens, C experts chosen by a token, A pairs (T * C), W experts, M rows of a tile,
S sorted places (A and padding), U tiles (S / M), N out, K in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fabric.kernels.launch import Launch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertSchedule:
    """`pairs_S`: which pair (token * C + choice) each place holds; A where it is padding.
    `experts_U`: the expert of each tile; W for a tile that is not needed. int32."""

    pairs_S: Tensor
    experts_U: Tensor
    tile: int


def schedule_experts(experts_TC: Tensor, experts: int, tile: int) -> ExpertSchedule:
    """Sort pairs by expert (in the order of tokens inside one) into tiles of `tile` rows."""
    flat_A = experts_TC.reshape(-1).long()
    pairs = len(flat_A)
    order_A = torch.sort(flat_A, stable=True).indices
    count_W = torch.zeros(experts, dtype=torch.long, device=flat_A.device)
    count_W.scatter_add_(0, flat_A, torch.ones_like(flat_A))
    tiles_W = (count_W + tile - 1) // tile
    last_tile_W = tiles_W.cumsum(0)
    # At most one tile an expert is not full; so this many tiles are always enough.
    tiles = -(-pairs // tile) + min(experts, pairs)
    experts_U = torch.searchsorted(
        last_tile_W, torch.arange(tiles, device=flat_A.device), right=True
    )
    sorted_expert_A = flat_A[order_A]
    rank_A = torch.arange(pairs, device=flat_A.device)
    within_A = rank_A - (count_W.cumsum(0) - count_W)[sorted_expert_A]
    place_A = (last_tile_W - tiles_W)[sorted_expert_A] * tile + within_A
    pairs_S = torch.full((tiles * tile,), pairs, dtype=torch.int32, device=flat_A.device)
    pairs_S[place_A] = order_A.to(torch.int32)
    return ExpertSchedule(pairs_S=pairs_S, experts_U=experts_U.to(torch.int32), tile=tile)


def moe_gemm_reference(
    x_AK: Tensor, weight_WNK: Tensor, experts_A: Tensor, routing_A: Tensor | None = None
) -> Tensor:
    """[A, N]: row a of x times the weight of its expert (times its routing weight), float32 sums,
    rounded once."""
    y_AN = torch.einsum("ak,ank->an", x_AK.float(), weight_WNK[experts_A.long()].float())
    return (y_AN if routing_A is None else y_AN * routing_A[:, None]).to(x_AK.dtype)


@triton.jit
def moe_gemm_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    pair_ptr: tl.tensor,
    expert_ptr: tl.tensor,
    routing_ptr: tl.tensor,
    out_ptr: tl.tensor,
    pairs: tl.tensor,
    experts: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    share: tl.tensor,
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One tile of rows by BLOCK_N columns a program; pair p reads row p // share of x."""
    tile = tl.program_id(1)
    expert = tl.load(expert_ptr + tile).to(tl.int64)
    if expert >= experts:
        return
    pair_M = tl.load(pair_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M))
    col_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at_K = tl.arange(0, BLOCK_K)
    row_mask = pair_M < pairs
    col_mask = col_N < outputs
    x_at = x_ptr + (pair_M // share).to(tl.int64)[:, None] * inputs + at_K[None, :]
    weight_row_N = expert * outputs + col_N
    weight_at = weight_ptr + weight_row_N[None, :] * inputs + at_K[:, None]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, inputs, BLOCK_K):
        inside = start + at_K < inputs
        x = tl.load(x_at + start, mask=row_mask[:, None] & inside[None, :], other=0.0)
        weight_mask = inside[:, None] & col_mask[None, :]
        weight = tl.load(weight_at + start, mask=weight_mask, other=0.0)
        sums = tl.dot(x, weight, sums, input_precision="ieee")
    if WEIGHTED:
        routing = tl.load(routing_ptr + pair_M, mask=row_mask, other=0.0).to(tl.float32)
        sums *= routing[:, None]
    out_at = out_ptr + pair_M.to(tl.int64)[:, None] * outputs + col_N[None, :]
    mask = row_mask[:, None] & col_mask[None, :]
    tl.store(out_at, sums.to(out_ptr.dtype.element_ty), mask=mask)


def moe_gemm(
    x: Tensor,
    weight_WNK: Tensor,
    schedule: ExpertSchedule,
    *,
    out_AN: Tensor,
    routing_A: Tensor | None = None,
    launch: Launch,
) -> None:
    """out[a] = x's row of pair a times the weight of its expert, times `routing_A` (float32).

    `x` is [T, K] (the first product: all pairs of a token read its row) or [A, K]; contiguous.
    `launch` has the BLOCK_M that the schedule was made for.
    """
    pairs, outputs = out_AN.shape
    experts, _, inputs = weight_WNK.shape
    if launch.size("BLOCK_M") != schedule.tile or pairs % len(x):
        raise ValueError("the schedule is for other tiles, or the pairs are not whole tokens")
    block_n = launch.size("BLOCK_N")
    moe_gemm_kernel[(triton.cdiv(outputs, block_n), len(schedule.experts_U))](
        x,
        weight_WNK,
        schedule.pairs_S,
        schedule.experts_U,
        out_AN if routing_A is None else routing_A,
        out_AN,
        pairs,
        experts,
        outputs,
        inputs,
        pairs // len(x),
        WEIGHTED=routing_A is not None,
        BLOCK_M=schedule.tile,
        BLOCK_N=block_n,
        BLOCK_K=launch.size("BLOCK_K"),
        **launch.options(),
    )
