"""`Detours` hold whatever becomes of either replica, and the search sees planted bugs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from kit.detour_machine import DetourMachine
from kit.planting import Mutation, constant, must_find

from fabric.cluster.detour import Chunks, Detours, _Legs
from fabric.cluster.wire import encode_request
from fabric.core.request import Request, TokenChunk
from fabric.core.traffic.handoff import Event

TestDetours = DetourMachine.TestCase
TestDetours.settings = settings(max_examples=20, stateful_step_count=30)


def overtaking(_: Callable[..., Any]) -> Callable[..., Any]:
    """What is reserved is given up before it has been asked for."""

    async def give_up(self: _Legs, event: Event) -> None:
        reason = "" if event is Event.CLOSED else event.value
        name, link = self._request.request_id, self._decode
        with suppress(ConnectionError):
            await link.calls.give_up(link.replica_id, name, reason)

    return give_up


def the_legs_end(_: Callable[..., Any]) -> Callable[..., Any]:
    """The client is told that it was all."""

    def first(self: _Legs, chunk: TokenChunk) -> TokenChunk:
        self._token = chunk.tokens[-1]
        return chunk

    return first


def never_an_end(_: Callable[..., Any]) -> Callable[..., Any]:
    """A request that ends with its first token goes on."""

    def first(self: _Legs, chunk: TokenChunk) -> TokenChunk:
        self._token = chunk.tokens[-1]
        return replace(chunk, finish=None)

    return first


def roomy(original: Callable[..., Any]) -> Callable[..., Any]:
    """Any context is long enough."""

    def first(self: _Legs, chunk: TokenChunk) -> Any:
        before = self._request
        self._request = replace(before, prompt=before.prompt[:1])
        found = original(self, chunk)
        self._request = before
        return found

    return first


def room_for_all(_: Callable[..., Any]) -> Callable[..., Any]:
    """Who can't be asked has room."""

    async def reserve(self: _Legs) -> None:
        try:
            room = await self._decode.calls.reserve(
                self._decode.replica_id, encode_request(self._request), self._epoch
            )
        except ConnectionError:
            return
        if not room:
            self._do(Event.REFUSED)

    return reserve


def for_nobody(_: Callable[..., Any]) -> Callable[..., Any]:
    """The decode leg runs although its client has all that it wants."""

    async def run_pair(
        self: Detours, request: Request, pair: Any, _over: Callable[[], bool]
    ) -> AsyncGenerator[Chunks, None]:
        self._attempts += 1
        one = _Legs(self, request, pair, epoch=self._attempts)
        try:
            async with aclosing(one.prefill()) as items:
                async for chunks in items:
                    yield chunks
            if one.goes_on:
                async with aclosing(one.decode()) as items:
                    async for chunks in items:
                        yield chunks
        finally:
            one.close()

    return run_pair


def silent(*silenced: Event) -> Any:
    """These events are nothing to the hand-over."""

    def wrong(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, event: None if event in silenced else original(self, event)

    return wrong


PLANTED: list[Mutation] = [
    (Detours, "_run_pair", for_nobody),
    (_Legs, "close", constant(None)),
    (_Legs, "_arrive", constant(None)),
    (_Legs, "_first", the_legs_end),
    (_Legs, "_first", never_an_end),
    (_Legs, "_first", roomy),
    (_Legs, "_reserve", room_for_all),
    (_Legs, "_give_up", overtaking),
    (_Legs, "_do", silent(Event.CLOSED)),
    (_Legs, "_do", silent(Event.REFUSED)),
    (_Legs, "_do", silent(Event.PREFILL_LOST)),
    (_Legs, "_do", silent(Event.ENDED)),
]


@pytest.mark.parametrize("mutation", PLANTED)
def test_a_planted_bug_is_found(mutation: Mutation) -> None:
    must_find(DetourMachine, mutation)
