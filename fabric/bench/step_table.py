"""What an engine step takes on this machine: steps of known shape, schedule to commit, medians.

Decodes of 1 to 64 short sequences, whole prompts of 64 to 1,024 tokens, decodes at a long context,
the second chunk of a long prompt. From these follow the table by tokens, what a token of context
costs and what a (query, key) pair does.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any, Protocol

from fabric.bench.engine import Subject
from fabric.core.request import Request, SamplingParams
from fabric.workload import ORDINARY_TOKENS

ROWS = (1, 4, 8, 16, 32, 64)
PROMPTS = (128, 256, 512, 1024)
STEPS = 12
SHORT, LONG = 16, 1024
LONG_ROWS = 8


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


def measure(subject: Subject) -> Table:
    """All shapes, the small ones first."""
    _prompt_ns(subject, SHORT)  # warm
    decodes = {rows: _decode_ns(subject, rows, SHORT) for rows in ROWS}
    far = _decode_ns(subject, LONG_ROWS, LONG)
    # Contexts grow while they are measured; on average by half of the steps.
    ns_per_context = max(0.0, (far - decodes[LONG_ROWS]) / (LONG_ROWS * (LONG - SHORT)))
    first, second = _chunks_ns(subject)
    more = LONG * LONG  # pairs that the second chunk has beyond the first
    ns_per_pair = max(0.0, (second - first - ns_per_context * LONG) / more)
    table = {rows: ns - ns_per_context * rows * SHORT for rows, ns in decodes.items()}
    for length in PROMPTS:
        attention = ns_per_pair * length * (length + 1) / 2 + ns_per_context * length
        table[length] = _prompt_ns(subject, length) - attention
    rising, last = [], 0.0
    for tokens, ns in sorted(table.items()):
        last = max(last, ns, 1.0)  # more tokens never take less; what says so is noise
        rising.append((tokens, round(last)))
    return Table(table=tuple(rising), ns_per_context=ns_per_context, ns_per_pair=ns_per_pair)


def _decode_ns(subject: Subject, rows: int, context: int) -> float:
    """The median step in which all of so many sequences decode."""
    names = [f"decode/{rows}/{context}/{index}" for index in range(rows)]
    for index, name in enumerate(names):
        subject.add(plain_request(name, context, rows * 4 + STEPS + 40, index))
    times, ended = [], 0
    while ended < rows:
        began = time.perf_counter_ns()
        chunks = subject.step()
        took = time.perf_counter_ns() - began
        if len(chunks) == rows:
            times.append(took)
        ended += sum(chunk.finish is not None for chunk in chunks)
    return statistics.median(times[1 : 1 + STEPS])


def _prompt_ns(subject: Subject, length: int) -> float:
    """The median of three steps that are one whole prompt each."""
    times = []
    for attempt in range(3):
        subject.add(plain_request(f"prompt/{length}/{attempt}", length, 1, attempt + 7 * length))
        began = time.perf_counter_ns()
        ended = False
        while not ended:
            ended = any(chunk.finish is not None for chunk in subject.step())
        times.append(time.perf_counter_ns() - began)
    return statistics.median(times)


def _chunks_ns(subject: Subject) -> tuple[float, float]:
    """Medians of the first and of the second chunk of a prompt of twice a step's tokens."""
    first, second = [], []
    for attempt in range(3):
        subject.add(plain_request(f"chunks/{attempt}", 2 * LONG, 1, attempt + 99_999))
        times, ended = [], False
        while not ended:
            began = time.perf_counter_ns()
            ended = any(chunk.finish is not None for chunk in subject.step())
            times.append(time.perf_counter_ns() - began)
        first.append(times[0])
        second.append(times[1])
    return statistics.median(first), statistics.median(second)


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
