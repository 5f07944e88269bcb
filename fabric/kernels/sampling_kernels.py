"""Which sampling runs where: C++ on the CPU, Triton on a GPU, the reference where neither can."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fabric.kernels.cpu.build import BuildError, Progress, load_library
from fabric.kernels.draw import TritonSampling
from fabric.kernels.sampling import CpuSampling, Draw, Ranked, TorchSampling

_log = logging.getLogger(__name__)


class SamplingKernels(Protocol):
    """Implementations: `TorchSampling` (the reference, any device) and its CPU and GPU twins."""

    def greedy(self, logits_RV: Tensor) -> list[int]:
        """The likeliest token of every row. Raises `NoFiniteLogit`."""
        ...

    def draw(self, logits_RV: Tensor, draws: Sequence[Draw]) -> list[int]:
        """One token an entry. Raises `NoFiniteLogit`."""
        ...

    def rank(self, logits_RV: Tensor, asks: Sequence[tuple[int, int, int]]) -> list[Ranked]:
        """For each (row, token, top): under softmax of the row as it is. Raises `NoFiniteLogit`."""
        ...


def create_sampling(
    device: torch.device, cache_folder: Path | None = None, *, progress: Progress | None = None
) -> SamplingKernels:
    """The C++ twin for the CPU, the Triton twin for a GPU.

    The twin is compiled at first use into `cache_folder`, which `progress` is told (None: the
    log); where that fails, a warning tells why and the reference takes its place.
    """
    if device.type == "cpu":
        try:
            return CpuSampling(load_library(cache_folder, progress=progress or _log.info))
        except BuildError as error:
            _log.warning("C++ sampling is off, the slower torch path runs instead: %s", error)
        return TorchSampling()
    return TritonSampling()
