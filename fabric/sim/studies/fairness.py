"""Study 5: one tenant asks for ten times its share. What do the others notice?"""

from __future__ import annotations

from dataclasses import replace

from fabric.core.configs import AdmissionConfig
from fabric.core.request import Request
from fabric.core.tenants import Tenant
from fabric.sim.clock import NS_PER_S
from fabric.sim.costs import profile
from fabric.sim.records import Outcome
from fabric.sim.scenarios.result import Result, Target, head, row
from fabric.sim.simulation import Plan
from fabric.sim.studies.study import Recorded, served
from fabric.sim.summary import spread
from fabric.workload import Arrivals, Lengths, Workload, generate

PROFILE = profile("A100:llama-8b")
SHAPE = Workload(
    name="fairness",
    prompt=Lengths(median=512, sigma=0.6, low=32, high=2048),
    output=Lengths(median=96, sigma=0.6, low=8, high=512),
)
# (tenant, weight, requests a second): one floods, two keep it busy at 1 : 2, one asks for little.
TENANTS = (("flood", 1.0, 20.0), ("one", 1.0, 6.0), ("two", 2.0, 12.0), ("modest", 1.0, 0.5))
SECONDS = 30
SETTLED_S = 5  # shares are counted from here on, while all of them are still backlogged


def run(seed: str, trace: Recorded | None) -> Result:  # noqa: ARG001
    """With weights, with all of them as one tenant, and the modest one alone."""
    requests = _requests(seed)
    fair = _serve(requests, tuple(Tenant(name=name, weight=w) for name, w, _ in TENANTS))
    alone = _serve([one for one in requests if one.tenant == "modest"], ())
    anonymous = _serve([replace(one, tenant="") for one in requests], ())
    rows = [head("tenant | weight | asked for | served share | wait p50 ms | wait p99 ms")]
    backlogged = TENANTS[:3]
    served_by = {name: _served(fair, name) for name, _, _ in TENANTS}
    total = sum(served_by[name] for name, _, _ in backlogged)
    shares = {name: served_by[name] / total for name, _, _ in backlogged}
    for name, weight, rate in TENANTS:
        wait = _wait(fair, name)
        share = f"{shares[name]:.1%}" if name in shares else "all of its own"
        rows.append(row(name, weight, f"{rate}/s", share, *wait))
    rows.append(row("modest, alone", 1.0, "0.5/s", "", *_wait(alone, "modest")))
    rows.append(row("modest, no tenants", "", "0.5/s", "", *_wait(anonymous, "", "modest")))
    weights = sum(weight for _, weight, _ in backlogged)
    off = [abs(shares[name] / (weight / weights) - 1) for name, weight, _ in backlogged]
    waits = [_wait(fair, "modest")[1], _wait(anonymous, "", "modest")[1]]
    return Result(
        rows=tuple(rows),
        targets=(
            Target(
                text="backlogged tenants get their weighted share of tokens within 5 %",
                found=", ".join(f"{one:.1%}" for one in off),
                met=max(off) <= 0.05,
            ),
            Target(
                text="who asks for less than its share waits a tenth as long as without tenants",
                found=f"p99 {waits[0]:.0f} against {waits[1]:.0f} ms",
                met=waits[0] <= waits[1] / 10,
            ),
        ),
    )


def _requests(seed: str) -> list[Request]:
    found: list[Request] = []
    for name, _, rate in TENANTS:
        arrivals = Arrivals(rate_per_s=rate)
        mine = generate(
            SHAPE, count=round(rate * SECONDS), seed=f"{seed}/{name}", arrivals=arrivals
        )
        found += [replace(one, tenant=name) for one in mine]
    return sorted(found, key=lambda one: (one.arrival, one.request_id))


def _serve(requests: list[Request], tenants: tuple[Tenant, ...]) -> Outcome:
    admission = AdmissionConfig(
        max_queued_requests=10**6, max_queued_tokens=10**9, queue_ttl_s=1e6, tenants=tenants
    )
    outcome, _ = served(Plan(profile=PROFILE, lean=True, admission=admission), requests)
    return outcome


def _served(outcome: Outcome, tenant: str) -> int:
    """Tokens, prompts and outputs, of requests that left the queue while all were busy."""
    low, high = SETTLED_S * NS_PER_S, SECONDS * NS_PER_S
    return sum(
        one.prompt_tokens + one.tokens
        for one in outcome.timelines
        if one.request.tenant == tenant and one.routed is not None and low <= one.routed < high
    )


def _wait(outcome: Outcome, tenant: str, within: str = "") -> tuple[float, float]:
    found = spread(
        one.waited_ns
        for one in outcome.timelines
        if one.request.tenant == tenant and within in one.request.request_id
    )
    return found.p50, found.p99
