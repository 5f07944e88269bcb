"""A file of `fabric serve` as a simulation: every setting reaches the part that it is for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fabric.config import parse_config
from fabric.core.tiers import BUILT_IN
from fabric.sim.command import main
from fabric.sim.costs import DEMO_CPU, profile
from fabric.sim.deployment import deployment_of
from fabric.sim.records import Timeline
from fabric.sim.summary import summarize, violation
from fabric.workload import Arrivals, Lengths, Workload, generate
from fabric.workload.replay import Replay, replay

DATA = Path(__file__).parent.parent / "data"
AZURE = DATA / "azure2023_conv_300.csv"
TIERS = [
    {"name": tier.name, "ttft_ms": 100 + index, "tpot_ms": 50}
    for index, tier in enumerate(BUILT_IN)
]


def test_two_runs_are_not_one_journal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--workload", "chat", "--requests", "3", "--rate", "2"]
    words += ["--journal", str(tmp_path / "journal")]
    assert main(words) == 0
    assert main(words) == 2
    assert "holds another run's journal" in capsys.readouterr().err


def test_settings_reach_their_parts() -> None:
    data = {
        "engine": {"max_sequences": 7, "step_tokens": 99, "chunk_tokens": 33, "patience_s": 2.5},
        "kv": {"block_size": 32, "prefix_cache": False, "host_bytes": 0},
        "admission": {"max_queued_requests": 3},
        "router": {"policy": "affinity"},
        "server": {"ingress_replicas": 2},
        "autoscaling": {"min_replicas": 0, "max_replicas": 5},
        "tiers": TIERS,
        "tenants": [{"name": "acme", "max_concurrent": 2}],
        "slo": {"objective": 0.9, "ladder": [{"kind": "shed", "tier": "batch"}]},
    }
    found = deployment_of(parse_config(data), DEMO_CPU, "mine")
    plan, engine = found.plan, found.plan.profile.engine
    assert (engine.max_sequences, engine.step_tokens, engine.chunk_tokens) == (7, 99, 33)
    assert (engine.block_size, engine.num_blocks, engine.num_host_blocks) == (32, 1450, 0)
    assert not engine.prefix_cache
    assert engine.patience_ns == 2_500_000_000
    assert plan.admission.max_queued_requests == 3
    assert plan.admission.tenants[0].max_concurrent == 2
    assert plan.router is not None
    assert (plan.router.policy, plan.router.headroom_tokens) == ("affinity", 198)
    assert plan.dispatchers == 2
    assert plan.autoscaler is not None
    assert (plan.replicas, plan.autoscaler.max_replicas) == (1, 5)
    assert engine.tiers == plan.admission.tiers == plan.router.tiers
    assert [tier.ttft_ms for tier in engine.tiers] == [100, 101, 102]
    assert (found.objective, found.degrade.rungs[0].tier, found.name) == (0.9, "batch", "mine")


def test_a_files_pool_counts_in_bytes() -> None:
    found = deployment_of(parse_config({"kv": {"device_bytes": 100 << 20}}), DEMO_CPU)
    assert found.plan.profile.engine.num_blocks == (100 << 20) // (16 * DEMO_CPU.kv_bytes)


def test_the_autoscaler_hears_what_burns() -> None:
    """Half of the load arrives where no replica can meet its targets: that alone asks for more."""
    data = {"autoscaling": {"max_replicas": 4}, "tiers": TIERS}
    shape = Workload(name="burn", prompt=Lengths(median=64), output=Lengths(median=16))
    deployment = deployment_of(parse_config(data), DEMO_CPU)
    requests = generate(shape, count=90, seed="0", arrivals=Arrivals(rate_per_s=0.5))
    simulation = deployment.build(requests)
    outcome = simulation.run()
    assert simulation.scaling is not None
    assert simulation.scaling.burn is not None
    assert any("error budget burns" in one.why for one in outcome.decisions)


def test_limits_hold_over_several_fronts(tmp_path: Path) -> None:
    """Two fronts and a tenant that may run two requests: leases split them, all are served."""
    data = {
        "server": {"ingress_replicas": 2},
        "tenants": [{"name": "acme", "max_concurrent": 2}],
    }
    text = [
        {"arrival_s": 0.1 * index, "prompt_tokens": 20, "output_tokens": 5, "tenant": "acme"}
        for index in range(12)
    ]
    found = deployment_of(parse_config(data), profile("H100:llama-8b"))
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in text))
    outcome = found.run(replay(path, Replay()))
    assert all(one.finish is not None for one in outcome.timelines)
    edges = [(one.routed or 0, 1) for one in outcome.timelines]
    edges += [(one.last or 0, -1) for one in outcome.timelines]
    running = most = 0
    for _, change in sorted(edges):
        running += change
        most = max(most, running)
    assert most <= 2


def test_a_replayed_trace_is_counted_whole(tmp_path: Path) -> None:
    file, config = tmp_path / "figures.json", tmp_path / "config.yaml"
    config.write_text("replicas: 2\n")
    words = ["--trace", str(AZURE), "--requests", "60", "--profile", "H100:llama-8b"]
    words += ["--config", str(config), "--compare", str(config), "--json", str(file)]
    assert main(words) == 0
    first, second = json.loads(file.read_text())
    assert first == second
    assert first["requests"] == 60
    assert sum(tier["finished"] + tier["refused"] for tier in first["tiers"]) == 60
    assert first["gpu_hours"] == first["replica_hours"] > 0
    met = first["requests"] - sum(first["violations"].values())
    assert met / 60 == pytest.approx(first["attained"])


def test_every_missed_target_has_a_cause() -> None:
    config = parse_config({"replicas": 1, "admission": {"max_queued_requests": 20}})
    found = deployment_of(config, profile("L4:llama-8b"))
    outcome = found.run(replay(AZURE, Replay(rate_per_s=20.0, limit=150)))
    summary = summarize(outcome, found.plan.admission.tiers, found.plan.profile)
    tiers = {tier.name: tier for tier in found.plan.admission.tiers}

    def cause(one: Timeline) -> str | None:
        return violation(one, tiers[one.request.tier])

    causes = [cause(one) for one in outcome.timelines]
    found_causes = {one for one in causes if one is not None}
    assert "TTFT: waited for a place" in found_causes
    assert any(one.startswith("refused: N ") for one in found_causes), "figures tell them apart"
    assert sum(summary.violations.values()) == sum(one is not None for one in causes)


@pytest.mark.parametrize(
    "words",
    [
        ["--trace", "nowhere.csv"],
        ["--compare", "x.yaml"],
        ["--profile", "H100:gpt-9"],
        ["no-such-scenario"],
    ],
)
def test_wrong_words_are_one_message(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("fabric simulate: ")
