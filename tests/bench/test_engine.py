"""`fabric bench engine` over a real engine and the scripted worker."""

from __future__ import annotations

import json
import socket
import sys
import time
from pathlib import Path

import pytest
import yaml
from kit import sse_server
from kit.scripted_worker import ScriptedWorker
from kit.sse_server import MODEL, SseServer, running

from fabric.bench import front, tiers
from fabric.bench.engine import Bench, closed_loop, decode_step_ms, run
from fabric.bench.load import Cell
from fabric.bench.server import Launch, Server, free_port
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


class Watched(Scripted):
    """Notes what it is asked, and what the server beside it had been asked before."""

    def __init__(self, beside: SseServer) -> None:
        super().__init__()
        self.beside = beside
        self.asked: list[tuple[tuple[int, ...], int]] = []
        self.server_had: list[int] = []

    def add(self, request: Request) -> None:
        assert self.beside.in_flight == 0, "both sides compute"
        self.asked.append((request.prompt, request.sampling.max_tokens))
        super().add(request)


class Up(Server):
    """A server that somebody else started and stops."""

    def __init__(self, port: int, log: Path) -> None:
        launch = Launch(
            name="kit", command=(), port=port, variables={}, log=log, ready_within_s=1.0
        )
        super().__init__(launch)
        self.model = MODEL

    def cpu_s(self) -> float:
        return time.process_time()


def test_both_sides_of_the_front_are_asked_the_same(tmp_path: Path) -> None:
    """Warm-up included, never both at once."""
    cells = [
        Cell(workload=SMALL, requests=6, seed=f"0/c-{level}", concurrency=level) for level in (3, 1)
    ]
    with running() as beside:
        server, subject = Up(beside.port, tmp_path / "log"), Watched(beside)
        for cell in cells:
            ours = front.in_process(subject, cell)
            assert ours.tokens_per_s > 0 < ours.ttft_ms_p50
            theirs = front.through_front(server, cell)
            assert theirs.tokens_per_s > 0 < theirs.ttft_ms_p50
            assert theirs.wrong == 0
        sent = [(tuple(body["prompt"]), body["max_tokens"]) for body in beside.requests]
    assert sorted(sent) == sorted(subject.asked)
    assert len(set(subject.asked)) == (3 + 6) + (1 + 6)


@pytest.mark.parametrize("front_begins", [False, True])
def test_the_server_of_the_front_is_up_for_its_turn_only(
    tmp_path: Path, *, front_begins: bool
) -> None:
    port = free_port()
    launch = Launch(
        name="kit",
        command=(sys.executable, sse_server.__file__, str(port)),
        port=port,
        variables={},
        log=tmp_path / "log",
        ready_within_s=20.0,
    )

    class Alone(Scripted):
        def add(self, request: Request) -> None:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
            assert (tmp_path / "log").exists() == front_begins
            super().add(request)

    cell = Cell(workload=SMALL, requests=3, seed="0", concurrency=2)
    (found,) = front.take_turns(Alone(), launch, [cell], front_begins=front_begins)
    assert (found.name, found.concurrency, found.front.wrong) == ("small", 2, 0)
    assert found.share > 0


def pair(inside: float, front_: float, *, level: int = 32, wrong: int = 0) -> front.Pair:
    """Both figures of a side are the same number."""
    return front.Pair(
        name="small",
        concurrency=level,
        inside=front.Figures(tokens_per_s=inside, ttft_ms_p50=inside, others=0.0),
        front=front.Figures(tokens_per_s=front_, ttft_ms_p50=front_, others=0.0, wrong=wrong),
        others=0.0,
    )


@pytest.mark.parametrize(
    ("pairs", "found"),
    [
        ([pair(100, 92)], [("92.0%", True), ("0 were not", True)]),
        ([pair(100, 91.9)], [("91.9%", False), ("0 were not", True)]),
        ([pair(100, 95, wrong=2)], [("95.0%", True), ("2 were not", False)]),
        ([pair(30, 35, level=1)], [("+5.0 ms", True), ("0 were not", True)]),
        ([pair(30, 35.1, level=1)], [("+5.1 ms", False), ("0 were not", True)]),
        # A machine at half its speed in the second round: each pair's own ratio counts.
        (
            [pair(100, 95), pair(50, 47), pair(100, 90)],
            [("94.0%", True), ("0 were not", True)],
        ),
    ],
)
def test_the_targets_of_the_front(pairs: list[front.Pair], found: list[tuple[str, bool]]) -> None:
    assert [(text, met) for _, text, met in front.verdicts(pairs)] == found


def test_rounds_of_the_front_share_no_prompt() -> None:
    whole, quick = (front.parser().parse_args(words) for words in ([], ["--quick"]))
    seeds = {cell.seed for number in range(3) for cell in front.cells(number, whole)}
    assert len(seeds) == 3 * 2  # chat and decode at c=32 differ by name
    assert [(cell.workload.name, cell.load) for cell in front.cells(0, quick)] == [
        ("chat", "c=32"),
        ("decode", "c=32"),
        ("first token", "c=1"),
    ]
    pairs = zip(front.cells(0, quick), front.cells(0, whole), strict=True)
    assert all(2 * short.requests == long.requests for short, long in pairs)


def test_the_server_behind_the_front_gets_the_same_pools(tmp_path: Path) -> None:
    launch = front.serve(tmp_path / "a", {"device_bytes": 1 << 30, "host_bytes": 0})
    file = launch.command[launch.command.index("--config") + 1]
    assert yaml.safe_load(Path(file).read_text()) == {
        "kv": {"device_bytes": 1 << 30, "host_bytes": 0}
    }
    assert str(launch.port) in launch.command
