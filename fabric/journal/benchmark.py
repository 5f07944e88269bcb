"""`fabric bench journal`: what writing decisions down costs a step."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from fabric.core.configs import EngineConfig
from fabric.core.engine.engine import Engine
from fabric.core.engine.plan import Sample, StepResult
from fabric.core.journal import Recorder
from fabric.core.request import Request, SamplingParams
from fabric.journal.writer import Place, Writer

HELP = """\
Runs an engine without a model, with and without a journal in turns, and prints what a step's
decisions cost: in the thread that decides, and in all threads (the journal is encoded and written
by another one). The share is of a step as long as --step-ms says.

examples:
  fabric bench journal
  fabric bench journal --sequences 256 --step-ms 20"""

STEP_NS = 10_000_000
OUTPUT = 400  # tokens of a request
FLUSHED = 10  # steps in the 0.2 s between two writes
TARGET = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of a step, seconds: in the thread that decides, in all threads. `bytes`: of the file."""

    thread_s: float
    process_s: float
    bytes: float = 0.0


def main(words: Sequence[str]) -> int:
    """Run `fabric bench journal WORDS...`; 1: it costs more than 3 % of a step."""
    arguments = parser().parse_args(words)
    plain: list[Cost] = []
    with_journal: list[Cost] = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(arguments.rounds):
            plain.append(_run(arguments.sequences, arguments.steps, None, turn))
            with_journal.append(
                _run(arguments.sequences, arguments.steps, Path(folder), turn, arguments.tokens)
            )
    thread_s = _more(plain, with_journal, "thread_s")
    process_s = _more(plain, with_journal, "process_s")
    size = median(one.bytes for one in with_journal)
    step_s = arguments.step_ms / 1e3
    base_s = median(one.thread_s for one in plain)
    print(f"{arguments.sequences} sequences that decode, a {step_s * 1e3:.0f} ms step:")
    print(f"  schedule and commit without a journal   {base_s * 1e6:8.1f} µs")
    print(f"  the journal, in the deciding thread     {thread_s * 1e6:8.1f} µs  "
          f"{thread_s / step_s:.2%} of the step")  # fmt: skip
    print(f"  the journal, in all threads             {process_s * 1e6:8.1f} µs  "
          f"{process_s / step_s:.2%} of the step and one core")  # fmt: skip
    print(f"  written                                 {size:8.0f} bytes a step, "
          f"{size / step_s / 1e6 * 3600 / 1e3:.2f} GB an hour")  # fmt: skip
    tokens = arguments.sequences / (step_s + base_s)
    fewer = arguments.sequences / (step_s + base_s + thread_s)
    print(f"  tokens/s, if the model takes the rest   {tokens:8,.0f} -> {fewer:,.0f}")
    met = process_s / step_s <= TARGET
    print(f"target: at most {TARGET:.0%} of the step, all threads: {'met' if met else 'MISSED'}")
    return 0 if met else 1


def parser() -> argparse.ArgumentParser:
    """Its flags; tests/law/test_cli.py freezes them."""
    command = argparse.ArgumentParser(
        prog="fabric bench journal",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--sequences", type=int, default=64, help="that run (default: 64)")
    command.add_argument("--step-ms", type=float, default=20.0, help="of the model (default: 20)")
    command.add_argument("--steps", type=int, default=1000, help="of a round (default: 1000)")
    command.add_argument("--rounds", type=int, default=5, help="of each kind (default: 5)")
    command.add_argument("--tokens", choices=("hashed", "raw"), default="hashed")
    return command


def _more(plain: list[Cost], other: list[Cost], name: str) -> float:
    """Rounds of both kinds alternate, so what else the machine does strikes both: the median of
    the differences."""
    pairs = zip(plain, other, strict=True)
    return median(getattr(mine, name) - getattr(its, name) for its, mine in pairs)


def _run(
    sequences: int, steps: int, folder: Path | None, turn: int, tokens: str = "hashed"
) -> Cost:
    """So many steps of a full engine; who ends is followed by the next one."""
    config = EngineConfig(
        num_blocks=sequences * 64,
        max_sequences=sequences,
        step_tokens=max(2048, sequences),
        context_limit=1024,
        eos_token_ids=(0,),
    )
    engine = Engine(config)
    writer = None
    if folder is not None:
        hide = tokens == "hashed"
        place = Place(folder=folder, stream="engine", name="r0", run=str(turn), hide=hide)
        writer = Writer(place)
        engine = Recorder(writer, hide=hide).watch("engine", engine)
        writer.flush()  # the state at a file's head is no matter of steps
    samples = [Sample(token=token) for token in range(1, 1001)]
    number = now = 0
    taken = 0.0
    began_s = time.process_time()
    for step in range(steps):
        now += STEP_NS
        begun = time.thread_time()
        while number < sequences + step * sequences // OUTPUT:
            number += 1
            engine.add(_request(number, now), now)
        plan = engine.schedule(now)
        taken += time.thread_time() - begun
        assert plan is not None, "nothing to do"
        result = StepResult(
            plan_id=plan.plan_id,
            samples=tuple([samples[(one.sequence * 7 + one.start) % 1000] for one in plan.steps]),
        )
        now += STEP_NS
        begun = time.thread_time()
        engine.commit(plan, result, now)
        taken += time.thread_time() - begun
        if writer is not None and step % FLUSHED == 0:  # a model would leave it time for this
            writer.flush()
    if writer is not None:
        writer.close()
    spent_s = time.process_time() - began_s
    size = 0 if writer is None else writer.bytes_written
    return Cost(thread_s=taken / steps, process_s=spent_s / steps, bytes=size / steps)


def _request(number: int, now: int) -> Request:
    sampling = SamplingParams(max_tokens=OUTPUT + number % 7, seed=number)
    prompt = tuple([5 + (number * 31 + index) % 900 for index in range(100 + number % 16)])
    return Request(request_id=f"{number:032x}", prompt=prompt, sampling=sampling, arrival=now)
