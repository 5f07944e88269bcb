"""Latency histograms and rates."""

from __future__ import annotations

from fabric.cluster.measures import NS, Measures
from fabric.core.request import Finish, Request, SamplingParams, TokenChunk
from fabric.core.snapshot import ReplicaSnapshot


def chunk(position: int, choice: int = 0, finish: Finish | None = None) -> TokenChunk:
    return TokenChunk(request_id="q", choice=choice, position=position, tokens=(1,), finish=finish)


def count(measures: Measures, name: str) -> tuple[int, float]:
    report = measures.histograms[name].report()
    return sum(report.counts), round(report.total, 3)


def test_the_times_of_a_request_with_two_choices() -> None:
    measures = Measures()
    request = Request(
        request_id="q", prompt=(1,), sampling=SamplingParams(max_tokens=2, n=2), arrival=10 * NS
    )
    measures.began(request, 11 * NS)
    measures.produced([chunk(0)], 12 * NS)
    measures.produced([chunk(1, finish=Finish.LENGTH), chunk(0, choice=1)], 13 * NS)
    measures.produced([chunk(1, choice=1, finish=Finish.STOP)], 16 * NS)
    assert count(measures, "request_queue_time_seconds") == (1, 1.0)
    assert count(measures, "time_to_first_token_seconds") == (1, 2.0)
    assert count(measures, "inter_token_latency_seconds") == (2, 4.0)
    assert count(measures, "e2e_request_latency_seconds") == (1, 6.0)
    assert measures.finished == {"length": 1, "stop": 1}
    assert not measures._lives


def test_an_aborted_request_is_forgotten() -> None:
    measures = Measures()
    request = Request(request_id="q", prompt=(1,), sampling=SamplingParams(max_tokens=2), arrival=0)
    measures.began(request, 0)
    measures.forget("q")
    measures.produced([chunk(0, finish=Finish.ABORT)], NS)
    assert count(measures, "e2e_request_latency_seconds") == (0, 0.0)
    assert not measures._lives


def test_rates_are_of_the_last_ten_seconds() -> None:
    measures = Measures()
    assert measures.rates() == (0.0, 0.0)
    for second in range(60):
        tokens = second * 5 if second < 40 else 200 + (second - 40) * 50
        snapshot = ReplicaSnapshot(
            replica_id="r", taken=0, prompt_tokens_total=second, generated_tokens_total=tokens
        )
        measures.sample(snapshot, second * NS)
    assert measures.rates() == (1.0, 50.0)
