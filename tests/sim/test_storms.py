"""Storms and calms: outside checkers over drawn, kept and shrinkable fault schedules."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.core.request import Finish, Request, TokenChunk
from fabric.sim.checks import Finding, Witness, trial
from fabric.sim.clock import NS_PER_MS, NS_PER_S
from fabric.sim.faults import LOST_NS, Fault, FaultKind, Weather, storm
from fabric.sim.records import Timeline
from fabric.sim.replica import Stage
from fabric.sim.scenarios.storms import SHAPE, SMALL, weather
from fabric.sim.simulation import Plan, Simulation
from fabric.workload import Arrivals, generate

ROOT = Path(__file__).parent.parent.parent
KEPT = [
    line
    for line in (ROOT / "tests/data/storm_seeds.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]
PLAN = Plan(profile=SMALL, replicas=2, dispatchers=2, cold_start_ns=NS_PER_S, check_every=200)


def requests(count: int = 40, rate: float = 12.0) -> list[Request]:
    return list(generate(SHAPE, count=count, seed="0", arrivals=Arrivals(rate_per_s=rate)))


def fault(kind: FaultKind, at_ms: int, lasts_ms: int = 1000, replica: int = 0) -> Fault:
    return Fault(kind=kind, at=at_ms * NS_PER_MS, lasts_ns=lasts_ms * NS_PER_MS, replica=replica)


FAULTS = st.lists(
    st.builds(
        Fault,
        kind=st.sampled_from(list(FaultKind)),
        at=st.integers(0, 5 * NS_PER_S),
        replica=st.integers(0, 3),
        dispatcher=st.integers(0, 1),
        lasts_ns=st.sampled_from([0, 50 * NS_PER_MS, NS_PER_S, LOST_NS, 2 * LOST_NS]),
        factor=st.sampled_from([1.0, 3.0, 20.0]),
    ),
    max_size=8,
)


@given(FAULTS)
@settings(max_examples=15, deadline=None)
def test_whatever_breaks_nothing_is_lost(faults: list[Fault]) -> None:
    found = trial(PLAN, requests(), faults)
    assert found.ended
    assert found.findings == ()


@pytest.mark.nightly
@given(FAULTS)
@settings(max_examples=400, deadline=None)
def test_whatever_breaks_at_length(faults: list[Fault]) -> None:
    found = trial(PLAN, requests(), faults)
    assert found.ended
    assert found.findings == ()


@pytest.mark.parametrize("seed", KEPT)
def test_a_seed_that_once_failed(seed: str) -> None:
    assert weather(seed).findings == ()


def test_the_storm_of_this_commit() -> None:
    """A new one with every commit; its seed is in the message, to be kept if it fails."""
    told = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    seed = told.stdout.strip() or "no commit"
    found = weather(seed)
    assert found.ended, seed
    assert found.findings == (), f"keep {seed} in tests/data/storm_seeds.txt"


def test_a_storm_is_its_seed() -> None:
    assert storm("a", 5, NS_PER_S) == storm("a", 5, NS_PER_S) != storm("b", 5, NS_PER_S)
    one, other = weather("twice"), weather("twice")
    assert one.outcome.timelines == other.outcome.timelines


def test_a_crash_costs_a_pause_and_no_token() -> None:
    found = trial(PLAN, requests(), [fault(FaultKind.CRASH, 1500)])
    assert found.findings == ()
    assert found.resumed > 0
    assert all(one.finish is Finish.LENGTH for one in found.outcome.timelines)


def test_a_link_that_is_cut_for_long_is_given_up_and_a_short_cut_is_not() -> None:
    short = trial(PLAN, requests(), [fault(FaultKind.CUT_LINK, 1000, 2500)])
    long = trial(PLAN, requests(), [fault(FaultKind.CUT_LINK, 1000, 6000)])
    assert (short.findings, long.findings) == ((), ())
    assert short.resumed == 0
    assert long.resumed > 0


def test_a_straggler_and_old_news_are_slow_and_no_more() -> None:
    calm = trial(PLAN, requests(), [])
    for kind in (FaultKind.STRAGGLER, FaultKind.STALE, FaultKind.SLOW_LINK):
        found = trial(PLAN, requests(), [fault(kind, 500, 3000)])
        assert found.findings == ()
        assert found.resumed == 0
        assert [one.last for one in found.outcome.timelines] != [
            one.last for one in calm.outcome.timelines
        ], f"{kind}: it did nothing"


# Canaries: each plants one fault of the kind that a checker is there for.


def test_a_planted_leak_of_blocks_makes_the_checker_scream() -> None:
    def leak(simulation: Simulation) -> None:
        simulation.fleet.replicas["r000"].engine._scheduler.pool.allocate(1)

    assert any("blocks are not free" in one.what for one in planted(leak))


def test_a_planted_doubled_token_makes_the_checker_scream() -> None:
    def double(simulation: Simulation) -> None:
        dispatcher = simulation.dispatchers[0]
        (note,) = dispatcher.on_chunks

        def twice(timeline: Timeline, chunks: tuple[TokenChunk, ...]) -> None:
            note(timeline, chunks)
            if timeline.tokens == 3:
                note(timeline, chunks)

        dispatcher.on_chunks[:] = [twice]

    assert any("after" in one.what for one in planted(double))


def test_a_planted_wrong_token_makes_the_checker_scream() -> None:
    def change(simulation: Simulation) -> None:
        replica = simulation.fleet.replicas["r000"]
        for known in replica.worker._known.values():
            known.salt += 1

    assert any("wrong tokens" in one.what for one in planted(change))


def test_a_planted_forgotten_request_makes_the_checker_scream() -> None:
    def forget(simulation: Simulation) -> None:
        replica = simulation.fleet.replicas["r000"]
        replica.forget("d0")

    assert any("never answered" in one.what for one in planted(forget))


def planted(plant: Callable[[Simulation], None]) -> list[Finding]:
    """A second into a run something is done that must not happen."""
    simulation = Simulation(Plan(profile=SMALL, replicas=1), requests(20))
    Weather(simulation, ())
    witness = Witness(simulation)
    simulation.clock.at(NS_PER_S // 2, lambda: None)
    simulation.clock.at(NS_PER_S, plant, simulation)
    simulation.run(60 * NS_PER_S)
    assert simulation.fleet.replicas["r000"].stage is Stage.READY
    return witness.findings()
