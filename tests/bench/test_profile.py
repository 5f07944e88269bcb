"""`fabric profile` finds what steps cost: here in a machine whose costs are known."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from fabric.bench import profile, step_table
from fabric.core.configs import EngineConfig
from fabric.core.engine.engine import Engine
from fabric.core.engine.plan import Sample, StepResult
from fabric.core.request import Request, TokenChunk

STEP, TOKEN, CONTEXT, PAIR = 3_000_000, 40_000, 900, 7


@dataclass
class Machine:
    """A real engine over a clock that only costs move: what is measured is what it takes."""

    now: int = 0
    engine: Engine = field(
        default_factory=lambda: Engine(
            EngineConfig(num_blocks=2000, num_host_blocks=10, context_limit=4096)
        )
    )

    def add(self, request: Request) -> None:
        self.engine.add(request, self.now)

    def step(self) -> list[TokenChunk]:
        plan = self.engine.schedule(self.now)
        assert plan is not None
        self.now += STEP
        for one in plan.steps:
            end = one.start + one.count
            self.now += TOKEN * one.count + CONTEXT * end
            if one.count > 1:
                self.now += PAIR * (one.count * (one.start + end + 1) // 2)
        samples = tuple(Sample(token=5 if one.samples else None) for one in plan.steps)
        return self.engine.commit(plan, StepResult(plan_id=plan.plan_id, samples=samples), self.now)

    def weight_bytes(self) -> int:
        return 1

    @property
    def worker(self) -> SimpleNamespace:
        memory = SimpleNamespace(kv_pool_bytes=2000 * 16 * 23_040)
        return SimpleNamespace(memory=lambda: memory)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(step_table.time, "perf_counter_ns", lambda: machine.now)
    return machine


def test_it_finds_the_costs_that_are_there(machine: Machine) -> None:
    found = step_table.measure(machine)
    assert found.ns_per_context == pytest.approx(CONTEXT, rel=0.05)
    assert found.ns_per_pair == pytest.approx(PAIR, rel=0.05)
    for tokens, ns in found.table:
        assert ns == pytest.approx(STEP + TOKEN * tokens, rel=0.08), tokens
    assert list(found.table) == sorted(found.table)


def test_the_file_is_one_that_simulate_reads(machine: Machine, tmp_path: Path) -> None:
    from fabric.sim.command import main
    from fabric.sim.cost_file import read_costs

    file = tmp_path / "costs.json"
    assert profile.run(["--output", str(file)], lambda _: machine) == 0
    read = read_costs(file)
    with pytest.raises(ValueError, match="--front"):
        profile.read(file)
    assert (read.engine.num_blocks, read.kv_bytes) == (2000, 23_040)
    assert main(["--costs", str(file), "--seconds", "3"]) == 0
    record = json.loads(file.read_text())
    del record["costs"]["table"][1:]
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="two rows"):
        read_costs(file)
    file.write_text("{}")
    assert main(["--costs", str(file)]) == 2
