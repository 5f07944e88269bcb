"""`Outbox` and `Mailbox` hold under any order of events, and the search sees planted bugs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from kit.delivery_machine import DeliveryMachine
from kit.planting import SEARCH, Wrong, constant, planted

from fabric.cluster.link import Mailbox
from fabric.cluster.outbox import Outbox
from fabric.cluster.wire import encode_step

TestDelivery = DeliveryMachine.TestCase
TestDelivery.settings = settings(max_examples=40, stateful_step_count=30)


def newest_only(original: Callable[..., Any]) -> Callable[..., Any]:
    """A slow reader gets only the last chunk."""

    def put(self: Outbox, chunk: Any) -> None:
        self._chunks.clear()
        original(self, chunk)

    return put


def calls_stay_open(_: Callable[..., Any]) -> Callable[..., Any]:
    """The stream ends; what was open is not told."""

    def close(self: Outbox) -> None:
        self.closed = True
        self._news.set()

    return close


def any_reader(_: Callable[..., Any]) -> Callable[..., Any]:
    """An older reader stays beside the newer."""

    async def items(self: Outbox) -> AsyncIterator[bytes]:
        while True:
            await self._news.wait()
            if self.closed:
                return
            self._news.clear()
            chunks, self._chunks = self._chunks, []
            snapshot, self._snapshot = self._snapshot, None
            if snapshot is not None:
                yield encode_step(snapshot, chunks)
            elif self._hang_up and not self.opened:
                return

    return items


def hangs_up_on_waiters(_: Callable[..., Any]) -> Callable[..., Any]:
    """Open requests are no reason to keep the stream."""

    async def items(self: Outbox) -> AsyncIterator[bytes]:
        self._reader += 1
        me = self._reader
        self._hang_up = False
        self._news.set()
        while True:
            await self._news.wait()
            if self.closed or me != self._reader:
                return
            self._news.clear()
            chunks, self._chunks = self._chunks, []
            snapshot, self._snapshot = self._snapshot, None
            if snapshot is not None:
                yield encode_step(snapshot, chunks)
            elif self._hang_up:
                return

    return items


def one_at_a_time(_: Callable[..., Any]) -> Callable[..., Any]:
    """The rest of what came is forgotten."""

    async def take(self: Mailbox) -> Any:
        while not self._chunks:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        first = self._chunks[0]
        self._chunks.clear()
        return (first,)

    return take


def bad_news_first(original: Callable[..., Any]) -> Callable[..., Any]:
    """A failure overtakes the chunks that came before it."""

    async def take(self: Mailbox) -> Any:
        if self._error is not None:
            raise self._error
        return await original(self)

    return take


def never_the_last(_: Callable[..., Any]) -> Callable[..., Any]:
    """Finished choices are not counted."""

    def put(self: Mailbox, chunk: Any) -> None:
        self._chunks.append(chunk)
        self._wake()

    return put


PLANTED: list[tuple[type, str, Wrong]] = [
    (Outbox, "put", newest_only),
    (Outbox, "refuse", constant(None)),
    (Outbox, "close", calls_stay_open),
    (Outbox, "hang_up", constant(None)),
    (Outbox, "items", any_reader),
    (Outbox, "items", hangs_up_on_waiters),
    (Mailbox, "take", one_at_a_time),
    (Mailbox, "take", bad_news_first),
    (Mailbox, "put", never_the_last),
    (Mailbox, "fail", constant(None)),
    (Mailbox, "pending", constant(False)),
]


@pytest.mark.parametrize(("owner", "method", "wrong"), PLANTED)
def test_a_planted_bug_is_found(owner: type, method: str, wrong: Wrong) -> None:
    with planted(owner, method, wrong), pytest.raises(AssertionError):
        run_state_machine_as_test(DeliveryMachine, settings=SEARCH)
