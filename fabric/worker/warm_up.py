"""The steps before the first request: they warm code and buffers, and are timed.

What they take tells the scheduler what getting a preempted sequence back costs on this machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter_ns

from fabric.core.engine.plan import (
    BlockCopy,
    CopyKind,
    SequenceStart,
    SequenceStep,
    StepPlan,
    StepResult,
)
from fabric.core.request import SamplingParams

PROMPT_TOKENS = 128
SWAP_BLOCKS = 8
TIMED_RUNS = 3  # the fastest counts: what slows a run down is somebody else

Execute = Callable[[StepPlan], StepResult | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmUpTimes:
    """In ns. `swap_ns_per_block`: one way, host memory that was used before (0: no host pool).
    `decode_ns`: a step of one sequence."""

    swap_ns_per_block: int
    prefill_ns_per_token: int
    decode_ns: int


def warm_up(
    execute: Execute, *, context_limit: int, block_size: int, swap_blocks: int
) -> WarmUpTimes:
    """Prefill and decode a short sequence in the first blocks and copy `swap_blocks` of them out
    and in; their content is lost. `context_limit`, tokens, bounds the sequence."""
    length = min(PROMPT_TOKENS, context_limit - 1)
    blocks = tuple(range(length // block_size + 1))
    prefill_ns = []
    for epoch in range(TIMED_RUNS + 1):  # the first one is cold
        began_ns = perf_counter_ns()
        _prefill(execute, (0,) * length, blocks, epoch)
        prefill_ns.append(perf_counter_ns() - began_ns)
    # Any token will do; of a group's workers only one knows the one that was drawn.
    decode = SequenceStep(
        sequence=-1, epoch=TIMED_RUNS, start=length, count=1, samples=True, tokens=(0,)
    )
    began_ns = perf_counter_ns()
    execute(StepPlan(plan_id=-1, steps=(decode,)))
    decode_ns = perf_counter_ns() - began_ns
    execute(StepPlan(plan_id=0, steps=(), drops=(-1,)))
    return WarmUpTimes(
        swap_ns_per_block=_swap_ns(execute, swap_blocks) if swap_blocks else 0,
        prefill_ns_per_token=max(min(prefill_ns[1:]) // length, 1),
        decode_ns=decode_ns,
    )


def _prefill(
    execute: Execute, prompt: tuple[int, ...], blocks: tuple[int, ...], epoch: int
) -> None:
    start = SequenceStart(
        sequence=-1,
        epoch=epoch,
        choice=0,
        tokens=prompt,
        prompt_length=len(prompt),
        blocks=blocks,
        sampling=SamplingParams(max_tokens=2, temperature=0.0),
    )
    step = SequenceStep(sequence=-1, epoch=epoch, start=0, count=len(prompt), samples=True)
    execute(StepPlan(plan_id=-2, steps=(step,), starts=(start,)))


def _swap_ns(execute: Execute, blocks: int) -> int:
    copies = tuple(
        BlockCopy(kind=kind, source=block, target=block)
        for kind in (CopyKind.SWAP_OUT, CopyKind.SWAP_IN)
        for block in range(blocks)
    )
    times_ns = []
    for _ in range(TIMED_RUNS + 1):  # the first one touches the host's pages
        began_ns = perf_counter_ns()
        execute(StepPlan(plan_id=0, steps=(), copies=copies))
        times_ns.append(perf_counter_ns() - began_ns)
    return max(min(times_ns[1:]) // len(copies), 1)
