"""A model folder becomes a program, the program an executor; from then on batches to logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from fabric.core.errors import ConfigError
from fabric.kernels.device import free_bytes
from fabric.kernels.executor import create_executor
from fabric.kernels.program import KvLayout, KvPool, StepBatch
from fabric.model.config import DecoderConfig
from fabric.model.decoder import Member, build_program
from fabric.model.parallel import Share, share_of
from fabric.model.weights import Weights
from fabric.worker.links import Links
from fabric.worker.memory import require_room


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelBuild:
    """Where compiled kernels are kept (None: the user's cache folder), who is told when compiling
    starts (None: the log), and how many CPU threads they run on (None: all cores).

    `rounding`: plain weights are rounded to the nearest at load (a key of `SCHEMES`;
    None: they stay as they are stored)."""

    cache_folder: Path | None = None
    progress: Callable[[str], None] | None = None
    threads: int | None = None
    rounding: str | None = None


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
        links: Links | None = None,
    ) -> None:
        weights = Weights(folder)
        workers = links.place.spec.workers if links else 1
        require_room(
            _weight_bytes(weights.config, folder, dtype) // workers,
            free_bytes(device),
            device=device.type,
        )
        self.config: DecoderConfig = weights.config
        self.share: Share = share_of(weights.config, links.place if links else None)
        self._links = links
        self._device = device
        self._entering_XD = torch.empty(0)
        program = build_program(
            weights.config,
            weights,
            getattr(torch, dtype),
            context_limit=context_limit,
            member=Member(place=links.place, group=links.stage) if links else None,
            rounding=_rounding(weights.config, build),
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

    def expert_loads(self) -> Tensor | None:
        """int64 [layers, experts] of this worker: rows that its experts got since the start."""
        return self._executor.expert_loads()

    def run(self, batch: StepBatch, pool: KvPool) -> Tensor | None:
        """Logits, float32 [R, V], in a buffer that the next call reuses; None where another worker
        of the group has them. Hidden states come from and go to the neighbouring stages."""
        links = self._links
        if links is None:
            return self._executor.run(batch, pool)
        entering_TD = None
        if links.upstream is not None:
            entering_TD = links.upstream.receive(self._space_for(batch), 0)
        result = self._executor.run(batch, pool, entering_TD)
        if links.downstream is not None:
            links.downstream.send(result, 1)
        return result if links.is_sampler else None

    def _space_for(self, batch: StepBatch) -> Tensor:
        """[T, D] of a buffer that grows to the largest step."""
        tokens, hidden = len(batch.token_ids_T), self.config.hidden
        if len(self._entering_XD) < tokens:
            self._entering_XD = torch.empty(
                (max(tokens, 2 * len(self._entering_XD)), hidden),
                dtype=self._executor.hidden_dtype,
                device=self._device,
            )
        return self._entering_XD[:tokens]


def _weight_bytes(config: DecoderConfig, folder: Path, dtype: str) -> int:
    """Of the whole model as it is loaded; of quantised ones as they are stored."""
    if config.quantization is not None:
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    numbers = sum(prod(shape) for shape in config.tensor_shapes().values())
    itemsize: int = getattr(torch, dtype).itemsize
    return numbers * itemsize


def _rounding(config: DecoderConfig, build: KernelBuild) -> str | None:
    """Raises `ConfigError` where there is nothing to round."""
    if build.rounding is not None and config.quantization is not None:
        raise ConfigError("model.quantization: the model's weights are quantised already")
    return build.rounding
