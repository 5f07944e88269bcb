"""A request's way through two simulated pools: `cluster.detour` without asyncio.

The real `Handoff` says what comes next; here it is done, over links that take their time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fabric.core.request import Request, TokenChunk
from fabric.core.traffic.handoff import (
    Action,
    Event,
    Handoff,
    Stage,
    decode_leg,
    leg_ends,
    prefill_leg,
)
from fabric.sim.porter import Destination
from fabric.sim.replica import Replica

if TYPE_CHECKING:
    from fabric.sim.dispatcher import Dispatcher


class Detour:
    """One attempt. `at`: the replica that has it; `token`: what the first leg drew."""

    def __init__(
        self, owner: Dispatcher, request: Request, pair: tuple[Replica, Replica], epoch: int
    ) -> None:
        self.at, self._decode = pair
        self.handoff = Handoff()
        self.token: int | None = None
        self._owner = owner
        self._request = request
        self._epoch = epoch

    @property
    def sampled(self) -> bool:
        """The first leg has drawn its token, and nobody has been told."""
        return self.token is not None and self.handoff.stage is Stage.PREFILL

    def leg(self) -> tuple[Request, Destination | None]:
        """What `at` is to do, and where the KV of it goes."""
        if self.token is None:
            return prefill_leg(self._request), Destination(
                porter=self._decode.porter, epoch=self._epoch
            )
        return decode_leg(self._request, self.token), None

    def first(self, chunk: TokenChunk) -> TokenChunk:
        """A chunk as its client shall see it: the first leg's end is not the request's."""
        if self.token is not None or not chunk.tokens:
            return chunk
        limit = self._decode.engine.config.context_limit
        if leg_ends(chunk.finish, self._request, limit):
            return chunk
        self.token = chunk.tokens[-1]
        return replace(chunk, finish=None)

    def advance(self, event: Event) -> bool:
        """What happened is told, and done what follows. True: `at` is to be asked for its leg."""
        owner, decode = self._owner, self._decode
        goes = False
        for action in self.handoff.advance(event, owner.clock.now):
            wire_ns = owner.wire(decode.name)
            if action is Action.RESERVE:
                what = (self._request, self._epoch, owner.name, self._answer)
                owner.clock.after(wire_ns, decode.porter.reserve, *what)
            elif action is Action.GIVE_UP:
                name = self._request.request_id
                owner.clock.after(wire_ns, decode.porter.give_up, name)
            elif action is Action.DECODE:
                self.at, goes = decode, True
            elif action is Action.PREFILL:
                goes = True
        self.handoff.check()
        return goes

    def _answer(self, room: bool) -> None:
        if not room:
            self._owner.clock.after(self._owner.wire(self._decode.name), self._refused)

    def _refused(self) -> None:
        self._owner.note_handover(Event.REFUSED)
        self.advance(Event.REFUSED)
