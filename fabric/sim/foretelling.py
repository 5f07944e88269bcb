"""What a server under a configuration will do with requests, as their clients will see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fabric.config import load_config
from fabric.core.request import Request
from fabric.sim.clock import NS_PER_MS
from fabric.sim.cost_file import read_costs
from fabric.sim.deployment import deployment_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Foretold:
    """A request that will be answered to its end; ms. `tpot_ms` None: it has one token."""

    ttft_ms: float
    tpot_ms: float | None
    e2e_ms: float


def foretell(costs: Path, config: Path, requests: Sequence[Request]) -> list[Foretold]:
    """Those that will be answered. Raises `ConfigError`, `ValueError`, `OSError`."""
    deployment = deployment_of(load_config(config), read_costs(costs), str(config))
    found = []
    for one in deployment.run(requests).timelines:
        ttft_ns, e2e_ns, tpot_ns = one.ttft_ns, one.e2e_ns, one.tpot_ns
        if ttft_ns is None or e2e_ns is None:
            continue
        found.append(
            Foretold(
                ttft_ms=ttft_ns / NS_PER_MS,
                tpot_ms=None if tpot_ns is None else tpot_ns / NS_PER_MS,
                e2e_ms=e2e_ns / NS_PER_MS,
            )
        )
    return found
