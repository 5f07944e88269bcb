"""Ways of choosing a replica that know less than `Router`'s own: to be compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fabric.core.traffic.counter_random import CounterRandom


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a policy may look at. `names`: of the replicas; `open_requests` of each; `depths`:
    blocks of the prefix that each probably holds; `first`: the hash of the prompt's first block;
    `turn`: how many were asked before."""

    names: list[str]
    open_requests: list[int]
    depths: Mapping[str, int]
    first: bytes
    turn: int
    random: CounterRandom


Policy = Callable[[Ask], str]


def round_robin(ask: Ask) -> str:
    """One after the other."""
    return sorted(ask.names)[ask.turn % len(ask.names)]


def least_requests(ask: Ask) -> str:
    """Fewest open requests."""
    return min(zip(ask.open_requests, ask.names, strict=True))[1]


def random(ask: Ask) -> str:
    """Any."""
    return sorted(ask.names)[ask.random.below(len(ask.names))]


def affinity(ask: Ask) -> str:
    """Where the longest prefix is, however long the queue; a new prefix by its hash."""
    if ask.depths:
        return min((-depth, name) for name, depth in ask.depths.items())[1]
    names = sorted(ask.names)
    if not ask.first:
        return names[ask.turn % len(names)]
    return names[int.from_bytes(ask.first[:8], "little") % len(names)]


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        "round_robin": round_robin,
        "least_requests": least_requests,
        "random": random,
        "affinity": affinity,
    }
)
