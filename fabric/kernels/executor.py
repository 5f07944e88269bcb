"""`create_executor`: the one place that knows which code is fastest where."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from fabric.kernels.cpu.build import BuildError, Progress
from fabric.kernels.cpu.executor import CpuExecutor, UnsupportedProgram
from fabric.kernels.device import choose_device
from fabric.kernels.program import Executor, Program
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
    cannot run, a warning tells why and the torch path takes its place. float32 is for torch from
    the start. Raises `ValueError` for a device that is not there.
    """
    chosen = choose_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    if chosen.type != "cpu" or program.dtype() == torch.float32:
        return TorchExecutor(program, chosen)
    try:
        return CpuExecutor(
            program,
            threads=threads or len(os.sched_getaffinity(0)),
            cache_folder=cache_folder,
            compiler=compiler,
            progress=progress or _log.info,
        )
    except (BuildError, UnsupportedProgram) as error:
        reason = str(error)
    _log.warning("the fast C++ path is off, the slower torch path runs instead: %s", reason)
    return TorchExecutor(program, chosen)
