"""Is a prefix cheaper fetched from a replica that holds it than computed where it is wanted?

    fetch    latency + a step of the holder (it copies between two) + bytes / bandwidth
    compute  tokens x token_ns, once for itself and once for each that waits meanwhile

The first must be less. A fetch is waited for no longer than computing would take: so whatever
becomes of it, a prompt takes at most twice as long (as one who rents skis until they have cost as
much as a pair: Karlin et al., "Competitive snoopy caching", 1988).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fabric.core.configs import FetchConfig
from fabric.core.snapshot import ReplicaSnapshot

NS_PER_S = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """`holder_id` probably has the first `tokens` of the prompt: they are fetched from there, for
    `patience_ns` at most."""

    holder_id: str
    tokens: int
    patience_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """A fetch that pays, and what it takes."""

    fetch: Fetch
    cost_ns: int


def find_fetch(
    config: FetchConfig,
    wanted_at: ReplicaSnapshot,
    holder: ReplicaSnapshot,
    *,
    held: tuple[int, int],
    crowd: float,
) -> Price | None:
    """Where a prompt is to be computed, and who could lend it. `held`: leading tokens that each has
    of it, in this order. `crowd`: how many run at a replica on average. None: it does not pay, or
    nobody knows."""
    missing = held[1] - held[0]
    if missing < config.min_tokens or not wanted_at.token_ns or not wanted_at.kv_token_bytes:
        return None
    bytes_ns = missing * wanted_at.kv_token_bytes * NS_PER_S // config.bytes_per_s
    cost_ns = config.latency_ns + holder.step_ns + bytes_ns
    compute_ns = missing * wanted_at.token_ns
    if cost_ns >= (1 + crowd) * compute_ns:
        return None
    fetch = Fetch(holder_id=holder.replica_id, tokens=held[1], patience_ns=compute_ns)
    return Price(fetch=fetch, cost_ns=cost_ns)


def best_holder(depths: Mapping[str, int], but: str) -> str | None:
    """Who has most of a prompt, beside `but`. Ties: the lower id."""
    others = [(-depth, name) for name, depth in depths.items() if name != but]
    return min(others)[1] if others else None
