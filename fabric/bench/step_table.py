"""What an engine step takes on this machine: steps of known shape, schedule to commit, medians.

Decodes of 1 to 64 short sequences, whole prompts of 16 to 1,024 tokens, decodes at a long context,
the second chunk of a long prompt. From these follow the table by tokens, what a token of context
costs and what a (query, key) pair does. All shapes take their turns, several times: a machine that
is slower for some seconds is so for all of them.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any, Protocol

from fabric.bench.engine import Subject
from fabric.core.request import Request, SamplingParams
from fabric.workload import ORDINARY_TOKENS

ROWS = (1, 2, 4, 5, 6, 8, 12, 16, 32, 64)  # kernels take small batches in tiles of some rows
PROMPTS = (128, 256, 512, 1024)
ROUNDS = 3
STEPS = 12
SHORT, LONG = 16, 1024
LONG_ROWS = 4
PROMPT_TOKENS = 512  # of short prompts in a round, together


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a loaded engine knows of itself."""

    model: str
    block_size: int
    num_blocks: int
    num_host_blocks: int
    context_limit: int
    kv_bytes: int
    swap_ns_per_block: int
    recompute_ns_per_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Times in ns; see `sim.costs.MeasuredCosts`."""

    table: tuple[tuple[int, int], ...]
    ns_per_context: float
    ns_per_pair: float

    def times(self, pace: float) -> Table:
        """Of a machine on which everything takes so many times as long."""
        return Table(
            table=tuple((tokens, round(ns * pace)) for tokens, ns in self.table),
            ns_per_context=self.ns_per_context * pace,
            ns_per_pair=self.ns_per_pair * pace,
        )

    def decode_ns(self, rows: int, context: float) -> float:
        """A step of so many rows, one of `ROWS`, each at that context."""
        return dict(self.table)[rows] + self.ns_per_context * rows * context

    def prompt_ns(self, length: int) -> float:
        """A step that is one whole prompt of such a length, one of `PROMPTS`."""
        attention = self.ns_per_pair * length * (length + 1) / 2 + self.ns_per_context * length
        return dict(self.table)[length] + attention


class Loaded(Subject, Protocol):
    """An engine with its worker that tells of itself, as `fabric.driver.LLM` is one."""

    engine: Any  # core's Engine
    worker: Any  # worker's Worker


def facts_of(loaded: Loaded, model: str) -> Facts:
    """Sizes as the loaded engine has them, costs as its warm-up found them."""
    config = loaded.engine.config
    tokens = config.num_blocks * config.block_size
    return Facts(
        model=model,
        block_size=config.block_size,
        num_blocks=config.num_blocks,
        num_host_blocks=config.num_host_blocks,
        context_limit=config.context_limit,
        kv_bytes=loaded.worker.memory().kv_pool_bytes // tokens,
        swap_ns_per_block=config.preemption.swap_ns_per_block,
        recompute_ns_per_token=config.preemption.recompute_ns_per_token,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Each shape once; ns. `decodes` by rows, `prompts` by length; `far`: decodes at a long
    context; the two chunks of a prompt of twice as many tokens as a step holds."""

    decodes: dict[int, float]
    prompts: dict[int, float]
    far: float
    first: float
    second: float


def measure(subject: Subject) -> Table:
    """All shapes in turn, `ROUNDS` times."""
    _prompt_ns(subject, SHORT, 0)  # warm
    rounds = [_round(subject, number) for number in range(1, ROUNDS + 1)]
    median = statistics.median
    decodes = {rows: median(one.decodes[rows] for one in rounds) for rows in ROWS}
    # Contexts grow while they are measured; on average by half of the steps.
    further = LONG_ROWS * (LONG - SHORT)
    ns_per_context = median(one.far - one.decodes[LONG_ROWS] for one in rounds) / further
    ns_per_context = max(0.0, ns_per_context)
    more = LONG * LONG  # pairs that the second chunk has beyond the first
    apart = median(one.second - one.first for one in rounds)
    ns_per_pair = max(0.0, (apart - ns_per_context * LONG) / more)
    table = {rows: ns - ns_per_context * rows * SHORT for rows, ns in decodes.items()}
    for length in PROMPTS:
        attention = ns_per_pair * length * (length + 1) / 2 + ns_per_context * length
        table[length] = median(one.prompts[length] for one in rounds) - attention
    rising, last = [], 0.0
    for tokens, ns in sorted(table.items()):
        last = max(last, ns, 1.0)  # more tokens never take less; what says so is noise
        rising.append((tokens, round(last)))
    return Table(table=tuple(rising), ns_per_context=ns_per_context, ns_per_pair=ns_per_pair)


def _round(subject: Subject, number: int) -> Round:
    decodes = {rows: _decode_ns(subject, rows, SHORT, number) for rows in ROWS}
    far = _decode_ns(subject, LONG_ROWS, LONG, number)
    prompts = {length: _prompt_ns(subject, length, number) for length in PROMPTS}
    first, second = _steps_ns(subject, plain_request("chunks", 2 * LONG, 1, 99_999 + number))
    return Round(decodes=decodes, prompts=prompts, far=far, first=first, second=second)


def _decode_ns(subject: Subject, rows: int, context: int, salt: int) -> float:
    """The median step in which all of so many sequences decode."""
    before = 2 + rows * context // LONG * 2  # steps until the last prompt is computed, and more
    for index in range(rows):
        name = f"decode/{rows}/{context}/{index}"
        subject.add(plain_request(name, context, before + STEPS + 2, index + salt * 1_000))
    times, ended = [], 0
    while ended < rows:
        began = time.perf_counter_ns()
        chunks = subject.step()
        took = time.perf_counter_ns() - began
        if len(chunks) == rows:
            times.append(took)
        ended += sum(chunk.finish is not None for chunk in chunks)
    return statistics.median(times[1 : 1 + STEPS])


def _prompt_ns(subject: Subject, length: int, salt: int) -> float:
    """Steps that are whole prompts: the median of some for short ones, one of a long one."""
    times = []
    for attempt in range(max(1, PROMPT_TOKENS // length)):
        request = plain_request("prompt", length, 1, attempt + 7 * length + salt * 100_000)
        times.append(sum(_steps_ns(subject, request)))
    return statistics.median(times)


def _steps_ns(subject: Subject, request: Request) -> list[int]:
    """What each step of a request takes that is alone."""
    subject.add(request)
    times, ended = [], False
    while not ended:
        began = time.perf_counter_ns()
        ended = any(chunk.finish is not None for chunk in subject.step())
        times.append(time.perf_counter_ns() - began)
    return times


def plain_request(name: str, prompt: int, output: int, salt: int) -> Request:
    """A prompt that shares no prefix with another salt's."""
    low, count = ORDINARY_TOKENS.start, len(ORDINARY_TOKENS)
    return Request(
        request_id=name,
        prompt=tuple(low + (salt * 7919 + index * 31 + 1) % count for index in range(prompt)),
        sampling=SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True),
        arrival=0,
        tier="batch",  # its targets cut no chunk short
    )
