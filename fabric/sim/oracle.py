"""Fidelity: a real run of another engine on a GPU, foretold from its kernels' times.

Known: kernel times, the workload, the engine's limits. Fitted, on the first requests only: one
constant, what a step takes beside its kernels. Everything else is predicted by the real engine in
order of arrival: when each request starts, how fast it runs, when it ends.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fabric.core.configs import AdmissionConfig, EngineConfig, PreemptionCosts, RouterConfig
from fabric.core.request import Request
from fabric.core.tiers import Tier
from fabric.sim.clock import NS_PER_MS, NS_PER_S
from fabric.sim.costs import Profile
from fabric.sim.dispatcher import Network
from fabric.sim.kernel_tables import KernelTables, read_kernel_tables
from fabric.sim.records import Timeline
from fabric.sim.simulation import Plan, Simulation
from fabric.sim.table import align
from fabric.workload.replay import Replay, replay

FITTED = 60  # requests that the constant is fitted on
LAYERS = 32  # Llama-3.1-8B; the tables tell of one
MEDIAN_WITHIN, P99_WITHIN = 0.10, 0.15
HALVINGS = 8
MOST_OVERHEAD_NS = 10 * NS_PER_MS
# First come, first served: one tier whose targets ask for nothing, and a queue without an end.
TIER = Tier(name="standard", ttft_ms=10**9, tpot_ms=10**9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """A request of the real run or of the foretold one, in seconds. `queue`: until it is scheduled;
    `prefill`: from there to its first token; `tpot`: a token after the first; `end`: on the run's
    own clock."""

    queue: float
    prefill: float
    tpot: float
    e2e: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Error:
    """One figure. `within`: the target for the error's size; None: it is only reported."""

    name: str
    real: float
    foretold: float
    within: float | None

    @property
    def relative(self) -> float:
        """Of the real one."""
        return self.foretold / self.real - 1

    @property
    def met(self) -> bool:
        """Within the target, or there is none."""
        return self.within is None or abs(self.relative) <= self.within


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """What came out. `overhead_ns`: the one fitted constant."""

    overhead_ns: int
    errors: tuple[Error, ...]

    @property
    def met(self) -> bool:
        """All targets are."""
        return all(one.met for one in self.errors)

    def render(self) -> str:
        """For a terminal."""
        rows = [["", "real", "foretold", "error", "target", ""]]
        for one in self.errors:
            target = "" if one.within is None else f"{one.within:.0%}"
            verdict = "" if one.within is None else "met" if one.met else "MISSED"
            rows.append(
                [one.name, f"{one.real:.4g}", f"{one.foretold:.4g}", f"{one.relative:+.1%}",
                 target, verdict]
            )  # fmt: skip
        constant = f"{self.overhead_ns / NS_PER_MS:.3f} ms a step beside its kernels"
        return f"{align(rows)}\nfitted on the first {FITTED} requests: {constant}"

    def record(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "overhead_ns": self.overhead_ns,
            "figures": [
                {
                    "name": one.name, "real": one.real, "foretold": one.foretold,
                    "error": one.relative, "within": one.within, "met": one.met,
                }
                for one in self.errors
            ],
        }  # fmt: skip


def fidelity(folder: Path) -> Fidelity:
    """Calibrate, foretell, compare. Raises `ValueError` and `OSError`."""
    tables = read_kernel_tables(folder, LAYERS)
    engine = _engine(json.loads((folder / "vllm_meta.json").read_text(encoding="utf-8")))
    requests = list(replay(folder / "workload.jsonl", Replay()))
    real = _real(folder / "vllm_requests.jsonl")
    if len(real) != len(requests):
        raise ValueError(f"{folder}: {len(requests)} requests in the workload, {len(real)} in logs")

    def foretell(overhead_ns: int, count: int) -> list[Life]:
        return _foretold(replace(tables, overhead_ns=overhead_ns), engine, requests, count)

    overhead_ns = _fit(foretell, real[:FITTED])
    return Fidelity(
        overhead_ns=overhead_ns,
        errors=_compare(real[FITTED:], foretell(overhead_ns, len(requests))[FITTED:]),
    )


def _fit(foretell: Callable[[int, int], list[Life]], real: Sequence[Life]) -> int:
    """Longer steps make longer requests: the median of E2E is found by halving."""
    wanted = float(np.median([one.e2e for one in real]))
    low, high = 0, MOST_OVERHEAD_NS
    for _ in range(HALVINGS):
        middle = (low + high) // 2
        found = float(np.median([one.e2e for one in foretell(middle, len(real))]))
        low, high = (middle, high) if found < wanted else (low, middle)
    return (low + high) // 2


