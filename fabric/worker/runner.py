"""A model folder becomes a program, the program an executor; from then on batches to logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fabric.kernels.executor import create_executor
from fabric.kernels.program import KvLayout, KvPool, StepBatch
from fabric.model.config import DecoderConfig
from fabric.model.decoder import build_program
from fabric.model.weights import Weights


class Runner:
    """One loaded model. Raises `ModelError` if the folder can't be served."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str,
        device: torch.device,
        threads: int | None,
        kernel_cache: Path | None,
        progress: Callable[[str], None] | None,
    ) -> None:
        weights = Weights(folder)
        self.config: DecoderConfig = weights.config
        program = build_program(weights.config, weights, getattr(torch, dtype))
        self._executor = create_executor(
            program,
            device=device.type,
            threads=threads,
            cache_folder=kernel_cache,
            progress=progress,
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
