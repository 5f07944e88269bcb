"""`fabric bench tiers`, here over a clock that only costs move."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fabric.bench import tiers
from fabric.core.engine.engine import Engine
from fabric.core.request import Request, TokenChunk
from fabric.sim.costs import DEMO_CPU
from fabric.sim.worker import SyntheticWorker

SLEPT_NS = 1_000_000


@dataclass
class Machine:
    """A real engine; steps take what the table of a CPU says."""

    engine: Engine = field(
        default_factory=lambda: Engine(replace(DEMO_CPU.measured_engine(), max_sequences=8))
    )
    now: int = 0
    worker: SyntheticWorker = field(default_factory=lambda: SyntheticWorker(DEMO_CPU.costs, {}, 0))

    def add(self, request: Request) -> None:
        self.engine.add(request, self.now)

    def step(self) -> list[TokenChunk]:
        plan = self.engine.schedule(self.now)
        assert plan is not None
        result = self.worker.execute(plan)
        self.now += self.worker.step_ns
        return self.engine.commit(plan, result, self.now)

    def sleep(self, _: float) -> None:
        self.now += SLEPT_NS


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    clock = SimpleNamespace(
        time_ns=lambda: machine.now,
        perf_counter=lambda: machine.now / 1e9,
        sleep=machine.sleep,
    )
    monkeypatch.setattr(tiers, "time", clock)
    return machine


def test_no_run_finds_what_another_has_computed(machine: Machine, tmp_path: Path) -> None:
    file = tmp_path / "tiers.json"
    tiers.run(["--seconds", "8", "--json", str(file)], lambda _: machine)
    seen = machine.engine.snapshot("", machine.now)
    assert seen.prefix_queries_total > 0
    assert seen.prefix_hits_total == 0
    alone, by_tiers, one_tier = json.loads(file.read_text())["runs"]
    assert alone["requests"] == by_tiers["requests"] == one_tier["requests"] > 0
    assert by_tiers["ttft_ms_p99"] < one_tier["ttft_ms_p99"]