def _compare(real: Sequence[Life], foretold: Sequence[Life]) -> tuple[Error, ...]:
    errors = []
    for name, of in (("TPOT", _tpot), ("E2E", _e2e), ("queue", _queue), ("prefill", _prefill)):
        judged = name in ("TPOT", "E2E")
        for label, share, within in (("median", 50, MEDIAN_WITHIN), ("p99", 99, P99_WITHIN)):
            figures = [float(np.percentile([of(one) for one in lives], share))
                       for lives in (real, foretold)]  # fmt: skip
            errors.append(
                Error(
                    name=f"{name} {label}, s",
                    real=figures[0],
                    foretold=figures[1],
                    within=within if judged else None,
                )
            )
    ends = [max(one.end for one in lives) for lives in (real, foretold)]
    errors.append(Error(name="makespan, s", real=ends[0], foretold=ends[1], within=MEDIAN_WITHIN))
    return tuple(errors)


def _foretold(
    tables: KernelTables, engine: EngineConfig, requests: Sequence[Request], count: int
) -> list[Life]:
    """The first `count` requests among all that come; the run is over when they are."""
    plan = Plan(
        profile=Profile(name="oracle", costs=tables, engine=engine, gpus=1),
        admission=AdmissionConfig(
            max_queued_requests=len(requests),
            max_queued_tokens=1 << 40,
            queue_ttl_s=1e6,
            tiers=(TIER,),
        ),
        router=RouterConfig(headroom_tokens=1 << 40, headroom_ns=1 << 60, tiers=(TIER,)),
        network=Network(link_ns=0),
    )
    simulation = Simulation(plan, requests)
    ended: dict[str, Timeline] = {}
    wanted = {one.request_id for one in requests[:count]}

    def note(timeline: Timeline, _: int) -> None:
        if timeline.request.request_id in wanted:
            ended[timeline.request.request_id] = timeline

    simulation.dispatchers[0].on_ended.append(note)
    outcome = simulation.run(enough=lambda: len(ended) == count)
    for timeline in outcome.timelines[:count]:
        if timeline.finish is None:
            raise ValueError(f"{timeline.request.request_id}: {timeline.refusal}")
    return [_life(one, requests[0].arrival) for one in outcome.timelines[:count]]


def _life(timeline: Timeline, began: int) -> Life:
    arrival, begun, first = timeline.request.arrival, timeline.begun or 0, timeline.first or 0
    return Life(
        queue=(begun - arrival) / NS_PER_S,
        prefill=(first - begun) / NS_PER_S,
        tpot=(timeline.tpot_ns or 0.0) / NS_PER_S,
        e2e=(timeline.e2e_ns or 0) / NS_PER_S,
        end=((timeline.last or 0) - began) / NS_PER_S,
    )


def _real(path: Path) -> list[Life]:
    rows = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    began = rows[0]["queued_ts"]
    return [
        Life(
            queue=row["scheduled_ts"] - row["queued_ts"],
            prefill=row["first_token_ts"] - row["scheduled_ts"],
            tpot=(row["last_token_ts"] - row["first_token_ts"]) / max(1, row["output_toks"] - 1),
            e2e=row["last_token_ts"] - row["queued_ts"],
            end=row["last_token_ts"] - began,
        )
        for row in rows
    ]


def _engine(meta: dict[str, Any]) -> EngineConfig:
    """The limits of the real engine. It preempted by recomputing, never by swapping."""
    settings, cache = meta["engine_kwargs"], meta["kv_cache"]
    return EngineConfig(
        block_size=cache["block_size"],
        num_blocks=cache["num_gpu_blocks"],
        num_host_blocks=0,
        max_sequences=settings["max_num_seqs"],
        step_tokens=settings["max_num_batched_tokens"],
        chunk_tokens=settings["max_num_batched_tokens"],
        context_limit=settings["max_model_len"],
        prefix_cache=cache["enable_prefix_caching"],
        preemption=PreemptionCosts(swap_ns_per_block=0),
        tiers=(TIER,),
        patience_ns=1 << 60,
    )


def _tpot(one: Life) -> float:
    return one.tpot


def _e2e(one: Life) -> float:
    return one.e2e


def _queue(one: Life) -> float:
    return one.queue


def _prefill(one: Life) -> float:
    return one.prefill
