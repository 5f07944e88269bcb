"""Streams under bad readers: who leaves frees everything, who reads slowly stalls nobody."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.asgi import Exchange, post
from kit.local_backend import CONFIG, LocalBackend, saying

from fabric.gateway.api import create_app

PATH = "/v1/completions"
ENDLESS = {"prompt": "hello", "max_tokens": 400, "ignore_eos": True}


async def turns(count: int) -> None:
    """Let everything else run."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    """Let everything else run until the condition holds (or long beyond what it can take)."""
    for _ in range(100_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never comes to that")


async def warm(backend: LocalBackend) -> FastAPI:
    """An app that has read its tokenizer: from here on, turns of the loop are predictable."""
    app = create_app(backend)
    exchange = await Exchange(path="/ready", parts=[b""], method="GET").run(app)
    assert exchange.status == 200
    return app


@pytest.fixture
async def app(backend: LocalBackend) -> FastAPI:
    return await warm(backend)


async def test_the_first_token_comes_at_once(app: FastAPI, backend: LocalBackend) -> None:
    backend.resumed.clear()
    backend.worker.script = saying([70] * 9)
    exchange = post(PATH, {**ENDLESS, "stream": True, "max_tokens": 9})
    task = asyncio.create_task(exchange.run(app))
    await turns(20)
    assert exchange.status is None, "nothing is promised before the first token"
    backend.resumed.set()
    await exchange.wrote.wait()
    assert exchange.status == 200
    await until(lambda: bool(exchange.writes))
    backend.resumed.clear()
    assert exchange.writes[0].startswith(b"data: {") and not exchange.complete
    backend.resumed.set()
    await task
    assert exchange.complete and exchange.writes[-1].endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("body", [ENDLESS, {**ENDLESS, "prompt": ["a", "b", "c"], "n": 3}])
@pytest.mark.parametrize("phase", [0, 3, 8, 40])
async def test_who_leaves_frees_everything(
    app: FastAPI, backend: LocalBackend, stream: bool, body: dict[str, object], phase: int
) -> None:
    exchange = post(PATH, {**body, "stream": stream})
    task = asyncio.create_task(exchange.run(app))
    await turns(phase)
    exchange.leave()
    await until(task.done)
    await task
    assert not exchange.complete
    backend.assert_idle()


async def test_who_leaves_the_queue_is_forgotten(app: FastAPI, backend: LocalBackend) -> None:
    backend.resumed.clear()
    exchanges = [post(PATH, {**ENDLESS, "stream": i % 2 == 0}) for i in range(8)]
    tasks = [asyncio.create_task(exchange.run(app)) for exchange in exchanges]
    await turns(30)
    assert len(backend.requests) == 8
    for exchange in exchanges:
        exchange.leave()
    await until(lambda: all(task.done() for task in tasks))
    await asyncio.gather(*tasks)
    backend.assert_idle()
    backend.resumed.set()


async def test_a_cancelled_server_task_frees_everything(
    app: FastAPI, backend: LocalBackend
) -> None:
    task = asyncio.create_task(post(PATH, {**ENDLESS, "stream": True}).run(app))
    await turns(30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    backend.assert_idle()


SMALL = replace(CONFIG, num_blocks=40, max_sequences=16, num_host_blocks=24)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=5)
def test_200_streams_left_at_random(folder: Path, seed: int) -> None:
    """In a pool too small for all: they leave the queue, prefill, decode and the swap space."""
    choose = random.Random(seed)

    async def scene() -> None:
        backend = LocalBackend(folder, config=SMALL)
        app = await warm(backend)
        phases = [choose.randrange(300) for _ in range(200)]
        exchanges = [
            post(PATH, {**ENDLESS, "prompt": f"{i} " * 9, "n": 1 + i % 2, "stream": i % 3 > 0})
            for i in range(len(phases))
        ]
        tasks = [asyncio.create_task(exchange.run(app)) for exchange in exchanges]
        swapped = waiting = 0
        for turn in range(max(phases) + 1):
            for exchange, phase in zip(exchanges, phases, strict=True):
                if phase == turn:
                    exchange.leave()
            await asyncio.sleep(0)
            snapshot = backend.engine.snapshot("local", 0)
            swapped, waiting = swapped + snapshot.swapped, waiting + snapshot.waiting
        await asyncio.wait_for(asyncio.gather(*tasks), 20)
        backend.assert_idle()
        assert swapped and waiting, "the scene is too easy"

    asyncio.run(scene())


async def test_slow_readers_stall_nobody(app: FastAPI, backend: LocalBackend) -> None:
    body = {**ENDLESS, "stream": True, "max_tokens": 60}
    slow = [post(PATH, body) for _ in range(20)]
    tasks = [asyncio.create_task(exchange.run(app)) for exchange in slow]
    await until(lambda: all(exchange.writes for exchange in slow))
    for exchange in slow:
        exchange.reading.clear()
    quick = [post(PATH, body) for _ in range(20)]
    await asyncio.wait_for(asyncio.gather(*(exchange.run(app) for exchange in quick)), 10)
    assert all(exchange.complete for exchange in quick)
    stalled = [len(exchange.writes) for exchange in slow]
    await until(lambda: not backend.engine.has_work)
    assert [len(exchange.writes) for exchange in slow] == stalled
    for exchange in slow:
        exchange.reading.set()
    await asyncio.gather(*tasks)
    # What had piled up went out in one write each.
    assert all(exchange.complete for exchange in slow)
    assert all(
        len(exchange.writes) <= count + 4 for exchange, count in zip(slow, stalled, strict=True)
    )
    assert all(count_tokens(a) == count_tokens(b) for a, b in zip(slow, quick, strict=True))


def count_tokens(exchange: Exchange) -> int:
    """Events that end a choice, and the end mark."""
    return b"".join(exchange.writes).count(b'"finish_reason":"length"')


async def test_a_replica_that_fails_midway_says_so(
    app: FastAPI, backend: LocalBackend, client: httpx.AsyncClient
) -> None:
    steps = backend.worker.script

    def failing(history: object, prompt_length: int, sampling: object, choice: int) -> int:
        if len(history) - prompt_length == 5:  # type: ignore[arg-type]
            backend.break_off()
        return steps(history, prompt_length, sampling, choice)  # type: ignore[arg-type]

    backend.worker.script = failing
    answer = await client.post(PATH, json={**ENDLESS, "stream": True})
    assert answer.status_code == 200
    last = answer.text.strip().split("\n\n")[-1]
    assert last.startswith('data: {"error":{"message":"The replica could not go on')
    assert "[DONE]" not in answer.text
    whole = await client.post(PATH, json=ENDLESS)
    assert whole.status_code == 503
