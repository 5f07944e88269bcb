"""A run, and several side by side, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fabric.sim.costs import Profile
from fabric.sim.records import Outcome
from fabric.sim.summary import Spread, Summary
from fabric.sim.table import align


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One deployment under one load: what happened, and its figures."""

    name: str
    profile: Profile
    outcome: Outcome
    summary: Summary

    def record(self) -> dict[str, Any]:
        """JSON-able."""
        head = {"name": self.name, "profile": self.profile.name, "estimate": self.profile.estimate}
        return head | self.summary.record()


def render(run: Run) -> str:
    """A run's figures."""
    summary = run.summary
    head = ["tier", "requests", "finished", "refused", "preempted", "attained"]
    head += ["queue ms", "TTFT ms", "TPOT ms", "E2E ms"]
    rows = [head]
    for one in summary.tiers:
        counts = [one.requests, one.finished, one.refused, one.preempted]
        spreads = (one.queued_ms, one.ttft_ms, one.tpot_ms, one.e2e_ms)
        rows.append(
            [one.tier, *map(str, counts), f"{one.attained:.1%}", *map(spread_text, spreads)]
        )
    lines = [align(rows), "(p50 / p90 / p99)", ""]
    lines.append(
        f"{summary.tokens_per_s:,.1f} tokens/s, {summary.goodput_per_s:.2f} requests/s within "
        f"their targets ({summary.attained:.2%}), {summary.replica_hours:.3f} replica-hours, "
        f"at most {summary.replicas_peak} ready"
    )
    if summary.gpu_hours:
        cost = "" if summary.dollars is None else f", ${summary.dollars:,.2f} at an assumed price"
        lines.append(f"{summary.gpu_hours:.3f} GPU-hours{cost}")
    if handed := run.outcome.handovers:
        lines.append(
            f"{handed.get('sampled', 0)} of {handed.get('began', 0)} prompts went on elsewhere, "
            f"with {handed['bytes'] / 1e9:,.2f} GB of KV; no room for {handed.get('refused', 0)}, "
            f"{handed['lost_groups']} groups lost"
        )
    lines += [f"missed: {count} × {cause}" for cause, count in summary.violations.items()]
    if run.profile.estimate:
        lines.append(f"{run.profile.name}: step times are a roofline's arithmetic, not measured")
    return "\n".join(lines)


def compare(runs: Sequence[Run]) -> str:
    """A line a figure, a column a run; the last one against the first."""
    rows = [["", *(run.name for run in runs), "last / first"]]
    for label, values in figures(runs).items():
        ratio = values[-1] / values[0] if values[0] else float("nan")
        rows.append([label, *(f"{value:,.3f}" for value in values), f"{ratio:.3f}"])
    return align(rows)


def figures(runs: Sequence[Run]) -> dict[str, list[float]]:
    """What runs are compared by; NaN where a run has no such figure."""
    found = {
        "requests/s within targets": [one.summary.goodput_per_s for one in runs],
        "attained": [one.summary.attained for one in runs],
        "tokens/s": [one.summary.tokens_per_s for one in runs],
        "replica-hours": [one.summary.replica_hours for one in runs],
        "GPU-hours": [one.summary.gpu_hours for one in runs],
        "refused": [float(sum(one.summary.refusals.values())) for one in runs],
    }
    names = list(dict.fromkeys(tier.tier for run in runs for tier in run.summary.tiers))
    for name in names:
        tiers = [next((t for t in run.summary.tiers if t.tier == name), None) for run in runs]
        nan = float("nan")
        found[f"{name}: TTFT p50 ms"] = [t.ttft_ms.p50 if t else nan for t in tiers]
        found[f"{name}: TTFT p99 ms"] = [t.ttft_ms.p99 if t else nan for t in tiers]
        found[f"{name}: TPOT p50 ms"] = [t.tpot_ms.p50 if t else nan for t in tiers]
        found[f"{name}: E2E p99 ms"] = [t.e2e_ms.p99 if t else nan for t in tiers]
    return found


def spread_text(one: Spread) -> str:
    """p50 / p90 / p99."""
    return f"{one.p50:,.0f} / {one.p90:,.0f} / {one.p99:,.0f}"
