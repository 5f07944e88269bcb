"""`fabric profile`: what an engine step takes on this machine, for `fabric simulate --costs`.

Steps of known shape, schedule to commit, medians: decodes of 1 to 64 short sequences, whole prompts
of 64 to 1,024 tokens, decodes at a long context, the second chunk of a long prompt. From these
follow the table by tokens, what a token of context costs and what a (query, key) pair does.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from fabric.bench.engine import Subject
from fabric.bench.report import align
from fabric.core.request import Request, SamplingParams
from fabric.workload import ORDINARY_TOKENS

ROWS = (1, 4, 8, 16, 32, 64)
PROMPTS = (128, 256, 512, 1024)
STEPS = 12
SHORT, LONG = 16, 1024
LONG_ROWS = 8

HELP = """\
Measures what a step of this machine's engine takes, and writes the table that
`fabric simulate --costs FILE` reads. Takes about a minute; nothing else should run.

examples:
  fabric profile
  fabric profile path/to/model --output costs.json"""


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


class Loaded(Subject, Protocol):
    """An engine with its worker that tells of itself, as `fabric.driver.LLM` is one."""

    engine: Any  # core's Engine
    worker: Any  # worker's Worker


def run(words: Sequence[str], load: Callable[[str | None], Loaded]) -> int:
    """Measure, print, write. The exit code."""
    arguments = profile_parser().parse_args(words)
    subject = load(arguments.model)
    facts = facts_of(subject, arguments.model or "demo")
    found = measure(subject)
    record = {
        "name": f"{facts.model} on {platform.node()}",
        "machine": platform.processor() or platform.machine(),
        "costs": asdict(found),
        "engine": asdict(facts),
    }
    rows = [["tokens", "step ms"], *([str(n), f"{ns / 1e6:.2f}"] for n, ns in found.table)]
    print(align(rows))
    print(
        f"a token of context: {found.ns_per_context / 1e3:.2f} µs; "
        f"a pair of a prompt: {found.ns_per_pair:.1f} ns"
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"written to {arguments.output}")
    return 0


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
        subject.add(_request(name, context, rows * 4 + STEPS + 40, index))
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
        subject.add(_request(f"prompt/{length}/{attempt}", length, 1, attempt + 7 * length))
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
        subject.add(_request(f"chunks/{attempt}", 2 * LONG, 1, attempt + 99_999))
        times, ended = [], False
        while not ended:
            began = time.perf_counter_ns()
            ended = any(chunk.finish is not None for chunk in subject.step())
            times.append(time.perf_counter_ns() - began)
        first.append(times[0])
        second.append(times[1])
    return statistics.median(first), statistics.median(second)


def _request(name: str, prompt: int, output: int, salt: int) -> Request:
    """A prompt that shares no prefix with another salt's."""
    low, count = ORDINARY_TOKENS.start, len(ORDINARY_TOKENS)
    return Request(
        request_id=name,
        prompt=tuple(low + (salt * 7919 + index * 31 + 1) % count for index in range(prompt)),
        sampling=SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True),
        arrival=0,
        tier="batch",  # its targets cut no chunk short
    )


def profile_parser() -> argparse.ArgumentParser:
    """Its flags; tests/law/test_cli.py freezes them."""
    parser = argparse.ArgumentParser(
        prog="fabric profile",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="(default: the demo model)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path.home() / ".cache" / "fabric" / "costs.json",
        metavar="FILE",
        help="(default: %(default)s)",
    )
    return parser
