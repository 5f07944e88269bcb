"""The client over real sockets on loopback: what it counts, keeps open, and calls an error."""

from __future__ import annotations

import time

import httpx
import pytest
from kit.sse_server import MODEL, Behaviour, SseServer

from fabric.bench.client import Client, Endpoint, find_model, prompt_text, takes_token_ids
from fabric.bench.load import Cell, default_requests, run_cell
from fabric.bench.server import free_port
from fabric.bench.stats import Sample, Targets
from fabric.bench.wire import TokenTrace
from fabric.core.request import Request
from fabric.workload import Arrivals, Lengths, Workload, generate

SMALL = Workload(name="small", prompt=Lengths(median=8), output=Lengths(median=12))


def endpoint(server: SseServer, prompts: str = "tokens", timeout_s: float = 20.0) -> Endpoint:
    return Endpoint(url=server.url, model=MODEL, prompts=prompts, timeout_s=timeout_s)


def request() -> Request:
    return next(generate(SMALL, count=1, seed="s"))


async def complete(server: SseServer, prompts: str = "tokens", timeout_s: float = 20.0) -> Sample:
    where = endpoint(server, prompts, timeout_s)
    client = Client(where)
    try:
        return await client.complete(where.wire(request()), request(), time.monotonic_ns())
    finally:
        await client.close()


async def test_a_completion() -> None:
    async with SseServer() as server:
        got = await complete(server)
    assert got.error is None
    assert (got.output_tokens, got.prompt_tokens, len(got.times)) == (12, 8, 12)
    assert got.due <= got.sent <= got.times[0] <= got.times[-1]
    [body] = server.requests
    assert body["prompt"] == list(request().prompt)
    assert body["max_tokens"] == 12
    assert body["ignore_eos"] is True
    assert body["temperature"] == 0


@pytest.mark.parametrize("prompts", ["text", "chat"])
async def test_prompts_as_words(prompts: str) -> None:
    async with SseServer() as server:
        got = await complete(server, prompts)
    assert got.error is None
    assert got.output_tokens == 12
    [body] = server.requests
    said = body["prompt"] if prompts == "text" else body["messages"][0]["content"]
    assert said == prompt_text(request())
    assert len(said.split()) == 8


async def test_usage_counts_tokens_that_travel_together() -> None:
    async with SseServer(Behaviour(tokens_per_event=5)) as server:
        got = await complete(server)
    assert (got.output_tokens, len(got.times)) == (12, 3)


async def test_without_usage_events_are_counted_and_any_framing_will_do() -> None:
    async with SseServer(Behaviour(with_usage=False, chunked=False)) as server:
        got = await complete(server)
    assert (got.error, got.output_tokens) == (None, 12)


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        (Behaviour(status=429), "HTTP 429: not today"),
        (Behaviour(cut_after=3), "the connection closed in the middle of a response"),
        (Behaviour(cut_after=3, chunked=False), "the stream ended without [DONE]"),
        (Behaviour(error_event_after=3), "the engine stopped"),
        (Behaviour(delay_s=5), "no end after 0.2 s"),
    ],
)
async def test_what_goes_wrong_is_said(behaviour: Behaviour, said: str) -> None:
    async with SseServer(behaviour) as server:
        got = await complete(server, timeout_s=0.2 if behaviour.delay_s else 20.0)
    assert got.error == said


async def test_no_server_is_an_error_not_a_crash() -> None:
    where = Endpoint(url=f"http://127.0.0.1:{free_port()}", model=MODEL)
    got = await Client(where).complete(where.wire(request()), request(), time.monotonic_ns())
    assert got.error is not None
    assert got.error.startswith("connection: ")


@pytest.mark.parametrize("drops", [False, True])
async def test_connections_are_kept_and_lost_ones_replaced(drops: bool) -> None:
    cell = Cell(workload=SMALL, requests=12, seed="s", concurrency=3)
    async with SseServer(Behaviour(drops_idle_connections=drops)) as server:
        summary = await run_cell(endpoint(server), cell)
    assert summary.errors == ()
    assert server.connections == 3 if not drops else server.connections > 12


