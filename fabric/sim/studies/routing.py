"""Study 2: which replica? Four policies and the cost, where prompts share prefixes unevenly."""

from __future__ import annotations

from dataclasses import replace

from fabric.config.parts import HEADROOM_STEPS
from fabric.core.configs import RouterConfig
from fabric.sim.costs import profile
from fabric.sim.scenarios.result import Result, Target, head, row
from fabric.sim.simulation import Plan
from fabric.sim.studies.study import Recorded, served
from fabric.workload import Arrivals, Lengths, Workload, generate

POLICIES = ("round_robin", "random", "least_requests", "affinity", "cost")
REPLICAS = 4
PROFILE = profile("A100:llama-8b")
# System prompts of 1,024 tokens, a few of them popular; the rest of a prompt is its own.
SHAPE = Workload(
    name="shared",
    prompt=Lengths(median=256, sigma=0.9, low=16, high=4096),
    output=Lengths(median=96, sigma=0.8, low=8, high=768),
    prefix=1024,
    prefix_groups=64,
    prefix_skew=1.0,
)
RATES = (20.0, 32.0, 44.0)  # requests a second
SECONDS = 20


def run(seed: str, trace: Recorded | None) -> Result:  # noqa: ARG001
    """Every policy at every rate, the same requests."""
    rows = [head("requests/s | policy | attained | TTFT p50 ms | TTFT p99 ms | E2E p99 ms | hits")]
    best: dict[float, list[tuple[str, float]]] = {}
    for rate in RATES:
        for policy in POLICIES:
            attained, cells = _measure(policy, rate, seed)
            rows.append(row(rate, policy, *cells))
            best.setdefault(rate, []).append((policy, attained))
    found = []
    for ranked in best.values():
        by_name = dict(ranked)
        others = max(value for name, value in ranked if name != "cost")
        found.append(by_name["cost"] - others)
    return Result(
        rows=tuple(rows),
        targets=(
            Target(
                text="cost attains within 2 % of the best other policy, at every rate",
                found=", ".join(f"{one:+.1%}" for one in found),
                met=min(found) >= -0.02,
            ),
        ),
    )


def _measure(policy: str, rate: float, seed: str) -> tuple[float, tuple[object, ...]]:
    requests = generate(
        SHAPE, count=round(rate * SECONDS), seed=seed, arrivals=Arrivals(rate_per_s=rate)
    )
    headroom = HEADROOM_STEPS * PROFILE.engine.step_tokens
    plan = Plan(
        profile=PROFILE,
        replicas=REPLICAS,
        dispatchers=2,
        router=RouterConfig(policy=policy, headroom_tokens=headroom),
    )
    outcome, summary = served(replace(plan, lean=True), requests)
    tier = summary.tiers[0]
    prompts = sum(one.prompt_tokens for one in outcome.timelines)
    hits = sum(one.cached_tokens for one in outcome.timelines) / prompts
    cells = (f"{summary.attained:.1%}", tier.ttft_ms.p50, tier.ttft_ms.p99, tier.e2e_ms.p99)
    return summary.attained, (*cells, f"{hits:.1%}")
