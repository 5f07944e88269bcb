"""A request's way through two replicas: one computes its prompt, the other one its output.

    prefill.run(prompt, 1 token) ── KV ──> decode replica (see `porter`)
          token 1 ──> client                decode.run(resumed with token 1) ──> the other tokens

`core.traffic.handoff` says what comes next; here it is done.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any

from fabric.cluster.link import Link
from fabric.cluster.wire import encode_request
from fabric.core.request import Request, TokenChunk
from fabric.core.traffic.fetching import Fetch
from fabric.core.traffic.handoff import (
    Action,
    Event,
    Handoff,
    decode_leg,
    leg_ends,
    prefill_leg,
)
from fabric.core.traffic.journey import Journey

NS = 1_000_000_000
GIVE_UP_AFTER_S = 10.0
Chunks = tuple[TokenChunk, ...]
# Events that are counted.
COUNTED = (Event.REFUSED, Event.SAMPLED, Event.PREFILL_LOST, Event.DECODE_LOST)
# What `Detours.samples` means.
MEANING: Mapping[str, str] = {
    **{
        f"fabric_handover_{event.value}_total": f"Hand-overs, by what happened: {event.value}."
        for event in COUNTED
    },
    "fabric_handover_gaps_total": "Pauses between the first token and the second.",
    "fabric_handover_gap_seconds_total": "How long these pauses were, in all.",
}


class Detours:
    """All hand-overs of a dispatcher. `counts`: names as metrics have them; they only grow."""

    def __init__(self) -> None:
        self.counts: dict[str, float] = {}
        self.under_way = 0  # their second token has not come
        self._attempts = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def run(
        self, journey: Journey, prefill: Link | None, link: Link, fetch: Fetch | None = None
    ) -> AsyncGenerator[Chunks, None]:
        """As `Link.run`: on `link`, by way of `prefill` if there is one. Raises what the one that
        is lost raises; what was sent until then is sent."""
        request = journey.outgoing()
        if prefill is None:
            return link.run(request, fetch=fetch)
        return self._run_pair(request, (prefill, link), lambda: journey.done)

    async def _run_pair(
        self, request: Request, pair: tuple[Link, Link], over: Callable[[], bool]
    ) -> AsyncGenerator[Chunks, None]:
        self._attempts += 1
        one = _Legs(self, request, pair, epoch=self._attempts)
        try:
            async with aclosing(one.prefill()) as items:
                async for chunks in items:
                    yield chunks
            if not one.goes_on or over():
                return
            async with aclosing(one.decode()) as items:
                async for chunks in items:
                    yield chunks
        finally:
            one.close()

    def samples(self) -> dict[str, float]:
        """Prometheus series -> value."""
        return {f"fabric_handover_{name}_total": value for name, value in self.counts.items()}

    def count(self, name: str, amount: float = 1) -> None:
        """One more."""
        self.counts[name] = self.counts.get(name, 0) + amount

    def begin(self, work: Any) -> asyncio.Task[None]:
        """Run something beside the request. Serve ties calls to the HTTP request in whose context
        they are made: these must outlive it."""
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(
            work, context=contextvars.Context()
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class _Legs:
    """One request."""

    def __init__(
        self, detours: Detours, request: Request, pair: tuple[Link, Link], *, epoch: int
    ) -> None:
        self._detours = detours
        self._request = request
        self._prefill, self._decode = pair
        self._epoch = epoch
        self._handoff = Handoff()
        self._token: int | None = None
        self._reserving: asyncio.Task[None] | None = None
        self._arrived = False
        detours.under_way += 1

    @property
    def goes_on(self) -> bool:
        """Token 1 was not the last one."""
        return self._token is not None

    async def prefill(self) -> AsyncGenerator[Chunks, None]:
        """The prompt and the first token."""
        self._do(Event.BEGAN)
        leg = prefill_leg(self._request)
        run = self._prefill.run(leg, target=self._decode.replica_id, epoch=self._epoch)
        try:
            async with aclosing(run) as items:
                async for chunks in items:
                    yield tuple(self._first(chunk) for chunk in chunks)
        except Exception:
            self._do(Event.PREFILL_LOST)
            raise
        self._do(Event.SAMPLED if self.goes_on else Event.ENDED)

    async def decode(self) -> AsyncGenerator[Chunks, None]:
        """All other tokens."""
        assert self._token is not None
        sampled = self._handoff.sampled or 0
        try:
            async with aclosing(self._decode.run(decode_leg(self._request, self._token))) as items:
                async for chunks in items:
                    if not self._arrived:
                        self._arrive()
                        self._detours.count("gaps")
                        gap_ns = time.time_ns() - sampled
                        self._detours.count("gap_seconds", gap_ns / NS)
                    yield chunks
        except Exception:
            self._do(Event.DECODE_LOST)
            raise
        self._do(Event.ENDED)

    def close(self) -> None:
        """However it ended: nothing is kept."""
        if not self._arrived:
            self._arrive()
        self._do(Event.CLOSED)
        self._handoff.check()

    def _arrive(self) -> None:
        self._arrived = True
        self._detours.under_way -= 1

    def _first(self, chunk: TokenChunk) -> TokenChunk:
        """The leg's end is not the request's."""
        report = self._decode.report
        limit = report.context_limit if report is not None else 0
        if not chunk.tokens or leg_ends(chunk.finish, self._request, limit):
            return chunk
        self._token = chunk.tokens[-1]
        return replace(chunk, finish=None)

    def _do(self, event: Event) -> None:
        if event in COUNTED:
            self._detours.count(event.value)
        for action in self._handoff.advance(event, time.time_ns()):
            if action is Action.RESERVE:
                self._reserving = self._detours.begin(self._reserve())
            elif action is Action.GIVE_UP:
                self._detours.begin(self._give_up(event))

    async def _reserve(self) -> None:
        calls, replica_id = self._decode.calls, self._decode.replica_id
        try:
            room = await calls.reserve(replica_id, encode_request(self._request), self._epoch)
        except Exception:  # noqa: BLE001 - Serve raises many kinds; the decode leg will tell
            room = False
        if not room:
            self._do(Event.REFUSED)

    async def _give_up(self, event: Event) -> None:
        reason = "" if event is Event.CLOSED else event.value
        if self._reserving is not None:  # else the one may overtake the other
            await asyncio.wait([self._reserving], timeout=GIVE_UP_AFTER_S)
        with suppress(Exception):  # it may be gone
            await self._decode.calls.give_up(
                self._decode.replica_id, self._request.request_id, reason
            )
