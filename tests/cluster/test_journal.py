"""Dispatcher and engines as they serve, without Ray, with journals: replayed and explained."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from pathlib import Path

import pytest
from kit.local_replica import (
    LocalCalls,
    LocalReplica,
    collect,
    dispatcher,
    engine_config,
    paced,
    request,
    settle,
    tokens_of,
)

from fabric.cli import main
from fabric.cluster.journal import recorder_of
from fabric.config.journal import JournalSection
from fabric.core.errors import Overloaded
from fabric.core.journal import Recorder
from fabric.journal.writer import Writer

QUEUED = 10
REQUESTS = 22  # more than can run and wait


def recorder(folder: Path, stream: str, name: str) -> Recorder:
    """As the configuration makes it."""
    made = recorder_of(JournalSection(path=str(folder), file_bytes=1 << 16), stream, name)
    assert made is not None
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Journals of two replicas and a dispatcher that had more to do than fits: a full queue,
    preemptions, a client that left."""
    made = tmp_path_factory.mktemp("journals")
    asyncio.run(serve(made))
    return made


async def serve(folder: Path) -> None:
    config = engine_config(num_blocks=20, num_host_blocks=8, max_sequences=4, context_limit=64)
    names = ("r0", "r1")
    recorders = [recorder(folder, "engine", name) for name in names]
    replicas = [
        LocalReplica(name, config, paced(0.002), journal=one)
        for name, one in zip(names, recorders, strict=True)
    ]
    front_recorder = recorder(folder, "dispatcher", "d0")
    calls = LocalCalls("d0", *replicas)
    front = await dispatcher(calls, journal=front_recorder, max_queued_requests=QUEUED)
    asked = [request(f"q{number}", 20, max_tokens=30) for number in range(REQUESTS)]
    tasks = [asyncio.ensure_future(collect(front, one)) for one in asked]
    await asyncio.sleep(0.05)
    tasks[3].cancel()
    for number, task in enumerate(tasks):
        if number != 3:
            with suppress(Overloaded):
                assert tokens_of(await task)
    await settle(calls)
    for replica in replicas:
        replica.stop()
    for one in (*recorders, front_recorder):
        assert isinstance(one.sink, Writer)
        one.sink.close()


def test_everybody_decides_the_same_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(folder)]) == 0
    said = capsys.readouterr().out
    assert said.count("every outcome is the same") == 3


def test_a_request_is_explained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "chatcmpl-q9", "--journal", str(folder)]) == 0
    said = capsys.readouterr().out
    for part in (
        "dispatcher d0  arrives: tier standard, tenant -, 20 prompt tokens, at most 30 to come",
        "queued: ",
        "the other places are kept for better tiers",
        "goes to r",
        "engine r",
        "first token",
        "ends: length, after 30 tokens",
        "finished, with 30 tokens",
        "It waited ",
        " for a place of its tier",
    ):
        assert part in said, said
    chosen = re.search(r"goes to (r\d): done in (\S+ ms)", said)
    assert chosen is not None
    assert f"{chosen[1]} {chosen[2]}" in said.split("replicas: ")[1], "another price than its own"


def test_who_left_and_who_was_turned_away_too(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", "q3", "--journal", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "broken off" in said or "its client leaves" in said
    assert main(["explain", f"q{REQUESTS - 1}", "--journal", str(folder)]) == 0
    assert "turned away: " in capsys.readouterr().out
    assert main(["explain", "nobody", "--journal", str(folder)]) == 1
    assert "no journal knows of nobody" in capsys.readouterr().err
