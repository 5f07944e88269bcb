"""Study 1: prompts and outputs in pools of their own, against replicas that do both in chunks.

As many GPUs either way. Goodput as in Zhong et al., "DistServe" (2024): the highest rate at which
nine requests in ten keep both targets. For the pools the best split of the GPUs counts, as who
tunes a deployment would find it. Replicas that do both cut prompts into chunks, so that the steps
of running outputs keep their target (`engine.scheduler`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fabric.core.configs import AdmissionConfig, PairingConfig, RouterConfig
from fabric.core.tiers import Tier
from fabric.sim.clock import NS_PER_MS, NS_PER_S
from fabric.sim.costs import profile
from fabric.sim.records import Timeline
from fabric.sim.scenarios.result import Result, Target, head, row
from fabric.sim.simulation import Plan, PrefillPool, Simulation
from fabric.sim.studies.study import Recorded
from fabric.sim.summary import attained
from fabric.workload import Arrivals, Lengths, TierShare, Workload, generate

GPUS = 4
PROFILE = profile("H100:llama-8b")
PROMPTS = (256, 1024, 4096)
OUTPUTS = (16, 64, 256)
# Of a first token and of each one after it: a strict pace, and one that leaves room for chunks.
PACES = (
    Tier(name="strict", ttft_ms=500, tpot_ms=20),
    Tier(name="easy", ttft_ms=1_000, tpot_ms=60),
)
SHARE = 0.9
ARRIVE_S = 12  # those of the second half are judged
STEP, FINE = 1.3, 1.09  # between rates that are tried
MOST_TRIALS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A load without its rate, and what is promised."""

    prompt: int
    output: int
    tier: Tier
    seed: str

    @property
    def shape(self) -> Workload:
        """Around its medians."""
        return Workload(
            name=f"{self.prompt}-{self.output}",
            prompt=Lengths(median=self.prompt, sigma=0.3, low=16, high=4 * self.prompt),
            output=Lengths(median=self.output, sigma=0.3, low=2, high=4 * self.output),
            tiers=(TierShare(tier=self.tier.name, weight=1.0),),
        )

    def guess_rate(self) -> float:
        """Of all GPUs, by arithmetic: prompts alone, at half the peak."""
        return GPUS * 20_000 / (self.prompt + 8 * self.output)


def run(seed: str, trace: Recorded | None) -> Result:  # noqa: ARG001
    """Every cell of the grid."""
    rows = [head("targets ms | prompt | output | both in one | pools | split | ratio")]
    ratios: list[float] = []
    for tier in PACES:
        for prompt in PROMPTS:
            for output in OUTPUTS:
                cell = Cell(prompt=prompt, output=output, tier=tier, seed=seed)
                one = goodput(cell, None, cell.guess_rate())
                best, split = 0.0, 0
                for prefill in range(1, GPUS):
                    if best and not keeps(cell, prefill, best * FINE):
                        continue
                    best, split = goodput(cell, prefill, best or one), prefill
                ratios.append(best / one)
                pace = f"{tier.ttft_ms} + {tier.tpot_ms}"
                name = f"{split} + {GPUS - split}"
                rows.append(row(pace, prompt, output, one, best, name, f"{best / one:.2f}"))
    wins = sum(ratio > 1.05 for ratio in ratios)
    losses = sum(ratio < 1 / 1.05 for ratio in ratios)
    return Result(
        rows=tuple(rows),
        targets=(
            Target(
                text="somewhere on the grid pools have twice the goodput, as the field says",
                found=f"{min(ratios):.2f} to {max(ratios):.2f} times; by more than 5 % "
                f"{wins} wins and {losses} losses of {len(ratios)}",
                met=max(ratios) >= 2,
            ),
        ),
    )


def goodput(cell: Cell, prefill: int | None, near: float) -> float:
    """Requests a second, searched from `near` on in coarse and then in fine steps."""
    rate, kept, broke = near, 0.0, 0.0
    for _ in range(MOST_TRIALS):
        if keeps(cell, prefill, rate):
            kept = rate
            rate = rate * STEP if not broke else (kept * broke) ** 0.5
        else:
            broke = rate
            rate = rate / STEP if not kept else (kept * broke) ** 0.5
        if kept and broke and broke / kept <= FINE:
            break
    return kept


def keeps(cell: Cell, prefill: int | None, rate: float) -> bool:
    """Do enough requests keep their targets at this rate? It ends when it is clear that not."""
    count = max(80, round(rate * ARRIVE_S))
    judged = count // 2
    requests = list(
        generate(cell.shape, count=count, seed=cell.seed, arrivals=Arrivals(rate_per_s=rate))
    )
    late = {one.request_id for one in requests[count - judged :]}
    simulation = Simulation(plan(cell.tier, prefill), requests)
    missed: list[str] = []

    def note(timeline: Timeline, _: int) -> None:
        name = timeline.request.request_id
        if name in late and not attained(timeline, cell.tier):
            missed.append(name)

    simulation.dispatchers[0].on_ended.append(note)
    most = (1 - SHARE) * judged
    # A queue that only grows tells before its requests end: whoever waits longer has missed.
    limit = round((requests[-1].arrival / NS_PER_S + 20 + cell.output * 0.2) * NS_PER_S)
    simulation.run(
        enough=lambda: simulation.over or len(missed) > most or simulation.clock.now > limit
    )
    return simulation.over and len(missed) <= most


def plan(tier: Tier, prefill: int | None) -> Plan:
    """All GPUs, so many of them for prompts; None: each does both."""
    tiers = (tier,)
    chosen = replace(PROFILE, engine=replace(PROFILE.engine, tiers=tiers))
    both = Plan(
        profile=chosen,
        replicas=GPUS if prefill is None else GPUS - prefill,
        lean=True,
        admission=AdmissionConfig(
            max_queued_requests=10**6, max_queued_tokens=10**9, queue_ttl_s=5.0, tiers=tiers
        ),
        router=RouterConfig(
            headroom_tokens=2 * chosen.engine.step_tokens,
            headroom_ns=tier.ttft_ms * NS_PER_MS,
            tiers=tiers,
        ),
    )
    if prefill is None:
        return both
    pairing = PairingConfig(min_prompt_tokens=16)
    pool = PrefillPool(replicas=prefill, profile=chosen, pairing=pairing)
    return replace(both, prefill=pool)
