"""`create_executor`: the one place that knows which code is fastest where."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from fabric.kernels.cpu.build import BuildError, Progress, default_cache_folder
from fabric.kernels.cpu.executor import CpuExecutor, UnsupportedProgram
from fabric.kernels.cuda.executor import CudaExecutor, target_of
from fabric.kernels.device import choose_device
from fabric.kernels.launch_table import read_tuned, tuned_path
from fabric.kernels.program import Executor, Program
from fabric.kernels.quantized import WeightFormat
from fabric.kernels.quantized_program import expand_program
from fabric.kernels.torch_executor import TorchExecutor

_log = logging.getLogger(__name__)


def create_executor(
    program: Program,
    *,
    device: str = "auto",
    threads: int | None = None,
    cache_folder: Path | None = None,
    compiler: str = "g++",
    progress: Progress | None = None,
) -> Executor:
    """The fastest executor for `program` here.

    `device`: "auto", "cpu" or "cuda"; `threads`: of the CPU (None: all cores). The C++ path is
    compiled at first use into `cache_folder`, which `progress` is told (None: the log); where it
    cannot run, a warning tells why and the torch path takes its place. So does the Triton path of a
    GPU, which reads what `fabric tune` wrote into that folder. float32 is for torch from the start;
    fp8 weights become bfloat16 on a CPU.
    Raises `ValueError` for a device that is not there.
    """
    chosen = choose_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    if program.dtype() == torch.float32:
        return TorchExecutor(program, chosen)
    if chosen.type != "cpu":
        return create_gpu_executor(program, chosen, cache_folder or default_cache_folder())
    say = progress or _log.info
    # torch's own product of fp8 is 60 times slower than bfloat16 on a CPU.
    program = expand_program(program, WeightFormat.FP8, torch.bfloat16, say)
    try:
        return CpuExecutor(
            program,
            threads=threads or len(os.sched_getaffinity(0)),
            cache_folder=cache_folder,
            compiler=compiler,
            progress=say,
        )
    except (BuildError, UnsupportedProgram) as error:
        reason = str(error)
    _log.warning("the fast C++ path is off, the slower torch path runs instead: %s", reason)
    return TorchExecutor(program, chosen)


def create_gpu_executor(
    program: Program, device: torch.device, cache_folder: Path, *, target: str | None = None
) -> Executor:
    """The Triton path, or with a warning the torch path for what it cannot run. `target`: None for
    the device's own."""
    try:
        target = target or target_of(device)
        path = tuned_path(cache_folder, target)
        tuned = read_tuned(path, target) if path.exists() else None
        return CudaExecutor(program, device, target=target, tuned=tuned)
    except ValueError as error:
        reason = str(error)
    _log.warning("the Triton path is off, the slower torch path runs instead: %s", reason)
    return TorchExecutor(program, device)
