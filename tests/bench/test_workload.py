"""Workloads are seeded, keep their declared lengths, and share what they say they share."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.workload import (
    ORDINARY_TOKENS,
    SECOND_NS,
    WORKLOADS,
    Arrivals,
    Lengths,
    TierShare,
    Workload,
    generate,
    workload,
)

NAMES = [one.name for one in WORKLOADS]


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_requests_and_another_seed_others(name: str) -> None:
    first = list(generate(workload(name), count=5, seed="a"))
    assert first == list(generate(workload(name), count=5, seed="a"))
    other = list(generate(workload(name), count=5, seed="b"))
    assert all(x.prompt != y.prompt for x, y in zip(first, other, strict=True))


def test_a_request_is_the_same_however_many_follow_and_however_fast() -> None:
    shape = workload("mixed")
    few = list(generate(shape, count=4, seed="s", arrivals=Arrivals(rate_per_s=1)))
    many = list(generate(shape, count=9, seed="s", arrivals=Arrivals(rate_per_s=50)))
    contents = [[(one.prompt, one.sampling) for one in some] for some in (few, many)]
    assert contents[0] == contents[1][:4]
    assert [one.arrival for one in few] != [one.arrival for one in many[:4]]


@pytest.mark.parametrize(
    ("name", "prompt", "output"),
    [("chat", 128, 128), ("decode", 32, 256), ("prefill", 1024, 32), ("prefix", 1056, 64)],
)
def test_fixed_lengths_are_exact(name: str, prompt: int, output: int) -> None:
    for request in generate(workload(name), count=3, seed="s"):
        assert (len(request.prompt), request.sampling.max_tokens) == (prompt, output)
        assert request.sampling.ignore_eos
        assert request.sampling.temperature == 0
        assert set(request.prompt) <= set(ORDINARY_TOKENS)


def test_prefix_is_shared_and_the_rest_is_not() -> None:
    requests = list(generate(workload("prefix"), count=6, seed="s"))
    assert len({one.prompt[:1024] for one in requests}) == 1
    assert len({one.prompt[1024:] for one in requests}) == 6


def test_prefix_groups() -> None:
    shape = Workload(
        name="documents",
        prompt=Lengths(median=4),
        output=Lengths(median=1),
        prefix=16,
        prefix_groups=3,
    )
    heads = [one.prompt[:16] for one in generate(shape, count=60, seed="s")]
    assert len(set(heads)) == 3
    assert min(heads.count(head) for head in set(heads)) >= 8


def test_mixed_is_log_normal_within_its_bounds() -> None:
    shape = workload("mixed")
    requests = list(generate(shape, count=2_000, seed="s"))
    prompts = [len(one.prompt) for one in requests]
    outputs = [one.sampling.max_tokens for one in requests]
    assert statistics.median(prompts) == pytest.approx(256, rel=0.1)
    assert statistics.median(outputs) == pytest.approx(96, rel=0.1)
    unclipped = [math.log(n) for n in outputs if 8 < n < 384]
    assert statistics.pstdev(unclipped) == pytest.approx(0.7, rel=0.15)
    assert max(p + o for p, o in zip(prompts, outputs, strict=True)) <= shape.longest


@given(
    low=st.integers(1, 50),
    median=st.integers(50, 500),
    high=st.integers(500, 900),
    sigma=st.floats(0, 4),
    seed=st.text(max_size=5),
)
def test_lengths_stay_in_bounds(low: int, median: int, high: int, sigma: float, seed: str) -> None:
    lengths = Lengths(median=median, sigma=sigma, low=low, high=high)
    shape = Workload(name="x", prompt=lengths, output=lengths)
    for request in generate(shape, count=5, seed=seed):
        assert low <= len(request.prompt) <= high
        assert low <= request.sampling.max_tokens <= high


@pytest.mark.parametrize("variation", [0.0, 0.5, 1.0, 3.0])
def test_arrivals_have_their_rate_and_variation(variation: float) -> None:
    arrivals = Arrivals(rate_per_s=5, variation=variation)
    shape = Workload(name="x", prompt=Lengths(median=1), output=Lengths(median=1))
    times = [0, *(one.arrival for one in generate(shape, count=4_000, seed="s", arrivals=arrivals))]
    gaps = [(b - a) / SECOND_NS for a, b in itertools.pairwise(times)]
    assert min(gaps) >= 0
    mean = statistics.fmean(gaps)
    assert mean == pytest.approx(1 / 5, rel=0.15)
    assert statistics.pstdev(gaps) / mean == pytest.approx(variation, rel=0.15, abs=1e-6)


def test_tiers_come_by_weight() -> None:
    tiers = (TierShare(tier="interactive", weight=3), TierShare(tier="batch", weight=1))
    shape = Workload(name="x", prompt=Lengths(median=1), output=Lengths(median=1), tiers=tiers)
    got = [one.tier for one in generate(shape, count=2_000, seed="s")]
    assert got.count("batch") / len(got) == pytest.approx(0.25, abs=0.04)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no workload 'poetry'; there are chat, .*mixed"):
        workload("poetry")
    with pytest.raises(ValueError, match="low <= median"):
        Lengths(median=5, low=6)
    with pytest.raises(ValueError, match="positive rate"):
        Arrivals(rate_per_s=0)
    with pytest.raises(ValueError, match="tier"):
        Workload(name="x", prompt=Lengths(median=1), output=Lengths(median=1), tiers=())
