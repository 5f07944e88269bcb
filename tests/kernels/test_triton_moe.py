"""Products of experts, in the interpreter: against float64, with every kind of routing."""

from __future__ import annotations

import pytest
import torch
from kit.guarded import Guarded

from fabric.kernels.launch import Launch
from fabric.kernels.moe_gemm import moe_gemm, moe_gemm_reference, schedule_experts

LAUNCH = Launch(sizes=(("BLOCK_M", 16), ("BLOCK_N", 32), ("BLOCK_K", 64)))


def routing(kind: str, tokens: int, chosen: int, experts: int) -> torch.Tensor:
    if kind == "one expert takes all":
        return torch.full((tokens, chosen), experts - 1)
    generator = torch.Generator().manual_seed(tokens)
    return torch.stack(
        [torch.randperm(experts, generator=generator)[:chosen] for _ in range(tokens)]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("kind", "tokens", "chosen", "experts"),
    [("any", 1, 2, 8), ("any", 33, 2, 5), ("any", 7, 1, 3), ("one expert takes all", 20, 2, 4)],
)
def test_both_products_of_a_layer(
    kind: str, tokens: int, chosen: int, experts: int, dtype: torch.dtype
) -> None:
    memory = Guarded()
    generator = torch.Generator().manual_seed(0)
    hidden, outputs = 72, 80
    x = memory.copy(torch.randn(tokens, hidden, generator=generator).to(dtype))
    up = memory.copy(torch.randn(experts, outputs, hidden, generator=generator).to(dtype))
    down = memory.copy(torch.randn(experts, hidden, outputs, generator=generator).to(dtype))
    shares = memory.copy(torch.rand(tokens * chosen, generator=generator))
    experts_TC = routing(kind, tokens, chosen, experts)
    schedule = schedule_experts(experts_TC, experts, 16)
    first = memory.empty((tokens * chosen, outputs), dtype)
    moe_gemm(x, up, schedule, out_AN=first, launch=LAUNCH)
    second = memory.empty((tokens * chosen, hidden), dtype)
    moe_gemm(first, down, schedule, out_AN=second, routing_A=shares, launch=LAUNCH)
    memory.check()
    flat = experts_TC.reshape(-1)
    wide = x.repeat_interleave(chosen, dim=0)
    for got, a, weight, share in ((first, wide, up, None), (second, first, down, shares)):
        scale = 1.0 if share is None else share.double()[:, None]
        exact = torch.einsum("ak,ank->an", a.double(), weight[flat].double()) * scale
        terms = torch.einsum("ak,ank->an", a.double().abs(), weight[flat].double().abs())
        # K float32 sums, and the rounding of the result.
        roundoff = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-24
        allowed = (a.shape[1] + 2) * 2.0**-24 * terms + roundoff * exact.abs()
        assert ((got.double() - exact).abs() <= allowed).all()
        reference = moe_gemm_reference(a, weight, flat, share)
        assert ((reference.double() - exact).abs() <= allowed).all()


def test_every_pair_has_one_place_in_a_tile_of_its_expert() -> None:
    for tokens, chosen, experts in ((1, 1, 1), (40, 3, 6), (5, 2, 64)):
        experts_TC = routing("any", tokens, chosen, experts)
        schedule = schedule_experts(experts_TC, experts, 16)
        places = schedule.pairs_S.view(-1, 16)
        flat = experts_TC.reshape(-1)
        assert sorted(places[places < len(flat)].tolist()) == list(range(len(flat)))
        for row, expert in zip(places, schedule.experts_U.tolist(), strict=True):
            held = row[row < len(flat)]
            assert (flat[held] == expert).all()
            assert expert < experts or len(held) == 0
            assert torch.equal(held, held.sort().values)


def test_a_schedule_for_other_tiles_is_refused() -> None:
    schedule = schedule_experts(torch.zeros(4, 1, dtype=torch.long), 2, 32)
    with pytest.raises(ValueError, match="schedule"):
        moe_gemm(
            torch.zeros(4, 64),
            torch.zeros(2, 64, 64),
            schedule,
            out_AN=torch.zeros(4, 64),
            launch=LAUNCH,
        )
