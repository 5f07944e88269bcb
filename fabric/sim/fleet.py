"""The replicas there are: started after a cold start, drained before they go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fabric.core.journal import Recorder, watched
from fabric.sim.clock import NS_PER_MS, Clock
from fabric.sim.costs import Profile
from fabric.sim.replica import MIXED, Replica, Stage

DRAIN_POLL_NS = 200 * NS_PER_MS  # how often Serve looks whether a replica that drains is done


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Replicas by stage."""

    starting: int
    ready: int
    draining: int


class Fleet:
    """Starts and stops replicas. Names are never used twice."""

    def __init__(
        self, profile: Profile, clock: Clock, lengths: Mapping[int, int], cold_start_ns: int
    ) -> None:
        """`profiles`: of pools that have one of their own."""
        self.profiles: dict[str, Profile] = {}
        self.replicas: dict[str, Replica] = {}
        self.cold_start_ns = cold_start_ns
        self.journal: Recorder | None = None
        self.news_ns: int | None = None  # of replicas that start: see `Replica`
        self._profile = profile
        self._clock = clock
        self._lengths = lengths

    def start(self, count: int, pool: str = MIXED) -> None:
        """So many replicas of a pool that are ready at once: those of time 0."""
        for _ in range(count):
            self._ready(self._new(pool))

    def scale_to(self, wanted: int) -> None:
        """Start what is missing; of what is too much, drain those that start, then the emptiest."""
        there = [one for one in self._living() if one.stage is not Stage.DRAINING]
        for _ in range(wanted - len(there)):
            self._clock.after(self.cold_start_ns, self._ready, self._new())
        excess = len(there) - wanted
        if excess > 0:
            order = sorted(there, key=_removal_order)
            for replica in order[:excess]:
                self._drain(replica)

    def crash(self, replica: Replica) -> None:
        """It dies; unless it was to go anyway, another one is started in its place."""
        wanted = replica.stage in (Stage.STARTING, Stage.READY)
        replica.crash()
        if wanted:
            self._clock.after(self.cold_start_ns, self._ready, self._new(replica.pool))

    def ready(self) -> list[Replica]:
        """Those that take requests."""
        return [one for one in self.replicas.values() if one.stage is Stage.READY]

    def count(self) -> Count:
        """Replicas by stage."""
        stages = [one.stage for one in self.replicas.values()]
        return Count(
            starting=stages.count(Stage.STARTING),
            ready=stages.count(Stage.READY),
            draining=stages.count(Stage.DRAINING),
        )

    def replica_ns(self, until: int) -> int:
        """What is paid for: the time of every replica from its order to its removal, summed."""
        spans = [(one.ordered, one.removed) for one in self.replicas.values()]
        return sum((until if removed is None else removed) - begin for begin, removed in spans)

    def check(self) -> None:
        """Every replica's own check; what is gone holds nothing."""
        for replica in self.replicas.values():
            replica.check()
            over = replica.stage is Stage.GONE and not replica.crashed
            assert not over or replica.idle, "removed with work in it"

    def _new(self, pool: str = MIXED) -> Replica:
        name = f"r{len(self.replicas):03}"
        profile = self.profiles.get(pool, self._profile)
        replica = Replica(name, self._clock, profile, self._lengths)
        replica.pool = pool
        replica.news_ns = self.news_ns
        replica.engine = watched(self.journal, name, replica.engine)
        self.replicas[name] = replica
        return replica

    def _ready(self, replica: Replica) -> None:
        if replica.stage is Stage.STARTING:  # else it was not wanted any more
            replica.stage = Stage.READY

    def _drain(self, replica: Replica) -> None:
        if replica.stage is Stage.STARTING:
            self._remove(replica)
            return
        replica.stage = Stage.DRAINING
        self._clock.after(DRAIN_POLL_NS, self._look, replica)

    def _look(self, replica: Replica) -> None:
        if replica.stage is Stage.GONE:
            return  # it died before it was done
        if replica.idle:
            self._remove(replica)
        else:
            self._clock.after(DRAIN_POLL_NS, self._look, replica)

    def _remove(self, replica: Replica) -> None:
        replica.stage = Stage.GONE
        replica.removed = self._clock.now

    def _living(self) -> list[Replica]:
        return [one for one in self.replicas.values() if one.stage is not Stage.GONE]


def _removal_order(replica: Replica) -> tuple[bool, int, str]:
    snapshot = replica.snapshot
    return replica.stage is Stage.READY, snapshot.running + snapshot.waiting, replica.name
