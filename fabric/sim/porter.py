"""KV between two simulated replicas: what `cluster.porter` does, with a link in place of a store.

    prefill replica                                decode replica
    a plan with exports has run                    reserve(request): `engine.reserve`
      depart ── bytes over the link, in line ──>   land: `engine.landed`
                                                   follows: the decode leg waits so long at most

What is lost on its way is not sent again: the decode leg stops waiting and computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fabric.core.engine.engine import Accepted, Engine
from fabric.core.engine.handover import WRONG, Landing, arrival_of
from fabric.core.engine.plan import KvExport
from fabric.core.request import Request
from fabric.sim.clock import NS_PER_S, Clock
from fabric.sim.costs import KvLink, Profile

# As in `cluster.porter`: blocks are kept for a prompt so long, and a request waits for its KV.
RESERVE_NS = 60 * NS_PER_S
WAIT_NS = 3 * NS_PER_S

# Asks the engine something between two steps.
Ask = Callable[[Callable[[Engine], object]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where a prompt's KV goes, and which attempt it is."""

    porter: Porter
    epoch: int


@dataclass(slots=True, kw_only=True)
class Incoming:
    """A prompt that is on its way here. `timer`: the number of the wait that counts."""

    dispatcher: str
    timer: int = 0


class Porter:
    """Both ends of one replica. `sent_bytes`, `lost_groups`: over its link."""

    def __init__(self, clock: Clock, profile: Profile, ask: Ask) -> None:
        self.sent_bytes = 0
        self.lost_groups = 0
        self._slow = (0, 0)  # until when, and by how much
        self._cut_until = 0
        self._clock = clock
        self._link: KvLink = profile.kv_link
        self._kv_bytes = profile.kv_bytes
        self._ask = ask
        self._outgoing: dict[str, Destination] = {}
        self._incoming: dict[str, Incoming] = {}
        self._busy_until = 0  # the link takes one group after the other, either way
        self._next_slot = 0
        self._timers = 0
        self._crashed = False

    def crash(self) -> None:
        """All is lost."""
        self._crashed = True
        self._outgoing, self._incoming = {}, {}

    def slow(self, until: int, later_ns: int) -> None:
        """What goes over its link comes later."""
        self._slow = (max(until, self._slow[0]), later_ns)

    def cut(self, until: int) -> None:
        """What goes over its link is lost."""
        self._cut_until = max(until, self._cut_until)

    # -- what leaves -----------------------------------------------------------------------------

    def send_to(self, request_id: str, destination: Destination) -> None:
        """The KV of this request's prompt goes there."""
        self._outgoing[request_id] = destination

    def stop_sending(self, request_id: str) -> None:
        """No more of it is wanted."""
        self._outgoing.pop(request_id, None)

    def depart(self, exports: Sequence[KvExport]) -> None:
        """The plan that copied these has run."""
        for export in exports:
            destination = self._outgoing.get(export.request_id)
            if destination is None:
                continue
            if export.last:
                del self._outgoing[export.request_id]
            self._carry(export, destination.porter)

    def _carry(self, export: KvExport, target: Porter) -> None:
        """When both ends are free; the slower of the two links tells how long it takes."""
        now = self._clock.now
        size = (export.end - export.first) * self._kv_bytes
        pace = min(self._link.bytes_per_s, target._link.bytes_per_s)
        begins = max(now, self._busy_until, target._busy_until)
        ends = begins + round(size / pace * NS_PER_S)
        self._busy_until = target._busy_until = ends
        if begins < max(self._cut_until, target._cut_until):
            self.lost_groups += 1
            return
        self.sent_bytes += size
        later = max(by if begins < until else 0 for until, by in (self._slow, target._slow))
        self._clock.at(ends + self._link.latency_ns + later, target.land, export)

    # -- what comes ------------------------------------------------------------------------------

    def reserve(
        self, request: Request, epoch: int, dispatcher: str, answer: Callable[[bool], None]
    ) -> None:
        """Keep room for a prompt; what the engine says goes to `answer`."""
        if self._crashed:
            return
        name = request.request_id
        self._incoming[name] = Incoming(dispatcher=dispatcher)
        self._expire_after(name, RESERVE_NS)

        def ask(engine: Engine) -> None:
            room = isinstance(engine.reserve(request, epoch), Accepted)
            if not room:
                self._incoming.pop(name, None)
            answer(room)

        self._ask(ask)

    def follows(self, request_id: str) -> None:
        """The request itself is here: it does not wait for ever."""
        if request_id in self._incoming:
            self._expire_after(request_id, WAIT_NS)

    def land(self, export: KvExport) -> None:
        """A group has come."""
        incoming = self._incoming.get(export.request_id)
        if incoming is None:
            return  # nobody waits for it any more
        slot, self._next_slot = self._next_slot, self._next_slot + export.blocks
        arrival = arrival_of(export, export.request_id, slot)

        def ask(engine: Engine) -> None:
            landing = engine.landed(arrival)
            if landing in WRONG or landing is Landing.UNKNOWN:
                self._incoming.pop(export.request_id, None)

        self._ask(ask)

    def give_up(self, request_id: str) -> None:
        """Wait no longer."""
        if not self._crashed:
            self._incoming.pop(request_id, None)
            self._ask(lambda engine: engine.give_up(request_id))

    def leave(self, dispatcher: str) -> None:
        """That dispatcher is gone, and with it its requests."""
        for name, incoming in list(self._incoming.items()):
            if incoming.dispatcher == dispatcher:
                self.give_up(name)

    def _expire_after(self, name: str, wait_ns: int) -> None:
        self._timers += 1
        self._incoming[name].timer = self._timers
        self._clock.after(wait_ns, self._expire, name, self._timers)

    def _expire(self, name: str, timer: int) -> None:
        incoming = self._incoming.get(name)
        if incoming is not None and incoming.timer == timer:
            self.give_up(name)
