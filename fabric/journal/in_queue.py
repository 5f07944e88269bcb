"""A request before the engines, as a dispatcher's journal tells it: its wait, and its way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fabric.core.replay import Played, Replay, Verb
from fabric.core.request import Request
from fabric.core.snapshot import ReplicaSnapshot
from fabric.core.traffic.admission import Admission, Admitted, Shed
from fabric.core.traffic.router import Choice, Router
from fabric.core.traffic.station import Station
from fabric.journal.story import NS_PER_S, Story

NS_PER_MS = 1_000_000
SHOWN = 4  # replicas


class InQueue:
    """Looks on while a dispatcher's journal is played. `queue`: its machine that admits."""

    def __init__(self, replay: Replay, name: str, where: str, queue: str) -> None:
        self.story = Story(where=where)
        self._replay = replay
        self._name = name
        self._queue = queue
        self._prices = ""

    def after(self, played: Played) -> None:
        """A verb has been played."""
        verbs: Mapping[str, Callable[..., None]] = {
            "offer": self._offer,
            "heads": self._heads,
            "choose": self._choose,
            "completed": self._completed,
            "requeue": self._requeue,
            "cancel": self._cancel,
            "expire": self._expire,
        }
        if played.verb in verbs:
            verbs[played.verb](played, *played.arguments)

    @property
    def _admission(self) -> Admission:
        found: Admission = self._replay.machines[self._queue]
        return found

    def _is(self, request: Any) -> bool:
        return isinstance(request, Request) and request.request_id == self._name

    def _offer(self, played: Played, request: Request, now: int) -> None:
        outcome = played.outcome
        if isinstance(outcome, Admitted) and self._name in [
            other.request_id for other in outcome.displaced
        ]:
            self.story.tell(now, f"leaves the queue for {request.request_id} ({request.tier})")
        if not self._is(request):
            return
        sampling = request.sampling
        self.story.tell(
            now,
            f"arrives: tier {request.tier}, tenant {request.tenant or '-'}, "
            f"{len(request.prompt):,} prompt tokens, at most {sampling.max_tokens:,} to come"
            + (f", {sampling.n} choices" if sampling.n > 1 else ""),
        )
        if isinstance(outcome, Shed):
            self.story.tell(
                now, f"turned away: {outcome.reason}; to come back in {outcome.retry_after_s:.1f} s"
            )
        elif isinstance(outcome, Admitted):
            self._admitted(outcome, now)

    def _admitted(self, outcome: Admitted, now: int) -> None:
        entry = self._admission._lines.get(self._name)
        assert entry is not None, "admitted, and not in the queue"
        slack_s = (entry.key[0] - now) / NS_PER_S
        self.story.tell(
            now,
            f"queued: {outcome.ahead_tokens:,} tokens before it in its line, {slack_s:.2f} s of "
            f"slack, {entry.expected.likely:,} tokens of output expected"
            + (f"; degraded: {outcome.degraded}" if outcome.degraded else ""),
        )

    def _requeue(self, _: Played, request: Request, now: int) -> None:
        if self._is(request):
            sent = sum(map(len, request.generated))
            self.story.tell(now, f"its replica was lost after {sent:,} tokens: it waits again")

    def _heads(self, played: Played, now: int) -> None:
        """Was it its turn, and if not, why?"""
        admission = self._admission
        entry = admission._lines.get(self._name)
        if entry is None or self._name in [one.request_id for one in played.outcome]:
            return
        tenant = entry.request.tenant
        line = admission._lines.line(entry.rank, tenant)
        ahead = 0 if line is None else line.ahead_of(entry.key)
        if not admission.service.has_place(tenant):
            self.story.lasts(now, "for its tenant's limit", "as many of its tenant run as may")
        elif not admission._has_place(entry.rank):
            self.story.lasts(
                now, "for a place of its tier", "the other places are kept for better tiers"
            )
        elif ahead:
            self.story.lasts(
                now, "in its line", f"waits: {ahead:,} tokens are before it in its line"
            )
        else:
            self.story.lasts(
                now, "for other tenants' shares", "waits: another tenant is further behind"
            )

    def before(self, machine: Any, verb: Verb, arguments: tuple[Any, ...]) -> None:
        """What every replica would cost, before the choice changes the router."""
        if verb.verb != "choose" or not self._is(arguments[0]) or not isinstance(machine, Router):
            return
        request, snapshots, now = arguments
        digests = machine.index._chains.get(self._name, verb.noted)
        depths = machine.index.match(digests)
        self._prices = _prices(machine, request, (snapshots, depths), now)

    def _choose(self, played: Played, request: Request, snapshots: Any, now: int) -> None:
        if not self._is(request):
            return
        if not isinstance(played.outcome, Choice):
            text = self._prices if snapshots else "there is no replica"
            self.story.lasts(now, "for head-room", f"its turn, but {text}")
            return
        choice = played.outcome
        self.story.tell(
            now,
            f"goes to {choice.replica_id}: done in {choice.cost_ns / NS_PER_MS:,.0f} ms, "
            f"{choice.cached_tokens:,} tokens probably cached there; {self._prices}",
        )

    def _completed(self, played: Played, request: Request, now: int) -> None:
        if self._is(request):
            how = "finished" if played.named["finished"] else "broken off"
            self.story.tell(now, f"{how}, with {played.named['tokens']:,} tokens")

    def _cancel(self, played: Played, request_id: str, now: int) -> None:
        if request_id == self._name and played.outcome:
            self.story.tell(now, "its client leaves while it waits")

    def _expire(self, played: Played, now: int) -> None:
        if any(self._is(one) for one in played.outcome):
            self.story.tell(now, "has waited longer than it may, or past its deadline: out")


def _prices(
    router: Router,
    request: Request,
    known: tuple[tuple[ReplicaSnapshot, ...], dict[str, int]],
    now: int,
) -> str:
    """Each replica's, the cheapest first; the looks are the router's own."""
    snapshots, depths = known
    router._see(snapshots)  # as the choice will do first; a second time changes nothing
    rank = router._rank(request.tier)
    wait = router._waits.get(request.request_id)
    since = router._number + 1 if wait is None else wait.promise.since
    found = []
    for snapshot in snapshots:
        station = Station(router.config, snapshot)  # a copy: an outlook forgets old promises
        station.sent.extend(router._stations[snapshot.replica_id].sent)
        station.promised |= router._stations[snapshot.replica_id].promised
        view = station.outlook(rank, now, since)
        price = router._price(request, snapshot.replica_id, view, depths)
        ms = f"{snapshot.replica_id} {price.cost_ns / NS_PER_MS:,.0f} ms"
        if not station.has_room(rank, now):
            ms += f" but no head-room ({view.ahead_tokens:,.0f} tokens wait there)"
        found.append((price.cost_ns, snapshot.replica_id, ms))
    shown = [text for *_, text in sorted(found)[:SHOWN]]
    more = len(found) - len(shown)
    return "replicas: " + ", ".join(shown) + (f" and {more} dearer ones" if more else "")
