"""The stream over a Unix socket: every item whole and in order, and ends told from breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from fabric.cluster.local_stream import LENGTH, connect, listen


async def numbers(dispatcher: str) -> AsyncIterator[bytes]:
    for number in range(100):
        yield f"{dispatcher} {number} ".encode() * (number * 50)


async def test_items_come_whole_in_order_and_end(tmp_path: Path) -> None:
    async with await listen(tmp_path / "s", numbers):
        got = [item async for item in connect(tmp_path / "s", "d0")]
    assert got == [item async for item in numbers("d0")]


async def test_a_reader_that_leaves_ends_the_items(tmp_path: Path) -> None:
    ended = asyncio.Event()

    async def endless(_: str) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x" * 100_000
        finally:
            ended.set()

    async with await listen(tmp_path / "s", endless):
        async with aclosing(connect(tmp_path / "s", "d0")) as items:
            assert await anext(items)
        await asyncio.wait_for(ended.wait(), 30)


async def test_a_break_inside_an_item_is_an_error(tmp_path: Path) -> None:
    async def half(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(LENGTH.pack(10) + b"half")
        await writer.drain()
        writer.close()

    async with await asyncio.start_unix_server(half, tmp_path / "s"):
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            assert not [item async for item in connect(tmp_path / "s", "d0")]


async def test_nobody_listening_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        assert not [item async for item in connect(tmp_path / "absent", "d0")]