async def test_closed_loop_keeps_its_concurrency_and_warms_up_apart() -> None:
    cell = Cell(workload=SMALL, requests=9, seed="s", concurrency=4)
    async with SseServer(Behaviour(delay_s=0.001)) as server:
        summary = await run_cell(endpoint(server), cell)
    assert (summary.requests, summary.completed, summary.off_length) == (9, 9, 0)
    assert summary.output_tokens == 9 * 12
    assert server.in_flight_max == 4
    warm, measured = server.requests[:4], server.requests[4:]
    assert len(measured) == 9
    assert all(body["max_tokens"] < 12 for body in warm)
    prompts = {tuple(body["prompt"]) for body in warm}
    assert prompts.isdisjoint(tuple(body["prompt"]) for body in measured)


async def test_equal_cells_send_equal_requests() -> None:
    cell = Cell(workload=SMALL, requests=5, seed="s", concurrency=1)
    async with SseServer() as first, SseServer(Behaviour(tokens_per_event=3)) as second:
        await run_cell(endpoint(first), cell)
        await run_cell(endpoint(second), cell)
    assert first.requests == second.requests


async def test_open_loop_does_not_wait_for_answers() -> None:
    shape = Workload(name="one", prompt=Lengths(median=8), output=Lengths(median=2))
    arrivals = Arrivals(rate_per_s=200, variation=0)
    cell = Cell(workload=shape, requests=20, seed="s", arrivals=arrivals)
    async with SseServer(Behaviour(delay_s=0.1)) as server:
        summary = await run_cell(endpoint(server), cell, Targets(ttft_ms=60_000))
    assert (summary.completed, summary.good_share) == (20, 1)
    assert server.in_flight_max > 10  # 100 ms of arrivals, five ms apart
    assert summary.ttft_ms is not None
    assert summary.ttft_ms.p50 >= 100


async def test_what_waits_in_the_client_counts_from_its_arrival(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fabric.bench.load.MAX_IN_FLIGHT", 1)
    shape = Workload(name="one", prompt=Lengths(median=8), output=Lengths(median=1))
    cell = Cell(workload=shape, requests=5, seed="s", arrivals=Arrivals(rate_per_s=1e6))
    async with SseServer(Behaviour(delay_s=0.02)) as server:
        summary = await run_cell(endpoint(server), cell)
    # One at a time, each at least 60 ms (text, usage, end): the last has waited for four others.
    assert summary.ttft_ms is not None
    assert summary.ttft_ms.max >= 4 * 60


async def test_outputs_that_end_early_are_noticed() -> None:
    cell = Cell(workload=SMALL, requests=3, seed="s", concurrency=1)
    async with SseServer(Behaviour(natural_length=4)) as server:
        summary = await run_cell(endpoint(server), cell)
    assert (summary.off_length, summary.output_tokens, summary.errors) == (3, 12, ())


async def test_reads_the_same_as_httpx() -> None:
    async with SseServer(Behaviour(tokens_per_event=2)) as server:
        ours = await complete(server)
        trace = TokenTrace()
        body = endpoint(server).body(request())
        async with (
            httpx.AsyncClient(trust_env=False) as http,
            http.stream("POST", server.url + "/v1/completions", json=body) as response,
        ):
            async for chunk in response.aiter_bytes():
                trace.feed(chunk, 0)
    assert len(trace.times) == len(ours.times)
    assert trace.output_tokens == ours.output_tokens


async def test_finding_the_model_and_the_way_to_write_prompts() -> None:
    async with SseServer() as server:
        assert await find_model(server.url) == MODEL
        assert await takes_token_ids(endpoint(server))
    async with SseServer(Behaviour(takes_token_ids=False)) as server:
        assert not await takes_token_ids(endpoint(server))
    with pytest.raises(ConnectionError, match="is the server up"):
        await find_model(f"http://127.0.0.1:{free_port()}")


def test_a_bad_address_is_refused() -> None:
    with pytest.raises(ValueError, match="http://"):
        Client(Endpoint(url="127.0.0.1:8000", model=MODEL))


@pytest.mark.parametrize("concurrency", [1, 2, 3, 8, 17, 32, 500])
def test_a_cell_is_never_smaller_than_its_concurrency(concurrency: int) -> None:
    assert default_requests(concurrency, 0.1) >= concurrency
    assert default_requests(concurrency) >= default_requests(concurrency, 0.5)
