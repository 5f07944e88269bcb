"""Alternation over real (small) servers, and ratios with known answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from kit import sse_server

from fabric.bench.comparison import Plan, Visit, alternate, figures, ratio_rows
from fabric.bench.load import Cell
from fabric.bench.peers import Setting, launch
from fabric.bench.report import Measured, align, machine, markdown, measured_table, write_json
from fabric.bench.server import Launch, free_port
from fabric.bench.stats import Sample, Targets, summarize
from fabric.workload import workload


def cell(name: str = "chat", concurrency: int = 1) -> Cell:
    return Cell(workload=workload(name), requests=2, seed="s", concurrency=concurrency)


def measured(tokens: int, first_ms: int, *, error: str | None = None, wanted: int = 0) -> Measured:
    """One request with `tokens` tokens in one second, the first after `first_ms`."""
    sample = Sample(
        tier="standard",
        wanted_tokens=wanted or tokens,
        prompt_tokens=1,
        cached_tokens=0,
        output_tokens=tokens,
        due=0,
        sent=0,
        times=(first_ms * 1_000_000, 1_000_000_000),
    )
    samples = [sample]
    if error:
        samples.append(
            Sample(
                tier="standard",
                wanted_tokens=1,
                prompt_tokens=1,
                cached_tokens=0,
                output_tokens=0,
                due=0,
                sent=0,
                times=(),
                error=error,
            )
        )
    return Measured(cell=cell(), summary=summarize(samples, Targets(ttft_ms=50)), others=0.5)


def visit(peer: str, number: int, one: Measured) -> Visit:
    return Visit(peer=peer, round=number, ready_after_s=1.0, memory_bytes=1, cells=(one,))


def test_ratios_are_medians_over_the_rounds() -> None:
    visits = [
        visit("fabric", 0, measured(300, 10)),
        visit("vllm", 0, measured(100, 40)),
        visit("vllm", 1, measured(200, 60)),
        visit("fabric", 1, measured(300, 10)),
    ]
    heads, row = ratio_rows(visits)
    assert heads == [
        *("workload", "load", "fabric tok/s", "vllm tok/s", "fabric TTFT ms", "vllm TTFT ms"),
        *("tok/s × vllm", "TTFT × vllm"),
    ]
    assert row == ["chat", "c=1", "300", "150", "10", "50", "2.00", "5.00"]


def test_unsound_figures_are_marked_and_missing_ones_have_no_ratio() -> None:
    failed = measured(100, 40, error="HTTP 500: oops")
    short = measured(100, 40, wanted=120)
    assert ratio_rows([visit("fabric", 0, failed)])[1][2] == "100 !"
    assert ratio_rows([visit("fabric", 0, short)])[1][2] == "100 !"
    assert figures([], "fabric", "chat", "c=1") is None


def test_peers_alone_have_no_ratios() -> None:
    assert ratio_rows([visit("vllm", 0, measured(100, 40))])[0][-1] == "vllm TTFT ms"


def test_every_server_gets_the_same_cells_and_rounds_go_back_and_forth(tmp_path: Path) -> None:
    plan = Plan(workloads=("decode",), concurrencies=(2,), rounds=2, seed="s", scale=0.1)
    launches = tuple(small(name, tmp_path) for name in ("fabric", "other"))
    said: list[str] = []
    visits = list(alternate(launches, plan, said.append))
    assert [(v.peer, v.round) for v in visits] == [
        ("fabric", 0),
        ("other", 0),
        ("other", 1),
        ("fabric", 1),
    ]
    seeds = {(v.round, c.cell.seed) for v in visits for c in v.cells}
    assert len(seeds) == 2  # one cell a round, the same for both servers
    _, row = ratio_rows(visits)
    assert row[:2] == ["decode", "c=2"]
    assert float(row[-2]) > 0
    assert "!" not in row[2] + row[3]
    assert any("starting other" in line for line in said)
    assert all(v.memory_bytes > 1_000_000 for v in visits)
    assert all(c.others is not None and c.others >= 0 for v in visits for c in v.cells)


def small(name: str, folder: Path) -> Launch:
    port = free_port()
    return Launch(
        name=name,
        command=(sys.executable, sse_server.__file__, str(port)),
        port=port,
        variables={},
        log=folder / f"{name}.log",
        ready_within_s=20,
    )


def test_what_other_processes_take_is_seen(tmp_path: Path) -> None:
    plan = Plan(workloads=("decode",), concurrencies=(8,), rounds=1, seed="s")
    spin = "while True: pass"
    busy = subprocess.Popen([sys.executable, "-c", spin])
    try:
        [visit] = alternate((small("other", tmp_path),), plan, lambda _: None)
    finally:
        busy.kill()
        busy.wait(10)
    assert visit.cells[0].disturbed


def test_cells_of_a_plan_share_no_prompts() -> None:
    plan = Plan(workloads=("chat", "prefix"), concurrencies=(1, 8), rounds=2, seed="s")
    seeds = [(c.workload.name, c.seed) for number in range(2) for c in plan.cells(number)]
    assert len(set(seeds)) == 8
    assert plan.cells(0) == plan.cells(0)


def test_a_cell_has_one_kind_of_load() -> None:
    with pytest.raises(ValueError, match="either"):
        Cell(workload=workload("chat"), requests=1, seed="s")


def test_tables() -> None:
    rows = [["a", "bb"], ["ccc", "d"]]
    assert align(rows) == "a    bb\nccc   d"
    assert markdown(rows) == "| a | bb |\n| --- | ---: |\n| ccc | d |"
    table = measured_table([measured(100, 40, error="HTTP 429: full"), measured(9, 5, wanted=10)])
    assert "goodput/s" in table
    assert "1.00 (50%)" in table
    assert "1 × HTTP 429: full" in table
    assert "1 outputs had not the length" in table


def test_json_holds_everything(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.json"
    write_json(path, {"cells": [measured(100, 40).record()]})
    record = json.loads(path.read_text())
    assert record["machine"] == machine()
    assert record["cells"][0]["workload"]["name"] == "chat"
    assert record["cells"][0]["ttft_ms"]["p50"] == 40
    assert record["cells"][0]["others_cpus"] == 0.5


def test_an_unknown_peer_is_refused(tmp_path: Path) -> None:
    setting = Setting(model=tmp_path, home=tmp_path, results=tmp_path, threads=2)
    with pytest.raises(ValueError, match=r"no peer 'tgi'; there are fabric, vllm, llama\.cpp"):
        launch("tgi", setting)
