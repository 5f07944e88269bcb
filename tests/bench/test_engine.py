"""`fabric bench engine` over a real engine and the scripted worker."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from kit.scripted_worker import ScriptedWorker

from fabric.bench import tiers
from fabric.bench.engine import Bench, closed_loop, decode_step_ms, run
from fabric.core.configs import EngineConfig
from fabric.core.engine.engine import Accepted, Engine
from fabric.core.request import Request, TokenChunk
from fabric.workload import Lengths, Workload

CONFIG = EngineConfig(num_blocks=512, context_limit=1024, max_sequences=8)
SMALL = Workload(name="small", prompt=Lengths(median=20), output=Lengths(median=5))


class Scripted:
    """Counts how many requests were ever under way at once."""

    def __init__(self) -> None:
        self.engine = Engine(CONFIG)
        self.worker = ScriptedWorker(CONFIG, vocab=32_000)
        self.running: set[str] = set()
        self.most = 0

    def add(self, request: Request) -> None:
        assert isinstance(self.engine.add(request, time.time_ns()), Accepted)
        self.running.add(request.request_id)
        self.most = max(self.most, len(self.running))

    def step(self) -> list[TokenChunk]:
        plan = self.engine.schedule(time.time_ns())
        assert plan is not None
        time.sleep(0.0002)
        chunks = self.engine.commit(plan, self.worker.execute(plan), time.time_ns())
        self.running -= {chunk.request_id for chunk in chunks if chunk.finish is not None}
        return chunks

    def weight_bytes(self) -> int:
        return 1_000_000


def test_a_closed_loop_keeps_its_concurrency() -> None:
    subject = Scripted()
    found = closed_loop(subject, SMALL, 4, "0")
    assert subject.most == 4
    assert found.output_tokens == 16 * 5
    assert 0 < found.ttft_ms_p50 < 1e3 * found.seconds
    assert not subject.engine.has_work


def test_a_decode_step() -> None:
    """At least what the worker sleeps, and nothing is left over."""
    subject = Scripted()
    assert decode_step_ms(subject) > 0.2
    assert not subject.engine.has_work


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench(
        load=Scripted,
        read_bytes_per_s=lambda: 1e10,
        plan_cost_s=lambda sequences, context: [0.001, sequences * 1e-5, context * 1e-5],
    )
    path = tmp_path / "engine.json"
    words = ["--concurrency", "2", "--json", str(path)]
    assert run(words, bench) == 0
    shown = capsys.readouterr().out
    assert "floor of 0.10 ms" in shown
    assert "256 sequences at context 2000: 2.56 ms" in shown
    record = json.loads(path.read_text())
    assert record["plan_ms"] == pytest.approx(2.56)
    assert record["chat c=2"]["tokens_per_s"] > 0


def test_interactive_beside_batch_is_measured(tmp_path: Path) -> None:
    """All three runs, every interactive request in each; nothing is left in the engine."""
    subject, file = Scripted(), tmp_path / "tiers.json"
    code = tiers.run(["--seconds", "0.5", "--json", str(file)], lambda _: subject)
    record = json.loads(file.read_text())
    assert [one["name"] for one in record["runs"]] == ["alone", "by tiers", "one tier"]
    alone, both, fifo = record["runs"]
    assert alone["requests"] == both["requests"] == fifo["requests"] > 0
    assert both["preempted"]["preemptions"] > 0 == alone["preempted"]["preemptions"]
    assert fifo["ttft_ms_p99"] > both["ttft_ms_p99"], "first come first served is as good"
    assert code == (0 if all(one["met"] for one in record["targets"]) else 1)
    assert not subject.engine.has_work
