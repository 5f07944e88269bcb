"""Known answers for every figure."""

from __future__ import annotations

import pytest

from fabric.bench.stats import Sample, Spread, Targets, summarize

MS = 1_000_000


def sample(
    due_ms: float, times_ms: list[float], *, tokens: int | None = None, error: str | None = None
) -> Sample:
    return Sample(
        tier="standard",
        wanted_tokens=len(times_ms),
        prompt_tokens=10,
        cached_tokens=4,
        output_tokens=len(times_ms) if tokens is None else tokens,
        due=round(due_ms * MS),
        sent=round(due_ms * MS) + 7 * MS,  # the client was late: no figure may start here
        times=tuple(round(t * MS) for t in times_ms),
        error=error,
    )


def test_one_request_by_hand() -> None:
    got = sample(100, [150, 160, 190])
    assert (got.ttft_ms, got.e2e_ms, got.tpot_ms) == (50, 90, 20)


def test_tokens_that_travel_together_share_a_gap_but_count_in_tpot() -> None:
    got = sample(0, [10, 40], tokens=4)
    assert got.tpot_ms == 10
    assert summarize([got]).itl_ms == Spread(mean=30, p50=30, p90=30, p99=30, max=30)


def test_one_token_has_no_tpot() -> None:
    summary = summarize([sample(0, [10])])
    assert summary.tpot_ms is None
    assert summary.itl_ms is None
    assert summary.ttft_ms is not None


def test_percentiles_are_exact_and_interpolated() -> None:
    spread = Spread.of(list(range(1, 101)))
    assert spread is not None
    assert spread.p50 == pytest.approx(50.5)
    assert spread.p90 == pytest.approx(90.1)
    assert spread.p99 == pytest.approx(99.01)
    assert (spread.mean, spread.max) == (50.5, 100)


def test_rates_run_from_the_first_due_to_the_last_token() -> None:
    summary = summarize([sample(500, [600, 700]), sample(1000, [1500, 2000, 2500])])
    assert summary.duration_s == 2.0
    assert summary.output_tok_s == 5 / 2
    assert summary.total_tok_s == 25 / 2
    assert summary.requests_s == 1
    assert summary.cached_tokens == 8


def test_failed_requests_are_counted_and_their_tokens_are_not() -> None:
    samples = [sample(0, [100, 1000]), sample(0, [5], error="HTTP 429: full")]
    samples.append(sample(0, [], error="HTTP 429: full"))
    samples.append(sample(0, [], error="connection: refused"))
    summary = summarize(samples)
    assert (summary.requests, summary.completed, summary.output_tokens) == (4, 1, 2)
    assert summary.errors == (("HTTP 429: full", 2), ("connection: refused", 1))
    assert summary.ttft_ms is not None
    assert summary.ttft_ms.max == 100


def test_goodput_is_the_rate_of_those_that_met_every_target() -> None:
    fast = sample(0, [100, 110])  # TTFT 100, TPOT 10
    slow_start = sample(0, [300, 310])
    slow_words = sample(0, [100, 200])
    failed = sample(0, [1, 2000], error="cut")
    summary = summarize([fast, slow_start, slow_words, failed], Targets(ttft_ms=100, tpot_ms=10))
    assert summary.good_share == 1 / 4
    assert summary.goodput_rps == pytest.approx(1 / 0.31)
    assert summarize([fast]).goodput_rps is None


def test_a_target_without_a_value_to_judge_is_met() -> None:
    one_token = sample(0, [50])
    assert Targets(tpot_ms=1).met_by(one_token)
    assert not Targets(e2e_ms=49).met_by(one_token)


def test_wrong_lengths_are_counted() -> None:
    assert summarize([sample(0, [1, 2], tokens=1), sample(0, [1, 2])]).off_length == 1


def test_when_all_fail_there_are_no_latencies() -> None:
    summary = summarize([sample(7, [], error="x")], Targets(ttft_ms=1))
    assert summary.ttft_ms is None
    assert (summary.output_tok_s, summary.goodput_rps, summary.duration_s) == (0, 0, 0)


def test_nothing_sent_is_refused() -> None:
    with pytest.raises(ValueError, match="no request"):
        summarize([])
