"""What deciding costs: schedule and commit of a decode step at context 2,000. No test.

Run from the repository root: `python tests/core/bench_engine_cost.py`. Encoding the plan in the
worker comes on top; the three together have 3 ms at 256 sequences.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from statistics import median
from time import perf_counter_ns

sys.path.insert(0, str(Path(__file__).parents[2]))

from fabric.core.configs import EngineConfig
from fabric.core.engine.engine import Engine
from fabric.core.engine.plan import Sample, StepPlan, StepResult
from fabric.core.request import Request, SamplingParams

CONTEXT = 2000
STEPS = 400
SIZES = (1, 32, 256)


def main() -> None:
    """Print one line for each number of running sequences."""
    print(f"context {CONTEXT}, median of {STEPS} decode steps")
    for sequences in SIZES:
        schedule_us, commit_us, total_us = measure(sequences)
        print(
            f"{sequences:4d} sequences: schedule {schedule_us / 1e3:.3f} ms, "
            f"commit {commit_us / 1e3:.3f} ms, together {total_us / 1e3:.3f} ms"
        )


def measure(sequences: int) -> tuple[float, float, float]:
    """Medians in µs: schedule, commit, and both of the same step."""
    engine = crowded(sequences)
    schedule_ns: list[int] = []
    commit_ns: list[int] = []
    gc.collect()
    while len(schedule_ns) < STEPS:
        begin = perf_counter_ns()
        plan = engine.schedule(0)
        scheduled = perf_counter_ns()
        assert plan is not None
        result = sampled(plan)
        executed = perf_counter_ns()
        engine.commit(plan, result, 0)
        end = perf_counter_ns()
        if len(plan.steps) == sequences and all(step.count == 1 for step in plan.steps):
            schedule_ns.append(scheduled - begin)
            commit_ns.append(end - executed)
    both = [one + other for one, other in zip(schedule_ns, commit_ns, strict=True)]
    return median(schedule_ns) / 1e3, median(commit_ns) / 1e3, median(both) / 1e3


def crowded(sequences: int) -> Engine:
    """An engine with that many requests of about `CONTEXT` tokens, out of step with blocks."""
    config = EngineConfig(
        num_blocks=sequences * (CONTEXT + STEPS + 600) // 16,
        max_sequences=sequences,
        step_tokens=4096,
        chunk_tokens=4096,
        context_limit=4096,
    )
    engine = Engine(config)
    for number in range(sequences):
        prompt = tuple((number * 7919 + i * 31) % 50_000 for i in range(CONTEXT + number % 16))
        sampling = SamplingParams(max_tokens=STEPS + 500)
        request = Request(request_id=str(number), prompt=prompt, sampling=sampling, arrival=number)
        engine.add(request, 0)
    return engine


def sampled(plan: StepPlan) -> StepResult:
    """As a worker would answer."""
    samples = tuple(Sample(token=17 if step.samples else None) for step in plan.steps)
    return StepResult(plan_id=plan.plan_id, samples=samples)


if __name__ == "__main__":
    main()
