"""`fabric bench disaggregated`: what is sent, what is made of it, which verdicts follow."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fabric.bench.disaggregated import (
    POOLS,
    Load,
    Outcome,
    arrivals,
    losses,
    outcome,
    settings,
    verdicts,
)
from fabric.bench.stats import Sample
from fabric.bench.verdict import Verdict
from fabric.config import FabricConfig

LOAD = Load(seconds=20, chat_rate=0.5, prompt_rate=0.2, idle=2, seed="0")
MS = 1_000_000
BASE = Outcome(
    name="chunk 256",
    chat_itl_p50_ms=20.0,
    chat_itl_p99_ms=200.0,
    chat_ttft_p50_ms=300.0,
    prompt_ttft_p50_ms=900.0,
    output_tok_s=50.0,
    idle_ttft_ms=800.0,
    idle_gap_ms=20.0,
    bytes_received=0,
    received_bytes_s=0.0,
    errors=0,
)
GOOD = replace(BASE, name=POOLS, chat_itl_p99_ms=100.0, idle_gap_ms=60.0, idle_ttft_ms=801.0)


def sample(*times_ms: int, wanted: int, error: str | None = None) -> Sample:
    return Sample(
        tier="standard",
        wanted_tokens=wanted,
        prompt_tokens=128,
        cached_tokens=0,
        output_tokens=len(times_ms),
        due=0,
        sent=0,
        times=tuple(one * MS for one in times_ms),
        error=error,
    )


def test_the_configurations_are_the_servers_own_and_use_as_many_threads() -> None:
    made = settings((64, 512))
    assert [name for name, _ in made] == ["chunk 64", "chunk 512", POOLS]
    for _, values in made:
        config = FabricConfig.model_validate(values)
        assert (config.first_replicas, config.model.threads) == (2, 1)


def test_the_requests_are_the_same_each_time_and_in_order() -> None:
    found = arrivals(LOAD)
    assert found == arrivals(LOAD)
    assert found != arrivals(replace(LOAD, seed="1"))
    assert [one.arrival for one in found] == sorted(one.arrival for one in found)
    assert sum(len(one.prompt) == 1024 for one in found) == 4
    assert sum(len(one.prompt) == 128 for one in found) == 10
    assert len({one.request_id for one in found}) == len(found)


def test_itl_is_that_of_the_chats_alone_and_the_gap_that_of_an_idle_server() -> None:
    chat, long = sample(5, 15, 25, wanted=128), sample(900, 1900, wanted=32)
    lost = sample(wanted=128, error="connection: refused")
    idle = [sample(800, 850, 870, wanted=32), sample(700, 730, wanted=32)]
    found = outcome("any", 1.0, idle, [chat, long, lost], (3_000_000, 2.0))
    assert found.chat_itl_p99_ms == 10.0
    assert (found.chat_ttft_p50_ms, found.prompt_ttft_p50_ms) == (5.0, 900.0)
    assert found.output_tok_s == 5 / 1.9, "until the last token"
    assert (found.idle_ttft_ms, found.idle_gap_ms) == (750.0, 40.0)
    assert (found.received_bytes_s, found.errors) == (1_500_000.0, 1)
    with pytest.raises(ConnectionError, match="refused"):
        outcome("any", 1.0, idle, [lost, long], (0, 1.0))


def test_both_targets_at_their_limit_are_met() -> None:
    assert all(met for *_, met in verdicts([BASE, GOOD]))
    assert losses([BASE, GOOD]) == [
        "loses: idle TTFT 801.0 ms, colocated 800.0",
        "loses: idle gap 60.0 ms, colocated 20.0",
    ]


@pytest.mark.parametrize(
    "harm",
    [
        {"chat_itl_p99_ms": 101.0},
        {"idle_gap_ms": 60.1},
        {"output_tok_s": 47.0},
        {"errors": 1},
    ],
)
def test_each_target_can_be_missed(harm: dict[str, float]) -> None:
    found = Verdict(targets=verdicts([BASE, replace(GOOD, **harm)]))  # type: ignore[arg-type]
    assert found.exit_code == 1
    assert found.text().count("MISSED") == 1


def test_a_chunk_size_that_loses_throughput_is_not_the_best() -> None:
    slow = replace(BASE, name="chunk 16", chat_itl_p99_ms=50.0, output_tok_s=40.0)
    found = verdicts([slow, BASE, GOOD])
    assert all(met for *_, met in found)
    assert "chunk 256" in found[0][0]
