"""`fabric bench prefix-fetch`: what is made of what was measured, and how every benchmark ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fabric.bench.prefix_fetch import (
    CONFIG,
    Beside,
    Prefix,
    beside_rows,
    gaps_between,
    rows,
    verdicts,
)
from fabric.bench.server import ServerError
from fabric.bench.verdict import Verdict, folder_of
from fabric.config import FabricConfig

MS = 1_000_000
GOOD = Prefix(
    tokens=512,
    computed_ms=(400.0, 500.0, 600.0),
    fetched_ms=(100.0, 100.0, 300.0),
    fetched=3,
    failed=0,
    loan_s=0.3,
    bytes_received=30e6,
    others=0.0,
)


def test_its_server_fetches_between_replicas_that_take_turns() -> None:
    config = FabricConfig.model_validate(CONFIG)
    assert (config.replicas, config.router.policy) == (2, "round_robin")
    assert config.kv.prefix_fetch is not None


def test_pairs_are_compared_and_not_medians() -> None:
    assert GOOD.share == 0.25
    assert rows([GOOD])[1] == ["512 tokens", "500", "100", "0.25x", "100", "100", "0.00"]


@pytest.mark.parametrize(
    "harm",
    [{"fetched": 2}, {"failed": 1}, {"fetched_ms": (400.0, 500.0, 600.0)}],
)
def test_each_target_can_be_missed(harm: dict[str, Any]) -> None:
    assert all(met for *_, met in verdicts([GOOD, GOOD]))
    missed = [text for text, _, met in verdicts([GOOD, replace(GOOD, **harm)]) if not met]
    assert len(missed) == 1


def test_gaps_of_the_window_alone() -> None:
    times = [0, 10 * MS, 20 * MS, 50 * MS, 60 * MS]
    assert gaps_between(times, 12 * MS, 45 * MS) == (10.0, 30.0)
    with pytest.raises(ServerError, match="ended before"):
        gaps_between(times, 12 * MS, 61 * MS)


def test_what_a_prompt_takes_from_the_chat_is_what_is_over_its_usual_gaps() -> None:
    alone = Beside(name="nothing", prompts=0, gaps_ms=(20.0, 20.0, 20.0), others=0.0)
    beside = Beside(name="fetches", prompts=2, gaps_ms=(20.0, 50.0, 30.0), others=0.0)
    found = beside_rows([alone, beside])
    assert [row[4] for row in found[1:]] == ["-", "20"]
    assert found[2][1:4] == ["30.0", "33.3", "50.0"]


def test_a_verdict_says_each_target_and_whether_it_can_be_quoted() -> None:
    found = Verdict(targets=[("a", "1", True), ("b", "2", False)], others=(0.0, 0.5))
    assert found.text().splitlines() == [
        "  met     a: 1",
        "  MISSED  b: 2",
        "1 of 2 were disturbed by other processes; don't quote them",
    ]
    assert found.exit_code == 1
    assert found.records()[1] == {"text": "b", "found": "2", "met": False}
    good = Verdict(targets=[("a", "1", True)])
    assert (good.exit_code, good.text()) == (0, "  met     a: 1")


def test_servers_logs_lie_beside_the_results() -> None:
    assert folder_of(Path("x/y.json")) == Path("x")
    assert folder_of(None) == Path("bench-results")
