"""Drawing in Triton, in the interpreter, against the float64 reference: noise, filters, ties."""

from __future__ import annotations

import random

import pytest
import torch
from kit.guarded import Guarded

from fabric.kernels.draw import TritonSampling, draw_tokens
from fabric.kernels.launch import Launch
from fabric.kernels.sampling import Draw, NoFiniteLogit, TorchSampling

LAUNCH = Launch(sizes=(("BLOCK", 512),))


def drawn(logits: torch.Tensor, draws: list[Draw]) -> list[int]:
    memory = Guarded()
    wide = memory.empty((len(logits), logits.shape[1] + 5), torch.float32)
    row = wide[:, : logits.shape[1]]
    row.copy_(logits)
    out = memory.empty((len(draws),), torch.int32)
    draw_tokens(row, draws, out=out, launch=LAUNCH)
    memory.check()
    assert torch.equal(row.nan_to_num(), logits.nan_to_num())
    tokens: list[int] = out.tolist()
    return tokens


def random_draws(count: int, seed: int) -> list[Draw]:
    rng = random.Random(seed)
    return [
        Draw(
            row=rng.randrange(3),
            seed=rng.getrandbits(64),
            choice=rng.randrange(4),
            position=rng.randrange(1 << 20),
            temperature=rng.choice([0.0, 0.3, 1.0, 2.0]),
            top_p=rng.choice([1.0, 0.9, 0.5, 0.1]),
            min_p=rng.choice([0.0, 0.0, 0.05, 1.0]),
            top_k=rng.choice([0, 1, 2, 40]),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize(("vocab", "spread"), [(7, 2.0), (300, 3.0), (600, 0.3)])
def test_draws_are_those_of_the_reference(vocab: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(3, vocab, generator=generator) * spread
    draws = random_draws(5, seed=vocab)
    # A border between two tokens lies within 1e-5 of one of 5 noises once in thousands of runs,
    # and the seeds are fixed: equality can be asked for.
    assert drawn(logits, draws) == TorchSampling().draw(logits, draws)


def test_ties_rank_by_id() -> None:
    """Few distinct logits: the cuts of top_k and top_p fall among equals."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randint(-2, 2, (3, 300), generator=generator).float()
    logits[0, 7], logits[1, 3], logits[2] = torch.nan, -torch.inf, 0.0
    logits[2, 5] = -0.0
    draws = random_draws(6, seed=5)
    assert drawn(logits, draws) == TorchSampling().draw(logits, draws)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(8))
def test_many_draws_are_those_of_the_reference(seed: int) -> None:
    """Half of the logits on a coarse grid, so that ties are everywhere."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 1100, generator=generator) * (1 + seed)
    logits = torch.where(torch.rand(3, 1100, generator=generator) < 0.5, logits.round(), logits)
    draws = random_draws(40, seed=100 + seed)
    assert drawn(logits, draws) == TorchSampling().draw(logits, draws)


def test_a_row_without_a_finite_logit_is_told() -> None:
    logits = torch.zeros(2, 9)
    logits[1] = torch.nan
    draws = random_draws(1, seed=0)
    sampling = TritonSampling(LAUNCH)
    assert sampling.draw(logits, [draws[0]._replace(row=0)])
    with pytest.raises(NoFiniteLogit, match="row 1"):
        sampling.draw(logits, [draws[0]._replace(row=1)])
