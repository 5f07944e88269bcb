"""The door: ids, counts and log lines, which never hold text or keys."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from typing import Any

import httpx
import orjson
import pytest
from kit.asgi import client_of, post
from kit.local_backend import LocalBackend

from fabric.gateway.api import create_app
from fabric.gateway.counters import MAX_FIELD_NAMES, OTHER, GatewayCounters, exposition
from fabric.gateway.logs import LOGGER, log_to
from fabric.gateway.settings import GatewaySettings

PATH = "/v1/completions"


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    level, propagate = LOGGER.level, LOGGER.propagate
    handler = log_to(stream)
    yield stream
    LOGGER.removeHandler(handler)
    LOGGER.setLevel(level)
    LOGGER.propagate = propagate


def parsed(lines: io.StringIO) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in lines.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("abc-123:x.y_z", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("a b", False),
        ("a\tb", False),
        ('"}', False),
        ("", False),
        ("é", False),
    ],
)
async def test_request_ids(client: httpx.AsyncClient, given: str, kept: bool) -> None:
    for path, status in (("/health", 200), ("/nothing", 404)):
        answer = await client.get(path, headers={"x-request-id": given.encode("latin-1")})
        assert answer.status_code == status
        back = answer.headers["x-request-id"]
        assert back == given if kept else re.fullmatch("[0-9a-f]{32}", back)


async def test_one_id_twice_is_two_requests(
    client: httpx.AsyncClient, backend: LocalBackend
) -> None:
    for _ in range(2):
        await client.post(PATH, json={"prompt": "a"}, headers={"x-request-id": "same"})
    assert len({request.request_id for request in backend.requests}) == 2


async def test_log_lines_tell_all_but_the_text(backend: LocalBackend, lines: io.StringIO) -> None:
    app = create_app(backend, GatewaySettings(api_keys=("sekretkey",)))
    headers = {"authorization": "Bearer sekretkey", "x-request-id": "r1"}
    async with client_of(app, headers=headers) as client:
        body = {"prompt": "hushprompt", "max_tokens": 5, "ignore_eos": True, "stream": True}
        output = await client.post(PATH, json=body)
        await client.post(PATH, json={"prompt": "hushprompt", "temperature": -1, "hushfield": 1})
        await client.get("/health")
    first, second = parsed(lines)
    wanted = {"request_id": "r1", "route": PATH, "status": 200, "model": "tiny", "stream": True}
    assert wanted.items() <= first.items()
    assert (first["completion_tokens"], first["finish"], first["choices"]) == (5, "length", 1)
    assert 0 <= first["ttft_ms"] <= first["e2e_ms"]
    assert second["status"] == 400
    assert "sekret" not in lines.getvalue() and "hush" not in lines.getvalue()
    assert output.status_code == 200


async def test_bugs_are_logged_without_their_message(
    client: httpx.AsyncClient, backend: LocalBackend, lines: io.StringIO
) -> None:
    backend.refusal = RuntimeError("hush")
    for stream in (False, True):
        await client.post(PATH, json={"prompt": "a", "stream": stream})
    bugs = [line for line in parsed(lines) if line["event"] == "internal_error"]
    assert [bug["error"] for bug in bugs] == ["RuntimeError"] * 2
    assert "local_backend" in bugs[0]["where"][-1]
    assert "hush" not in lines.getvalue()


async def test_who_left_is_logged_as_499(backend: LocalBackend, lines: io.StringIO) -> None:
    counters = GatewayCounters()
    app = create_app(backend, counters=counters)
    exchange = post(PATH, {"prompt": "a"})
    exchange.leave()
    await exchange.run(app)
    assert parsed(lines)[0]["status"] == 499
    samples = counters.samples()
    assert samples["fabric_client_disconnects_total"] == 1
    assert samples["fabric_http_open_requests"] == 0


async def test_metrics(client: httpx.AsyncClient) -> None:
    await client.post(PATH, json={"prompt": "a", "wild": 1, "metadata": {}, 'x"} 1\n': 2})
    await client.get("/made/up")
    text = (await client.get("/metrics")).text
    assert "fabric_replicas 1" in text
    assert 'fabric_http_responses_total{route="/v1/completions",status="200"} 1' in text
    assert 'fabric_http_responses_total{route="(none)",status="404"} 1' in text
    assert 'fabric_unknown_fields_total{field="wild"} 1' in text
    assert f'fabric_unknown_fields_total{{field="{OTHER}"}} 1' in text
    assert "metadata" not in text and "made" not in text


async def test_a_host_that_publishes_the_counters_gets_its_own_text(backend: LocalBackend) -> None:
    counters = GatewayCounters()
    async with client_of(create_app(backend, counters=counters)) as client:
        assert (await client.get("/metrics")).text == await backend.metrics_text()
    assert 'status="200"' in exposition(counters.samples())


def test_large_counts_are_exact() -> None:
    series = "fabric_client_disconnects_total"
    assert exposition({series: 12_345_678.0}).endswith(f"{series} 12345678\n")


def test_field_names_are_bounded() -> None:
    counters = GatewayCounters()
    for index in range(1000):
        counters.unknown_fields([f"f{index}", "f0", "x" * 999])
    names = [name for name in counters.samples() if "unknown" in name]
    assert len(names) <= MAX_FIELD_NAMES + 1
    assert counters.samples()['fabric_unknown_fields_total{field="f0"}'] == 1001


def test_the_log_is_silent_unless_asked() -> None:
    assert not LOGGER.handlers
    assert logging.getLogger("fabric.gateway") is LOGGER
