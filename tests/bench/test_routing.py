"""How even replicas are: the reckoning that the simulator and the live benchmark share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.bench.routing import judge, open_requests
from fabric.bench.server import ServerError
from fabric.bench.stats import Sample
from fabric.bench.wire import ResponseReader, TokenTrace
from fabric.workload.evenness import Served, evenness, mean_of, percentile, verdicts

MS = 1_000_000
ONE = Served(
    replica="a",
    waited_ms=10.0,
    ttft_ms=20.0,
    e2e_ms=100.0,
    tokens=10,
    prompt_tokens=100,
    cached_tokens=40,
)
SAMPLE = Sample(
    tier="standard",
    wanted_tokens=4,
    prompt_tokens=8,
    cached_tokens=2,
    output_tokens=4,
    due=0,
    sent=1 * MS,
    times=(5 * MS, 9 * MS),
    replica="a",
    queue_ms=2.0,
)


def test_replicas_that_do_the_same_are_even() -> None:
    found = evenness([ONE, replace(ONE, replica="b")], {"a": [1, 3], "b": [2, 2]})
    assert (found.wait, found.depth, found.latency, found.mean_latency) == (0, 0, 1, 1)
    assert (found.hits, found.ttft_ms) == (0.4, 20.0)


def test_what_differs_shows() -> None:
    slow = replace(ONE, replica="b", waited_ms=30.0, e2e_ms=300.0, tokens=15, cached_tokens=0)
    found = evenness([ONE, slow], {"a": [1], "b": [3]})
    assert (found.wait, found.depth) == (0.5, 0.5)
    assert (found.latency, found.mean_latency) == (2.0, 3.0)
    assert found.hits == 0.2
    even = evenness([ONE, replace(ONE, replica="b")], {"a": [1], "b": [1]})
    met = [good for _, _, good in verdicts(even, replace(found, latency=3.0), even)]
    assert met == [True] * 4
    assert [good for _, _, good in verdicts(found, found, even)] == [False] * 4


def test_several_seeds_are_judged_by_their_means() -> None:
    uneven = evenness([ONE, replace(ONE, replica="b", waited_ms=30.0)], {"a": [1], "b": [3]})
    even = evenness([ONE, replace(ONE, replica="b")], {"a": [1], "b": [1]})
    found = mean_of([uneven, even])
    assert (found.wait, found.depth, found.hits) == (0.25, 0.25, 0.4)
    assert mean_of([uneven]) == uneven


@given(values=st.lists(st.floats(0, 1e6), min_size=1, max_size=40), share=st.floats(0, 1))
def test_percentiles_are_numpys(values: list[float], share: float) -> None:
    assert percentile(values, share) == pytest.approx(np.quantile(values, share), abs=1e-6)


def test_open_requests_of_replicas_and_of_no_queue() -> None:
    text = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="m",replica="a"} 3
vllm:num_requests_running{model_name="m",replica="b"} 0
vllm:num_requests_waiting{model_name="m",replica="a"} 2
vllm:num_requests_waiting{model_name="m",replica="ingress:x"} 9
vllm:num_preemptions_total{model_name="m",replica="a"} 7
"""
    assert open_requests(text) == {"a": 5.0, "b": 0.0}


def test_the_first_quarter_is_a_warm_up_and_a_late_client_waits() -> None:
    cold = replace(SAMPLE, due=-1, error="cold", replica=None)
    found = judge([*(replace(SAMPLE, replica=name) for name in "abc"), cold], {"a": [1.0]})
    assert found.hits == 0.25
    one = evenness([replace(ONE, waited_ms=3.0)], {"a": [1.0]})
    late = judge([SAMPLE], {"a": [1.0]})
    assert (late.wait, late.ttft_ms) == (one.wait, 5.0)


@pytest.mark.parametrize("hurt", [{"error": "HTTP 503"}, {"replica": None}, {"queue_ms": None}])
def test_a_run_with_a_request_missing_is_no_comparison(hurt: dict[str, None]) -> None:
    with pytest.raises(ServerError, match="without an answer"):
        judge([SAMPLE, replace(SAMPLE, **hurt)], {"a": [1.0]})


@pytest.mark.parametrize(("said", "queue_ms"), [("12.5", 12.5), ("soon", None), (None, None)])
def test_headers_say_where_it_ran(said: str | None, queue_ms: float | None) -> None:
    reader, trace = ResponseReader(), TokenTrace()
    waited = "" if said is None else f"X-Fabric-Queue-Ms: {said}\r\n"
    head = f"HTTP/1.1 200 OK\r\nX-Fabric-Replica: a1\r\n{waited}Content-Length: 0\r\n\r\n"
    reader.feed(head.encode())
    trace.note_headers(reader.headers)
    assert (trace.replica, trace.queue_ms) == ("a1", queue_ms)
