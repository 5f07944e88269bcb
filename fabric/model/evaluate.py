"""How good a model is on a text, and how near it stays to another one: perplexity, top-1, KL.

The text is cut into windows that don't overlap; each is read from an empty context, as a server
would read a prompt. So the perplexity is comparable between formats of one model in one run, not
with papers that slide their window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fabric.kernels.device import allocate_pool
from fabric.kernels.program import Executor, KvPool, StepBatch
from fabric.kernels.quantized import WeightFormat
from fabric.model.progress import Progress, silent

PAGE = 16
# How many percent of perplexity a format may cost: what `fabric eval` judges by.
MOST_LOSS_PERCENT: Mapping[WeightFormat, float] = {
    WeightFormat.FP8: 1.0,
    WeightFormat.INT8: 1.0,
    WeightFormat.INT4: 4.0,
}
CHUNK = 128  # tokens in a step: bounds the logits to 128 * vocabulary * 4 bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Over `tokens` predictions. `agreement`: the share where model and base find the same token
    likeliest; `divergence`: mean KL(base || model) in nats. Both None without a base."""

    tokens: int
    perplexity: float
    base_perplexity: float | None = None
    agreement: float | None = None
    divergence: float | None = None

    def loss_percent(self) -> float | None:
        """How much higher the perplexity is than the base's."""
        if self.base_perplexity is None:
            return None
        return 100 * (self.perplexity / self.base_perplexity - 1)


def evaluate(
    executor: Executor,
    tokens: Sequence[int],
    *,
    base: Executor | None = None,
    window: int = 512,
    progress: Progress = silent,
) -> Evaluation:
    """Read `tokens` with the model, and with `base` beside it. Raises `ValueError` below 2."""
    windows = [tokens[first : first + window] for first in range(0, len(tokens), window)]
    windows = [part for part in windows if len(part) > 1]
    if not windows:
        raise ValueError("an evaluation needs two tokens at least")
    device = torch.device("cpu")
    reader = _Reader.of(executor, window, device)
    against = _Reader.of(base, window, device) if base else None
    loss = base_loss = same = divergence = 0.0
    count = 0
    for done, part in enumerate(windows):
        targets = torch.tensor(part[1:])
        beside = against.read(part) if against else None
        for first, read_RV in reader.read(part):
            target_R = targets[first : first + len(read_RV)]
            log_RV = read_RV[: len(target_R)]
            loss += _loss(log_RV, target_R)
            count += len(target_R)
            if beside is None:
                continue
            base_RV = next(beside)[1][: len(target_R)]
            base_loss += _loss(base_RV, target_R)
            same += float((base_RV.argmax(dim=1) == log_RV.argmax(dim=1)).sum())
            divergence += float((base_RV.exp() * (base_RV - log_RV)).double().sum())
        progress("evaluating", done + 1, len(windows))
    if base is None:
        return Evaluation(tokens=count, perplexity=math.exp(loss / count))
    return Evaluation(
        tokens=count,
        perplexity=math.exp(loss / count),
        base_perplexity=math.exp(base_loss / count),
        agreement=same / count,
        divergence=divergence / count,
    )


def _loss(log_RV: Tensor, target_R: Tensor) -> float:
    """Summed negative log-probability of the targets, in nats."""
    return -float(log_RV.gather(1, target_R[:, None]).double().sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """An executor with a pool for one window."""

    executor: Executor
    pool: KvPool
    table_XB: Tensor

    @staticmethod
    def of(executor: Executor, window: int, device: torch.device) -> _Reader:
        layout = executor.kv_layout(PAGE)
        blocks = -(-window // PAGE)
        return _Reader(
            executor=executor,
            pool=KvPool(
                layout=layout, blocks_XB=allocate_pool(blocks, layout.block_bytes(), device)
            ),
            table_XB=torch.arange(blocks, dtype=torch.int32)[None],
        )

    def read(self, tokens: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """(position, log-probabilities float32 [R, V] of what follows it and the next ones)."""
        for first in range(0, len(tokens), CHUNK):
            part = torch.tensor(tokens[first : first + CHUNK], dtype=torch.int32)
            logits_RV = self.executor.run(
                StepBatch(
                    token_ids_T=part,
                    query_starts_S1=torch.tensor([0, len(part)], dtype=torch.int32),
                    first_positions_S=torch.tensor([first], dtype=torch.int32),
                    table_rows_S=torch.zeros(1, dtype=torch.int32),
                    block_tables_XB=self.table_XB,
                    logit_rows_R=torch.arange(len(part), dtype=torch.int32),
                ),
                self.pool,
            )
            yield first, logits_RV.float().log_softmax(dim=-1)
