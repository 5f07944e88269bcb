"""`fabric bench fidelity`: its arithmetic, and that the simulator takes a server's costs in."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fabric.bench.fidelity import UNDER_WAY, Latency, Replayed, capacity_rps, parser, rows, slice_of
from fabric.bench.front_costs import FrontCosts, line_through
from fabric.bench.profile import read, write
from fabric.bench.stats import Sample
from fabric.bench.step_table import Facts, Table
from fabric.sim.foretelling import foretell

MS = 1_000_000
AZURE = Path(__file__).parent.parent / "data" / "azure2023_conv_300.csv"
TABLE = Table(table=((1, 10 * MS), (64, 136 * MS)), ns_per_context=0.0, ns_per_pair=0.0)
FACTS = Facts(
    model="demo",
    block_size=16,
    num_blocks=4000,
    num_host_blocks=0,
    context_limit=4096,
    kv_bytes=23_040,
    swap_ns_per_block=1,
    recompute_ns_per_token=1,
)


def test_what_a_front_adds_is_a_line_and_never_a_gain() -> None:
    assert line_through([(1, 5.0), (8, 19.0), (32, 67.0)]) == pytest.approx((3.0, 2.0))
    assert line_through([(1, -9.0), (8, 5.0), (32, 53.0)])[0] == 0.0
    assert line_through([(1, 6.0), (8, 4.0), (32, 2.0)]) == (4.0, 0.0)
    assert line_through([(1, -6.0), (8, -4.0), (32, -7.0)]) == (0.0, 0.0)


def test_what_is_written_is_read_and_a_slower_machine_takes_more(tmp_path: Path) -> None:
    front = FrontCosts(first_ns=10, step_ns=20, row_ns=30)
    write(tmp_path / "costs.json", FACTS, TABLE, front)
    assert read(tmp_path / "costs.json") == (FACTS, TABLE, front)
    slow = TABLE.times(2.0)
    assert slow.decode_ns(64, 100) == 2 * TABLE.decode_ns(64, 100)
    assert front.times(2.0) == FrontCosts(first_ns=20, step_ns=40, row_ns=60)


def test_the_capacity_is_that_of_the_full_loop() -> None:
    tail = [10_000 * MS + 900 * MS * index for index in range(UNDER_WAY)]
    ends = [100 * MS * index for index in range(4 * UNDER_WAY - len(tail))] + tail
    assert capacity_rps([_sample(end) for end in ends]) == pytest.approx(10.0)
    with pytest.raises(ValueError, match="no capacity"):
        capacity_rps([_sample(end) for end in ends[: 2 * UNDER_WAY]])


def test_errors_are_those_of_medians() -> None:
    live = [Latency(ttft_ms=ms, tpot_ms=10.0, e2e_ms=50.0) for ms in (100.0, 200.0, 900.0)]
    told = [Latency(ttft_ms=ms, tpot_ms=None, e2e_ms=54.0) for ms in (1.0, 230.0, 240.0)]
    told.append(replace(told[0], tpot_ms=9.5))
    found = Replayed(load=70, requests=4, live=live, foretold=told, others=0.0).figures()
    assert [one.met for one in found] == [False, True, True]
    assert [row[4:] for row in rows(found)[1:]] == [
        ["-42.2%", "MISSED"],
        ["-5.0%", "met"],
        ["+8.0%", "met"],
    ]


def test_a_servers_costs_reach_every_request(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"kv": {"device_bytes": 1 << 30, "host_bytes": 0}}))
    arguments = parser().parse_args(["--trace", str(AZURE), "--seconds", "40"])
    requests = slice_of(arguments, 30, 0.5)  # mostly alone
    assert len(requests) == 20
    assert requests[0].prompt != slice_of(arguments, 70, 0.5)[0].prompt
    plain, through = tmp_path / "plain.json", tmp_path / "front.json"
    write(plain, FACTS, TABLE, None)
    front = FrontCosts(first_ns=30 * MS, step_ns=4 * MS, row_ns=MS)
    write(through, FACTS, TABLE, front)
    assert json.loads(through.read_text())["front"] == asdict(front)
    before, after = (foretell(costs, config, requests) for costs in (plain, through))
    assert len(before) == len(after) == 20
    alone, fronted = before[0], after[0]
    assert fronted.ttft_ms - alone.ttft_ms == pytest.approx(35.0)
    assert alone.tpot_ms is not None
    assert fronted.tpot_ms == pytest.approx(alone.tpot_ms + 5.0)


def _sample(end: int) -> Sample:
    return Sample(
        tier="standard",
        wanted_tokens=1,
        prompt_tokens=1,
        cached_tokens=0,
        output_tokens=1,
        due=0,
        sent=0,
        times=(end,),
    )
