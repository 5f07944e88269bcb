"""Mixtures of experts: which experts a row goes to, and what they make of it.

Shape legend: T rows, M rows of one expert, D hidden, N columns of an expert, X experts, K of them
chosen for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from fabric.kernels.collective import Collective
from fabric.kernels.linear import linear_reference
from fabric.kernels.program import Mixture
from fabric.kernels.silu_mul import silu_mul_reference


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routing:
    """`experts_TK` int64, likeliest first; `weights_TK` float32."""

    experts_TK: Tensor
    weights_TK: Tensor


def route_reference(x_TD: Tensor, router_XD: Tensor, *, top_k: int, renormalise: bool) -> Routing:
    """Softmax over all experts, the `top_k` likeliest, scaled to sum 1 if `renormalise`. Products
    and sums are float32 whatever the dtype: a rounded logit could pick another expert."""
    probabilities_TX = linear(x_TD.float(), router_XD.float()).softmax(dim=-1)
    # Stable: of equals the lower number comes first, in every executor.
    ordered_TX, experts_TX = probabilities_TX.sort(dim=-1, descending=True, stable=True)
    weights_TK = ordered_TX[:, :top_k]
    if renormalise:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return Routing(experts_TK=experts_TX[:, :top_k], weights_TK=weights_TK)


def expert_reference(x_MD: Tensor, gate_up_ND: Tensor, down_DN: Tensor) -> Tensor:
    """[M, D]: (silu(x @ gate) * (x @ up)) @ down; the first half of `gate_up_ND` is the gate."""
    return linear_reference(silu_mul_reference(linear_reference(x_MD, gate_up_ND)), down_DN)


def experts_reference(
    x_MD: Tensor, experts_M: Tensor, gate_up_ND: Sequence[Tensor], down_DN: Sequence[Tensor]
) -> Tensor:
    """float32 [M, D]: each row through its own expert, numbered from 0 as the weights are."""
    out_MD = torch.empty(x_MD.shape, dtype=torch.float32, device=x_MD.device)
    for expert, (gate_up, down) in enumerate(zip(gate_up_ND, down_DN, strict=True)):
        rows = (experts_M == expert).nonzero().squeeze(1)
        if len(rows):
            out_MD[rows] = expert_reference(x_MD[rows], gate_up, down).float()
    return out_MD


def combine_reference(out_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """float32 [T, D]: the weighted sum of each row's experts, in the order of choice."""
    total_TD = out_TKD[:, 0] * weights_TK[:, :1]
    for choice in range(1, weights_TK.shape[1]):
        total_TD = total_TD + out_TKD[:, choice] * weights_TK[:, choice : choice + 1]
    return total_TD


def mixture_reference(op: Mixture, x_TD: Tensor, loads_X: Tensor) -> Tensor:
    """float32 [T, D] of one worker that has all experts (or some columns of all: then a share of
    the sum). Adds the rows that each expert got to `loads_X`."""
    routing = route_reference(x_TD, op.router_XD, top_k=op.top_k, renormalise=op.renormalise)
    experts_M = routing.experts_TK.flatten()
    loads_X += torch.bincount(experts_M, minlength=len(loads_X)).to(loads_X.device)
    rows_MD = x_TD.repeat_interleave(op.top_k, dim=0)
    out_MD = experts_reference(rows_MD, experts_M, op.gate_up_ND, op.down_DN)
    return combine_reference(out_MD.view(len(x_TD), op.top_k, -1), routing.weights_TK)


def expert_parallel_mixture(
    op: Mixture,
    x_TD: Tensor,
    group: Collective,
    loads_X: Tensor,
    experts: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """float32 [T, D], the same on every worker of the group. `experts`: what takes rows [M, D]
    through their own experts, numbered from 0 as the weights are (None: `experts_reference`).

    The rows are shared out over the expert-parallel ranks. A rank routes its own, sends each to the
    ranks that have its experts (the ones of its own tp_rank: they hold the same columns), gets the
    outputs back and adds them up; then everybody gathers all rows' sums.
    """
    parts = len(op.runs)
    tp = group.size // parts
    ep_rank, tp_rank = divmod(group.rank, tp)
    share = -(-len(x_TD) // parts)
    mine_TD = x_TD[ep_rank * share : (ep_rank + 1) * share]
    routing = route_reference(mine_TD, op.router_XD, top_k=op.top_k, renormalise=op.renormalise)
    experts_M = routing.experts_TK.flatten()
    rows_MD = mine_TD.repeat_interleave(op.top_k, dim=0)
    picks = [
        ((experts_M >= run.start) & (experts_M < run.stop)).nonzero().squeeze(1) for run in op.runs
    ]

    def to_ranks(by_part: Sequence[Tensor]) -> list[Tensor]:
        none = by_part[0][:0]
        return [
            by_part[rank // tp].contiguous() if rank % tp == tp_rank else none
            for rank in range(group.size)
        ]

    def from_ranks(received: Sequence[Tensor]) -> list[Tensor]:
        return [received[part * tp + tp_rank] for part in range(parts)]

    first = op.runs[ep_rank].start
    incoming = from_ranks(group.all_to_all(to_ranks([rows_MD[pick] for pick in picks])))
    asked = from_ranks(group.all_to_all(to_ranks([experts_M[pick] for pick in picks])))
    asked_M = torch.cat(asked)
    if tp_rank == 0:
        loads_X += torch.bincount(asked_M, minlength=len(loads_X)).to(loads_X.device)
    given_MD, own_M = torch.cat(incoming), asked_M - first
    if experts is None:
        out_MD = experts_reference(given_MD, own_M, op.gate_up_ND, op.down_DN)
    else:
        out_MD = experts(given_MD, own_M)
    lengths = [len(each) for each in incoming]
    returned = from_ranks(group.all_to_all(to_ranks(out_MD.split(lengths))))
    back_MD = torch.empty((len(rows_MD), x_TD.shape[1]), dtype=torch.float32, device=x_TD.device)
    for pick, part in zip(picks, returned, strict=True):
        back_MD[pick] = part
    padded_TD = back_MD.new_zeros((share, x_TD.shape[1]))
    padded_TD[: len(mine_TD)] = combine_reference(
        back_MD.view(len(mine_TD), op.top_k, x_TD.shape[1]), routing.weights_TK
    )
    gathered = group.all_gather(padded_TD)
    sums = [_sum(gathered[part * tp : (part + 1) * tp]) for part in range(parts)]
    return torch.cat(sums)[: len(x_TD)]


def _sum(shares: Sequence[Tensor]) -> Tensor:
    total, *others = shares
    for other in others:
        total = total + other
    return total
