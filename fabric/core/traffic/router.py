"""Which replica gets the next request: the one with the least predicted work, if it has head-room.

A snapshot is always a little old. What this dispatcher has sent since it was taken is added, so
that a burst does not all go to the replica that was idle a moment ago. What other dispatchers have
sent in the meantime is unknown until the next one; the head-room rule bounds that error.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from fabric.core.configs import RouterConfig
from fabric.core.request import Request
from fabric.core.snapshot import ReplicaSnapshot
from fabric.core.traffic.admission import work_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Send the request there. `work_tokens`: what was predicted to be ahead of it."""

    replica_id: str
    work_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NoReplica:
    """Keep the request. `busy`: there are replicas, but none has head-room; ask again later."""

    busy: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    at: int
    tokens: int


class Router:
    """`choose` takes its answer for sent: the caller does send it, or loses a little accuracy.

    `ReplicaSnapshot.taken` and `now` must be of one clock: a snapshot of another machine is
    stamped again when it arrives.
    """

    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self._sent: dict[str, deque[_Sent]] = {}

    def choose(
        self, request: Request, snapshots: Sequence[ReplicaSnapshot], now: int
    ) -> Choice | NoReplica:
        """The replica with head-room that would reach this request first. Ties: the lower id."""
        self._forget_what_snapshots_show(snapshots)
        best: tuple[int, str] | None = None
        for snapshot in snapshots:
            waiting = snapshot.waiting_tokens + self._sent_tokens(snapshot.replica_id)
            if waiting < self.config.headroom_tokens:
                # Each running sequence takes one token of every step from those that wait.
                candidate = (waiting + snapshot.running + snapshot.swapped, snapshot.replica_id)
                best = candidate if best is None else min(best, candidate)
        if best is None:
            return NoReplica(busy=bool(snapshots))
        work, replica_id = best
        sent = _Sent(at=now, tokens=work_tokens(request))
        self._sent.setdefault(replica_id, deque()).append(sent)
        return Choice(replica_id=replica_id, work_tokens=work)

    def check(self) -> None:
        """What was sent is in order of time, and each but the last found head-room."""
        for sent in self._sent.values():
            times = [item.at for item in sent]
            assert times == sorted(times), "sent in order"
            before_last = sum(item.tokens for item in sent) - (sent[-1].tokens if sent else 0)
            assert before_last < self.config.headroom_tokens, "sent without head-room"

    def _sent_tokens(self, replica_id: str) -> int:
        return sum(item.tokens for item in self._sent.get(replica_id, ()))

    def _forget_what_snapshots_show(self, snapshots: Sequence[ReplicaSnapshot]) -> None:
        taken = {snapshot.replica_id: snapshot.taken for snapshot in snapshots}
        for replica_id in [name for name in self._sent if name not in taken]:
            del self._sent[replica_id]
        for replica_id, sent in self._sent.items():
            while sent and sent[0].at + self.config.in_transit_ns < taken[replica_id]:
                sent.popleft()
