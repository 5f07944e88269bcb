"""`python -m fabric.kernels.gate`: compile every launch, print what it takes, fail on what is bad.

Bad is: it does not compile, it spills or uses stack, its shared memory is more than a block may
have, no processor can hold it, or an instruction that it is made for is missing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from fabric.kernels.gate.cases import cases
from fabric.kernels.gate.compiler import Built, Case, attempt
from fabric.kernels.gate.hardware import GPUS


def main(words: Sequence[str] | None = None) -> int:
    """0 when every launch of every target passes, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m fabric.kernels.gate", description=__doc__)
    parser.add_argument("--target", choices=sorted(GPUS), action="append", help="(default: all)")
    parser.add_argument("--cache", type=Path, default=Path("build/triton"), metavar="FOLDER")
    parser.add_argument("--only", default="", metavar="TEXT", help="launches whose name has it")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args(words)
    targets = given.target or ["sm_90", "gfx942"]
    picked = [case for target in targets for case in cases(target) if given.only in case.label]
    return judge(picked, cache_folder=given.cache, jobs=given.jobs)


def judge(picked: Sequence[Case], *, cache_folder: Path, jobs: int) -> int:
    """Compile all of `picked` and print what they take; 0 when all are good."""
    began = time.monotonic()
    bad = 0
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        # AMD's compiler takes longest and starts first; the table keeps its order.
        order = sorted(picked, key=lambda case: case.target != "gfx942")
        results = {case: pool.submit(attempt, case, cache_folder) for case in order}
        target = ""
        for case in picked:
            if case.target != target:
                target = case.target
                print(_head(target))
            result = results[case].result()
            problems = [result] if isinstance(result, str) else problems_of(case, result)
            print(_line(case, result), flush=True)
            bad += bool(problems)
            for problem in problems:
                print(f"  FAILS: {problem}")
    seconds = time.monotonic() - began
    print(f"{len(picked)} launches compiled, {bad} bad, in {seconds:.0f} s")
    return 1 if bad or not picked else 0


def problems_of(case: Case, built: Built) -> list[str]:
    """Everything that is wrong with a kernel as it was compiled."""
    gpu = GPUS[case.target]
    found = []
    if built.spills or built.stack_bytes:
        found.append(f"{built.stack_bytes} bytes of stack, {built.spills} spilling instructions")
    if built.shared_bytes > gpu.shared_bytes:
        found.append(f"{built.shared_bytes} bytes of shared memory, a block has {gpu.shared_bytes}")
    elif not _resident(case, built):
        found.append("no processor can hold it: too many registers or warps")
    found += [f"no {name}" for name in case.expected if not built.instructions[name]]
    return found


def _resident(case: Case, built: Built) -> int:
    return GPUS[case.target].resident_blocks(
        registers=built.registers, shared_bytes=built.shared_bytes, warps=built.warps
    )


def _head(target: str) -> str:
    gpu = GPUS[target]
    columns = f"{'registers':>9} {'shared':>7} {'occupancy':>9} {'roofline':>9} {'estimate':>9}"
    return f"--- {target} ({gpu.name})\n{'launch':<36} {columns}  at"


def _line(case: Case, built: Built | str) -> str:
    gpu, work = GPUS[case.target], case.work
    if isinstance(built, str):
        return f"{case.label:<36}"
    share = _resident(case, built) * built.warps / gpu.warps
    times = f"{gpu.roofline_us(work):>6.1f} us {gpu.estimate_us(work):>6.1f} us"
    resources = f"{built.registers:>9} {built.shared_bytes:>7} {share:>9.0%}"
    return f"{case.label:<36} {resources} {times}  {work.shape}"


if __name__ == "__main__":
    sys.exit(main())
