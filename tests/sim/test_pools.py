"""Prompts in one pool, outputs in another: the real Pairing, Handoff and both engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.cli import main
from fabric.config import load_config, parse_config
from fabric.core.configs import PairingConfig
from fabric.core.errors import ConfigError
from fabric.core.journal import Recorder
from fabric.core.request import Request
from fabric.journal.writer import Place, Writer
from fabric.sim.checks import Witness, trial
from fabric.sim.clock import NS_PER_MS, NS_PER_S
from fabric.sim.costs import DEMO_CPU, KvLink
from fabric.sim.deployment import deployment_of
from fabric.sim.faults import LOST_NS, Fault, FaultKind, storm
from fabric.sim.scenarios.storms import SHAPE, SMALL
from fabric.sim.simulation import Plan, PrefillPool, Simulation
from fabric.workload import Arrivals, generate

ROOT = Path(__file__).parent.parent.parent
LINKED = replace(SMALL, kv_bytes=1000, kv_link=KvLink(bytes_per_s=1e7, latency_ns=2 * NS_PER_MS))
# A little short of memory, so that room is refused, too.
PREFILL = replace(LINKED, engine=replace(LINKED.engine, chunk_tokens=32, group_tokens=32))
PLAN = Plan(
    profile=LINKED,
    replicas=2,
    dispatchers=2,
    cold_start_ns=NS_PER_S,
    check_every=400,
    prefill=PrefillPool(replicas=2, profile=PREFILL, pairing=PairingConfig(min_prompt_tokens=32)),
)
KINDS = [FaultKind.CRASH, FaultKind.CUT_LINK, FaultKind.SLOW_LINK, FaultKind.STALE]
FAULTS = st.lists(
    st.builds(
        Fault,
        kind=st.sampled_from(KINDS),
        at=st.integers(0, 4 * NS_PER_S),
        replica=st.integers(0, 3),
        dispatcher=st.integers(0, 1),
        lasts_ns=st.sampled_from([50 * NS_PER_MS, NS_PER_S, 2 * LOST_NS]),
    ),
    max_size=6,
)


def requests(count: int = 40, rate: float = 15.0) -> list[Request]:
    return list(generate(SHAPE, count=count, seed="pools", arrivals=Arrivals(rate_per_s=rate)))


def test_a_calm_day_hands_prompts_over_and_leaves_nothing_on_either_side() -> None:
    found = trial(PLAN, requests(), ())
    assert found.ended
    assert found.findings == ()
    handed = found.outcome.handovers
    assert handed["sampled"] > 15
    assert handed["bytes"] > 15 * 32 * LINKED.kv_bytes
    assert handed["lost_groups"] == 0


@given(FAULTS)
@settings(max_examples=5, deadline=None)
def test_whatever_breaks_nothing_is_lost_between_pools(faults: list[Fault]) -> None:
    found = trial(PLAN, requests(), faults)
    assert found.ended
    assert found.findings == ()


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(40))
def test_storms_over_pools(seed: int) -> None:
    found = trial(PLAN, requests(120), storm(f"pools/{seed}", 10, 10 * NS_PER_S))
    assert found.ended
    assert found.findings == ()


def test_kv_that_is_lost_costs_time_and_no_token() -> None:
    cut = [
        Fault(kind=FaultKind.CUT_LINK, at=NS_PER_S, replica=index, lasts_ns=2 * NS_PER_S)
        for index in range(4)
    ]
    found = trial(PLAN, requests(), cut)
    assert found.findings == ()
    assert found.outcome.handovers["lost_groups"] > 0


def test_a_planted_reservation_that_nobody_takes_makes_the_checker_scream() -> None:
    simulation = Simulation(PLAN, requests(10))
    witness = Witness(simulation)

    def reserve(simulation: Simulation) -> None:
        one = replace(requests(1)[0], request_id="nobody's")
        simulation.fleet.replicas["r003"].engine.reserve(one, 1)

    simulation.clock.at(NS_PER_S // 2, reserve, simulation)
    simulation.run(40 * NS_PER_S)
    assert any("blocks are not free" in one.what for one in witness.findings())


def test_a_faster_link_brings_the_second_token_sooner() -> None:
    def gap(bytes_per_s: float) -> float:
        link = KvLink(bytes_per_s=bytes_per_s, latency_ns=0)
        assert PLAN.prefill is not None
        plan = replace(
            PLAN,
            profile=replace(LINKED, kv_link=link),
            prefill=replace(PLAN.prefill, profile=replace(PREFILL, kv_link=link)),
        )
        one = replace(requests(1)[0], prompt=tuple(range(160)))
        (timeline,) = Simulation(plan, [one]).run().timelines
        return timeline.tpot_ns or 0.0

    slow_ns = gap(1e6) * (requests(1)[0].sampling.max_tokens - 1)
    fast_ns = gap(1e12) * (requests(1)[0].sampling.max_tokens - 1)
    assert slow_ns - fast_ns > 32 * LINKED.kv_bytes * 1000 * 0.5  # at least half of a chunk's time


def test_both_engines_journals_replay_bit_for_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(
        folder=tmp_path, stream="simulation", name="s", run="0", file_bytes=1 << 14, files=99
    )
    writer = Writer(place, background=False)
    simulation = Simulation(PLAN, requests(24))
    simulation.watch(Recorder(writer))
    assert simulation.run().handovers["sampled"] > 5
    simulation.check()
    writer.close()
    assert len(list(tmp_path.iterdir())) > 2, "never rotated"
    assert main(["replay", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "every outcome is the same" in said


def test_a_configuration_with_pools_is_simulated(tmp_path: Path) -> None:
    config = load_config(ROOT / "deployments" / "disaggregated.yaml")
    deployment = deployment_of(config, DEMO_CPU)
    assert deployment.plan.prefill is not None
    assert deployment.plan.prefill.profile.engine.chunk_tokens == 256
    assert (deployment.plan.prefill.replicas, deployment.plan.replicas) == (1, 1)
    different = parse_config({"pools": {"prefill": {"shard": {"tp": 2}}}})
    with pytest.raises(ConfigError, match="shards must be alike"):
        deployment_of(different, DEMO_CPU)


@pytest.fixture
def words() -> Callable[..., list[str]]:
    def made(*more: str) -> list[str]:
        config = str(ROOT / "deployments" / "disaggregated.yaml")
        return ["simulate", "--config", config, "--seconds", "20", *more]

    return made


def test_the_command_says_what_was_handed_over(
    words: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words()) == 0
    assert "prompts went on elsewhere" in capsys.readouterr().out
    assert main(words("--replicas", "3")) == 2
    assert "--replicas" in capsys.readouterr().err
