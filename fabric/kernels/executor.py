"""`create_executor`: the one place where a device is chosen."""

from __future__ import annotations

import torch

from fabric.kernels.program import Executor, Program
from fabric.kernels.torch_executor import TorchExecutor


def create_executor(
    program: Program, *, device: str = "auto", threads: int | None = None
) -> Executor:
    """The fastest executor for `program` here. `device`: "auto", "cpu" or "cuda"; `threads`: of the
    CPU (None: all cores)."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if threads is not None:
        torch.set_num_threads(threads)
    return TorchExecutor(program, device)
