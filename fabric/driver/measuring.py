"""Measurements that need parts which may not know each other: loaded engines, servers, the
simulator. `fabric.cli` names them; what is measured, and how, is `fabric.bench`'s."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fabric.driver import LLM

if TYPE_CHECKING:
    from pathlib import Path

    from fabric.core.request import Request


def engine(words: Sequence[str]) -> int:
    """`fabric bench engine WORDS...`: the exit code."""
    from fabric.bench.engine import Bench, run
    from fabric.cli import cache_folder
    from fabric.kernels.benchmark import read_bandwidth_bytes_per_s

    return run(
        words,
        Bench(
            load=lambda: LLM(cache=cache_folder(), host_bytes=0),
            read_bytes_per_s=lambda: read_bandwidth_bytes_per_s(len(os.sched_getaffinity(0))),
            plan_cost_s=_plan_cost_s,
        ),
    )


def fidelity(words: Sequence[str]) -> int:
    """`fabric bench fidelity WORDS...`: the exit code."""
    from fabric.bench.fidelity import Latency, run
    from fabric.cli import cache_folder
    from fabric.sim.foretelling import foretell

    def latencies(costs: Path, config: Path, requests: Sequence[Request]) -> list[Latency]:
        return [
            Latency(ttft_ms=one.ttft_ms, tpot_ms=one.tpot_ms, e2e_ms=one.e2e_ms)
            for one in foretell(costs, config, requests)
        ]

    return run(words, lambda: LLM(cache=cache_folder()), latencies)


def front(words: Sequence[str]) -> int:
    """`fabric bench front WORDS...`: the exit code."""
    from fabric.bench.front import run
    from fabric.cli import cache_folder

    return run(words, lambda kv: LLM(cache=cache_folder(), **kv))


def tiers(words: Sequence[str]) -> int:
    """`fabric bench tiers WORDS...`: the exit code."""
    from fabric.bench.tiers import run
    from fabric.cli import cache_folder

    return run(words, lambda places: LLM(cache=cache_folder(), max_sequences=places))


def profile(words: Sequence[str]) -> int:
    """`fabric profile WORDS...`: the exit code."""
    from fabric.bench.profile import run
    from fabric.cli import cache_folder

    return run(words, lambda model: LLM(model, cache=cache_folder()))


def _plan_cost_s(sequences: int, context: int) -> list[float]:
    """Seconds of Python in each of 100 decode steps of that many sequences: schedule, plan to
    tensors, commit. The model itself is left out; its place takes a constant. Lengths differ, so
    that in each step some sequences need a block, as in a server."""
    from fabric.core.configs import EngineConfig
    from fabric.core.engine.engine import Engine
    from fabric.core.engine.plan import Sample, StepResult
    from fabric.core.request import Request, SamplingParams
    from fabric.worker.batch import BatchBuilder, SequenceTable, Span
    from fabric.worker.sampler import SamplingState

    steps, limit = 100, context + 200
    engine = Engine(
        EngineConfig(
            num_blocks=sequences * (limit // 16 + 1),
            max_sequences=sequences,
            step_tokens=sequences * limit,
            chunk_tokens=limit,
            context_limit=limit,
        )
    )
    table = SequenceTable(max_sequences=sequences, context_limit=limit, block_size=16)
    builder = BatchBuilder()
    sampling = SamplingParams(max_tokens=steps + 1, temperature=0.0, ignore_eos=True)
    for index in range(sequences):
        prompt = tuple(range(index, index + context + index % 16))
        request = Request(request_id=str(index), prompt=prompt, sampling=sampling, arrival=0)
        engine.add(request, 0)
    times_s = []
    while engine.has_work:
        began = time.perf_counter()
        plan = engine.schedule(0)
        assert plan is not None
        for start in plan.starts:
            table.start(start, SamplingState(start, ()))
        states = [table.advance(step, lambda _: 0) for step in plan.steps]
        spans = [
            Span(state, step.start, step.count, 1)
            for state, step in zip(states, plan.steps, strict=True)
        ]
        builder.build(spans, table.blocks_XB)
        samples = tuple(Sample(token=1000) for _ in plan.steps)
        engine.commit(plan, StepResult(plan_id=plan.plan_id, samples=samples), 0)
        times_s.append(time.perf_counter() - began)
    return times_s[1:]
