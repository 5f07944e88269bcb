"""A model folder becomes a program, the program an executor; from then on batches to logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fabric.kernels.executor import create_executor
from fabric.kernels.program import KvLayout, KvPool, StepBatch
from fabric.model.config import DecoderConfig
from fabric.model.decoder import build_program
from fabric.model.weights import Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelBuild:
    """Where compiled kernels are kept (None: the user's cache folder), who is told when compiling
    starts (None: the log), and how many CPU threads they run on (None: all cores)."""

    cache_folder: Path | None = None
    progress: Callable[[str], None] | None = None
    threads: int | None = None


class Runner:
    """One loaded model for sequences of up to `context_limit` tokens (None: all that it can do).

    Raises `ModelError` if the folder can't be served.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str,
        device: torch.device,
        context_limit: int | None,
        build: KernelBuild,
    ) -> None:
        weights = Weights(folder)
        self.config: DecoderConfig = weights.config
        program = build_program(
            weights.config, weights, getattr(torch, dtype), context_limit=context_limit
        )
        self.rope_bytes = program.rope_cos_PE2.nbytes + program.rope_sin_PE2.nbytes
        self._executor = create_executor(
            program,
            device=device.type,
            threads=build.threads,
            cache_folder=build.cache_folder,
            progress=build.progress,
        )

    @property
    def description(self) -> str:
        """Which code runs, for the log."""
        return self._executor.description

    @property
    def weight_bytes(self) -> int:
        """Resident bytes of weights."""
        return self._executor.weight_bytes()

    def kv_layout(self, block_size: int) -> KvLayout:
        """How this model's pages are laid out."""
        return self._executor.kv_layout(block_size)

    def run(self, batch: StepBatch, pool: KvPool) -> Tensor:
        """Logits, float32 [R, V], in a buffer that the next call reuses."""
        return self._executor.run(batch, pool)
