"""A `Link` holds under any order of events, and the search sees planted bugs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
from hypothesis import settings
from kit.link_machine import LinkMachine
from kit.planting import Mutation, constant, must_find

from fabric.cluster.link import Link, Lost, Mailbox, ReplicaGone
from fabric.cluster.reports import ReplicaReport
from fabric.cluster.wire import decode_step, encode_request
from fabric.core.errors import RequestError, Unavailable
from fabric.core.request import Finish, Request, TokenChunk

TestLink = LinkMachine.TestCase
TestLink.settings = settings(max_examples=20, stateful_step_count=30)


def goes_on(_: Callable[..., Any]) -> Callable[..., Any]:
    """Who leaves leaves its call behind."""

    async def run(
        self: Link, request: Request, target: str | None = None, epoch: int = 0
    ) -> AsyncGenerator[tuple[TokenChunk, ...], None]:
        mailbox = self.opened[request.request_id] = Mailbox(request)
        self._wanted.set()
        call = self.calls.generate(self.replica_id, encode_request(request), target, epoch)
        asyncio.get_running_loop().create_task(self._watch(call, mailbox))
        try:
            while mailbox.choices_left or mailbox.pending():
                yield await mailbox.take()
        finally:
            self.opened.pop(request.request_id, None)

    return run


def after_its_end_too(_: Callable[..., Any]) -> Callable[..., Any]:
    """One that has ended is counted as asked to."""
    return lambda self, choice: self.stopped.add(choice)


def still_gone(_: Callable[..., Any]) -> Callable[..., Any]:
    """Who was found gone stays gone, whatever it answers."""

    def update(self: Link, report: ReplicaReport, now_s: float) -> None:
        self.report = report
        self.seen_s = now_s
        self._note(report.snapshot)

    return update


def told_first(_: Callable[..., Any]) -> Callable[..., Any]:
    """What is open goes on elsewhere before anybody knows who was at work."""

    def died(self: Link, at_work: Any) -> None:
        self.left = True
        self.lose()
        self.listener.died(self.replica_id, at_work)

    return died


def whatever_comes_last(_: Callable[..., Any]) -> Callable[..., Any]:
    """A snapshot that was overtaken on its way replaces the newer one."""

    def note(self: Link, snapshot: Any) -> None:
        self.snapshot = snapshot
        self.listener.news()

    return note


def an_end_like_others(original: Callable[..., Any]) -> Callable[..., Any]:
    """The last chunk of an engine that broke is given to the client."""

    def deliver(self: Link, item: bytes) -> None:
        for chunk in decode_step(item).chunks:
            mailbox = self.opened.get(chunk.request_id)
            if mailbox is not None and chunk.finish is Finish.ERROR:
                mailbox.put(chunk)
        original(self, item)

    return deliver


def nobody_was_at_work(original: Callable[..., Any]) -> Callable[..., Any]:
    """An engine that broke is like a process that is gone: nobody knows why."""
    return lambda self, _at_work: original(self, None)


def all_alike(_: Callable[..., Any]) -> Callable[..., Any]:
    """A request that never arrived counts as one that was lost."""

    async def watch(self: Link, call: Any, mailbox: Mailbox) -> None:
        try:
            await call
            if mailbox.choices_left:
                await asyncio.sleep(0)
                mailbox.fail(Lost(self.replica_id))
        except asyncio.CancelledError:
            mailbox.fail(Unavailable("The request was cancelled.", retry_after_s=1.0))
        except ReplicaGone:
            self.left = True
            mailbox.fail(Lost(self.replica_id))
        except ValueError as error:
            mailbox.fail(RequestError(str(error)))
        except Exception as error:  # noqa: BLE001 - as the original
            if self.calls.died(error):
                self._died(None)
            mailbox.fail(Lost(self.replica_id))

    return watch


def open_again(original: Callable[..., Any]) -> Callable[..., Any]:
    """Who was forgotten is sent to."""

    def run(self: Link, *words: Any, **named: Any) -> Any:
        self.closed = False
        return original(self, *words, **named)

    return run


def read_once(_: Callable[..., Any]) -> Callable[..., Any]:
    """A stream that has ended is opened with the next request only."""

    async def read(self: Link) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                async for item in self.calls.steps(self.replica_id):
                    self._deliver(item)
            except (ReplicaGone, OSError):
                await asyncio.sleep(0)
            except Exception as error:  # noqa: BLE001 - as the original
                if self.calls.died(error):
                    self._died(None)
                self.lose()

    return read


def waits_for_ever(_: Callable[..., Any]) -> Callable[..., Any]:
    """A stream that broke is opened again, and nobody is told."""

    async def read(self: Link) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                async for item in self.calls.steps(self.replica_id):
                    self._deliver(item)
            except Exception:  # noqa: BLE001 - whatever it is
                await asyncio.sleep(0)
            if self.opened:
                self._wanted.set()

    return read


def still_listens(_: Callable[..., Any]) -> Callable[..., Any]:
    """A replica that is forgotten is listened to."""
    return lambda self: self._died(None)


PLANTED: list[Mutation] = [
    (Link, "run", goes_on),
    (Link, "run", open_again),
    (Mailbox, "stop", constant(None)),
    (Mailbox, "fail", constant(None)),
    (Link, "update", still_gone),
    (Link, "lose", constant(None)),
    (Link, "_died", told_first),
    (Link, "_died", nobody_was_at_work),
    (Link, "_note", whatever_comes_last),
    (Link, "_deliver", an_end_like_others),
    (Link, "_watch", all_alike),
    (Link, "_read", read_once),
    (Link, "_read", waits_for_ever),
    (Link, "close", still_listens),
]


# Their search takes a second.
LONG: list[Mutation] = [
    (Mailbox, "stop", after_its_end_too),
    (Mailbox, "unheard", constant(None)),
    (Mailbox, "unheard", lambda _: lambda self, choice: self.stopped.discard(choice)),
]


@pytest.mark.parametrize("mutation", PLANTED)
def test_a_planted_bug_is_found(mutation: Mutation) -> None:
    must_find(LinkMachine, mutation)


@pytest.mark.nightly
@pytest.mark.parametrize("mutation", LONG)
def test_a_planted_bug_is_found_at_length(mutation: Mutation) -> None:
    must_find(LinkMachine, mutation)
