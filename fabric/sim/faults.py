"""What goes wrong: replicas that die or slow down, links that are slow or cut, news that is old.

A fault is data, so a storm is a list of them, drawn from a seed or by a property test, and what
ever failed can be kept. What happens then is what the cluster's parts do: a dispatcher that hears
nothing of a replica for `LOST_NS` sends its requests elsewhere, a replica that hears nothing of a
dispatcher for as long frees what it had open for it. A link that is slow or cut is so for the KV
that the replica hands over, too; what is lost of that is not sent again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from random import Random

from fabric.sim.clock import NS_PER_MS, NS_PER_S
from fabric.sim.dispatcher import Dispatcher
from fabric.sim.replica import Replica, Stage
from fabric.sim.simulation import Simulation

LOST_NS = 3 * NS_PER_S
SLOW_LINK_NS = 80 * NS_PER_MS


class FaultKind(StrEnum):
    """Of a fault."""

    CRASH = "crash"  # a replica is gone; another one is started
    STRAGGLER = "straggler"  # its steps take several times as long, for a while
    SLOW_LINK = "slow link"  # between one dispatcher and one replica, for a while
    CUT_LINK = "cut link"  # nothing comes through for a while; what was sent comes late
    STALE = "stale"  # one dispatcher hears no news of replicas, only tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`replica`, `dispatcher`: numbers, counted round among those that are there then."""

    kind: FaultKind
    at: int
    replica: int = 0
    dispatcher: int = 0
    lasts_ns: int = NS_PER_S
    factor: float = 5.0

    def __post_init__(self) -> None:
        if min(self.at, self.replica, self.dispatcher, self.lasts_ns) < 0 or self.factor < 1:
            raise ValueError(f"a fault needs numbers of at least 0 and a factor of 1: {self}")


def storm(seed: str, count: int, lasts_ns: int) -> tuple[Fault, ...]:
    """So many faults of all kinds within a time."""
    random = Random(f"storm/{seed}")
    return tuple(
        Fault(
            kind=random.choice(list(FaultKind)),
            at=random.randrange(lasts_ns),
            replica=random.randrange(64),
            dispatcher=random.randrange(8),
            lasts_ns=round(random.uniform(0.05, 6.0) * NS_PER_S),
            factor=random.uniform(2.0, 12.0),
        )
        for _ in range(count)
    )


class Weather:
    """Added to a simulation before it runs: makes the faults happen."""

    def __init__(self, simulation: Simulation, faults: Iterable[Fault]) -> None:
        self._simulation = simulation
        self._clock = simulation.clock
        self._slow_until: dict[tuple[str, str], int] = {}
        self._cut_until: dict[tuple[str, str], int] = {}
        self._came: dict[tuple[str, str], int] = {}  # when the last thing came through
        for dispatcher in simulation.dispatchers:
            dispatcher.wire = partial(self._delay_ns, dispatcher)
        for fault in faults:
            self._clock.at(fault.at, self._happen, fault)

    def _delay_ns(self, dispatcher: Dispatcher, replica: str) -> int:
        """One way, in order: nothing overtakes what was sent before it."""
        link, now = (dispatcher.name, replica), self._clock.now
        delay = dispatcher.link_ns
        if now < self._slow_until.get(link, 0):
            delay += SLOW_LINK_NS
        comes = max(now, self._cut_until.get(link, 0)) + delay
        comes = max(comes, self._came.get(link, 0))
        self._came[link] = comes
        return comes - now

    def _happen(self, fault: Fault) -> None:
        fleet = self._simulation.fleet
        there = [one for one in fleet.replicas.values() if one.stage is not Stage.GONE]
        if not there:
            return
        replica = there[fault.replica % len(there)]
        dispatchers = self._simulation.dispatchers
        dispatcher = dispatchers[fault.dispatcher % len(dispatchers)]
        link = (dispatcher.name, replica.name)
        until = self._clock.now + fault.lasts_ns
        if fault.kind is FaultKind.CRASH:
            self._crash(replica)
        elif fault.kind is FaultKind.STRAGGLER:
            replica.slowdown = fault.factor
            self._clock.at(until, self._recover, replica)
        elif fault.kind is FaultKind.SLOW_LINK:
            self._slow_until[link] = max(until, self._slow_until.get(link, 0))
            replica.porter.slow(until, SLOW_LINK_NS)
        elif fault.kind is FaultKind.CUT_LINK:
            self._cut_until[link] = max(until, self._cut_until.get(link, 0))
            replica.porter.cut(until)
            if fault.lasts_ns > LOST_NS:
                self._clock.after(LOST_NS, self._give_up, dispatcher, replica)
        else:
            dispatcher.deaf_until = max(until, dispatcher.deaf_until)

    def _crash(self, replica: Replica) -> None:
        self._simulation.fleet.crash(replica)
        for dispatcher in self._simulation.dispatchers:
            # Behind whatever it said before: the connection ends when all of it is through.
            self._clock.after(dispatcher.wire(replica.name), dispatcher.lost, replica.name)

    def _give_up(self, dispatcher: Dispatcher, replica: Replica) -> None:
        """Neither hears of the other: both end what they had open with each other."""
        dispatcher.lost(replica.name)
        replica.forget(dispatcher.name)

    def _recover(self, replica: Replica) -> None:
        replica.slowdown = 1.0
