"""`fabric bench kernels`: step times of the executors on SmolLM2-135M's shape, random weights."""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fabric.kernels.cpu.build import load_library, supported_instruction_sets
from fabric.kernels.cpu.executor import CpuExecutor
from fabric.kernels.device import allocate_pool
from fabric.kernels.program import Executor, KvPool, Program, StepBatch
from fabric.kernels.quantized_program import SCHEMES, quantize_program
from fabric.kernels.random_program import SMOLLM2_135M, random_program
from fabric.kernels.torch_executor import TorchExecutor

HELP = """\
Measures steps on SmolLM2-135M's shape and random weights, in this process: no model is needed.

Prints, for each instruction set of this machine, milliseconds of a decode step at batch 1, 8 and
32, of batch 32 with 1,024 positions that all share or that nobody shares, and of a 1,024-token
prefill in one step and in chunks of 512; and the machine's read bandwidth, whose floor a decode
step cannot beat. Minimum and median: on a busy machine the minimum is the kernel.

examples:
  fabric bench kernels
  fabric bench kernels --isa avx2 --threads 1 --formats bfloat16 int8"""

PAGE = 16
PREFILL_TOKENS = 1024
BATCHES = (1, 8, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Milliseconds of one step, over `repeats` runs."""

    name: str
    minimum_ms: float
    median_ms: float

    def __str__(self) -> str:
        return f"  {self.name:<30}{self.minimum_ms:8.2f} min {self.median_ms:8.2f} median ms"


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    command = argparse.ArgumentParser(
        prog="fabric bench kernels",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    formats = ["bfloat16", *SCHEMES]
    add = command.add_argument
    add("--isa", metavar="NAME", help="only this instruction set (default: all that run here)")
    add("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="(default: all)")
    add("--context", type=int, default=256, metavar="N", help="positions before a decode step")
    add("--repeats", type=int, default=30, metavar="N", help="of each step (default: 30)")
    add(
        "--formats",
        nargs="+",
        default=["bfloat16"],
        choices=formats,
        metavar="F",
        help=f"of weights: {', '.join(formats)} (default: bfloat16)",
    )
    add("--torch", action="store_true", help="time the torch executor too")
    return command


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, print."""
    options = parser().parse_args(arguments)
    program = random_program(SMOLLM2_135M)
    names = [isa.name for isa in supported_instruction_sets()]
    executors: list[Executor] = [
        CpuExecutor(_in_format(program, number_format), threads=options.threads, isa=name)
        for name in names
        if options.isa in (None, name)
        for number_format in options.formats
    ]
    if options.torch:
        executors.append(TorchExecutor(program))
    bandwidth = read_bandwidth_bytes_per_s(options.threads)
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s on {options.threads} threads")
    for executor in executors:
        weights = executor.weight_bytes()
        print(f"{executor.description}; {weights / 1e6:.0f} MB of weights", end=": ")
        print(f"{weights / bandwidth * 1e3:.2f} ms to read once")
        for timing in step_timings(executor, program, options.context, options.repeats):
            print(timing, flush=True)


def _in_format(program: Program, name: str) -> Program:
    return program if name == "bfloat16" else quantize_program(program, name)


def step_timings(executor: Executor, program: Program, context: int, repeats: int) -> list[Timing]:
    """Decode steps at each batch size, then the prefill."""
    pages = -(-(max(context, PREFILL_TOKENS) + 1) // PAGE)
    layout = executor.kv_layout(PAGE)
    blocks = allocate_pool(max(BATCHES) * pages, layout.block_bytes(), torch.device("cpu"))
    pool = KvPool(layout=layout, blocks_XB=blocks)
    timings = []
    for size in BATCHES:
        batch = _batch(program, sequences=size, tokens=1, first=context, pages=pages)
        timings.append(_timed(f"decode, batch {size}", executor, [batch], pool, repeats))
    size = max(BATCHES)
    batch = _batch(program, sequences=size, tokens=1, first=PREFILL_TOKENS, pages=pages)
    name = f"decode, batch {size}, {PREFILL_TOKENS} "
    timings.append(_timed(f"{name}own", executor, [batch], pool, repeats))
    batch.block_tables_XB[:, : PREFILL_TOKENS // PAGE] = batch.block_tables_XB[0, :-1]
    timings.append(_timed(f"{name}shared", executor, [batch], pool, repeats))
    for chunk in (PREFILL_TOKENS, 512):
        chunks = [
            _batch(program, sequences=1, tokens=chunk, first=first, pages=pages)
            for first in range(0, PREFILL_TOKENS, chunk)
        ]
        name = f"prefill {PREFILL_TOKENS}, chunks of {chunk}"
        timings.append(_timed(name, executor, chunks, pool, max(3, repeats // 4)))
    return timings


def read_bandwidth_bytes_per_s(threads: int) -> float:
    """The best of ten scans of 256 MB on huge pages."""
    function = load_library().fabric_cpu_read_bandwidth
    function.restype = ctypes.c_double
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int]
    return float(function(threads, 256 << 20, 10))


def _batch(program: Program, *, sequences: int, tokens: int, first: int, pages: int) -> StepBatch:
    generator = torch.Generator().manual_seed(sequences)
    total = sequences * tokens
    tables = torch.randperm(sequences * pages, generator=generator).view(sequences, pages)
    ids = torch.randint(0, program.vocab, (total,), generator=generator)
    return StepBatch(
        token_ids_T=ids.to(torch.int32),
        query_starts_S1=torch.arange(0, total + 1, tokens, dtype=torch.int32),
        first_positions_S=torch.full((sequences,), first, dtype=torch.int32),
        table_rows_S=torch.arange(sequences, dtype=torch.int32),
        block_tables_XB=tables.to(torch.int32),
        logit_rows_R=torch.arange(tokens - 1, total, tokens, dtype=torch.int32),
    )


def _timed(
    name: str, executor: Executor, batches: list[StepBatch], pool: KvPool, repeats: int
) -> Timing:
    elapsed_ms = []
    for _ in range(repeats + 2):
        start_s = time.perf_counter()
        for batch in batches:
            executor.run(batch, pool)
        elapsed_ms.append((time.perf_counter() - start_s) * 1e3)
    measured = elapsed_ms[2:]  # two to warm up
    return Timing(name=name, minimum_ms=min(measured), median_ms=statistics.median(measured))


if __name__ == "__main__":
    main()
