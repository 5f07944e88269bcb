"""Output lengths: the 80 % quantile covers 75 to 85 % of a real trace, and of a changing world."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.source import ROOT

from fabric.core.request import Request, SamplingParams
from fabric.core.traffic.lengths import ENOUGH, LEVEL, MAX_NODES, STEP, Lengths

SAMPLE = ROOT / "tests" / "data" / "azure2023_sample.csv"
Seen = tuple[str, bool]  # tenant, covered


def ask(prompt: int = 10, tenant: str = "", *, most: int = 4096, **fields: str) -> Request:
    return Request(
        request_id="r",
        prompt=(1,) * prompt,
        sampling=SamplingParams(max_tokens=most),
        arrival=0,
        tenant=tenant,
        **fields,  # type: ignore[arg-type]
    )


def covered(lengths: Lengths, stream: Iterable[tuple[Request, int]]) -> Iterator[Seen]:
    """For each request in its turn: did its output stay within the estimate?"""
    for request, tokens in stream:
        yield request.tenant, tokens <= lengths.estimate(request).high
        lengths.observe(request, tokens)


def share(seen: list[Seen], tenant: str | None = None) -> float:
    mine = [held for name, held in seen if tenant in (None, name)]
    return sum(mine) / len(mine)


def trace() -> Iterator[tuple[Request, int]]:
    for line in SAMPLE.read_text(encoding="utf-8").splitlines()[3:]:
        service, context, generated = line.split(",")
        yield ask(int(context), service), int(generated)


def test_the_quantile_is_calibrated_on_the_azure_trace() -> None:
    """Of both services, and of each third of the hour: calibrated all along, not on average."""
    lengths = Lengths()
    seen = list(covered(lengths, trace()))
    lengths.check()
    assert len(seen) > 3_000
    for tenant in (None, "code", "conv"):
        assert 0.75 <= share(seen, tenant) <= 0.85, tenant
    third = len(seen) // 3
    for begin in range(0, 3 * third, third):
        assert 0.75 <= share(seen[begin : begin + third]) <= 0.85


def test_it_tells_services_and_prompts_apart() -> None:
    lengths = Lengths()
    for request, tokens in trace():
        lengths.observe(request, tokens)
    code, talk = lengths.estimate(ask(1500, "code")), lengths.estimate(ask(1500, "conv"))
    assert code.depth == talk.depth == 0
    assert code.high < 60 < talk.high
    assert code.likely < talk.likely


def test_thin_data_falls_back_upward() -> None:
    lengths = Lengths()
    assert lengths.estimate(ask(most=100)).depth == 4
    assert lengths.estimate(ask(most=100)).high == 100, "unknown: all that it may take"
    for _ in range(ENOUGH):
        lengths.observe(ask(tenant="a"), 7)
    assert lengths.estimate(ask(tenant="a")).depth == 0
    assert lengths.estimate(ask(tenant="b")).depth == 1
    assert lengths.estimate(ask(500, tenant="b")).depth == 2
    assert lengths.estimate(ask(500, adapter="x")).depth == 3
    assert lengths.estimate(ask(500, adapter="x")).high == 7
    assert lengths.estimate(ask(500, most=5)).high == 5, "never more than max_tokens"


@pytest.mark.parametrize("seed", range(3))
def test_it_stays_calibrated_when_outputs_change(seed: int) -> None:
    """Ten times as long from one request to the next, and back: every miss moves the level."""
    dice = Random(seed)
    medians = [20] * 1500 + [200] * 1500 + [20] * 1500
    stream = [(ask(), max(1, int(m * dice.lognormvariate(0, 0.8)))) for m in medians]
    seen = list(covered(Lengths(), stream))
    assert 0.75 <= share(seen) <= 0.85
    assert 0.75 <= share(seen[2000:3000]) <= 0.85


@settings(max_examples=15)
@given(st.lists(st.integers(1, 500), min_size=ENOUGH + 200, max_size=ENOUGH + 400))
def test_whatever_comes_the_coverage_is_bounded(outputs: list[int]) -> None:
    """Adaptive conformal inference's own bound, while the level is not at its ends."""
    lengths = Lengths()
    seen = list(covered(lengths, ((ask(most=1000), tokens) for tokens in outputs)))[ENOUGH:]
    lengths.check()
    level = lengths._nodes[()].level
    if 0.0 < level < 1.0:
        assert share(seen) >= LEVEL - 2 / (STEP * len(seen))


def test_memory_is_bounded() -> None:
    lengths = Lengths()
    for number in range(2 * MAX_NODES):
        lengths.observe(ask(tenant=f"t{number}"), 5)
    lengths.check()
    assert lengths.estimate(ask(tenant="new")).depth == 1
