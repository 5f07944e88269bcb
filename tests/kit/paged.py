"""`PagedRun`: drive an executor by hand, sequence by sequence, over a small block pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fabric.kernels.program import Executor, KvLayout, KvPool, StepBatch


class Runs(Protocol):
    """An executor, or what runs one; None: the logits are another worker's."""

    def kv_layout(self, page: int) -> KvLayout: ...
    def run(self, batch: StepBatch, pool: KvPool) -> Tensor | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Tokens of one sequence for one step, from position `first` on; `row` is its block table's."""

    row: int
    first: int
    tokens: list[int]


class PagedRun:
    """A pool filled with NaN (what was not written must not be read) and shuffled block tables."""

    def __init__(
        self, executor: Executor | Runs, *, page: int = 16, rows: int = 4, blocks_a_row: int = 16
    ) -> None:
        self._executor = executor
        self.page = page
        layout = executor.kv_layout(page)
        blocks = rows * blocks_a_row
        nan = torch.full((blocks, layout.block_bytes()), 0xFF, dtype=torch.uint8)
        self.pool = KvPool(layout=layout, blocks_XB=nan)
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(0))
        self.tables = order.view(rows, blocks_a_row).to(torch.int32)

    def share_prefix(self, source: int, target: int, blocks: int) -> None:
        """What a prefix hit does: the target's first blocks are the source's."""
        self.tables[target, :blocks] = self.tables[source, :blocks]

    def step(self, *pieces: Piece) -> list[Tensor]:
        """Run the pieces as one step; the logits of every token, [len(tokens), V] a piece (none if
        another worker has them)."""
        lengths = [len(piece.tokens) for piece in pieces]
        starts = torch.tensor([0, *lengths]).cumsum(0)
        logits = self._executor.run(
            StepBatch(
                token_ids_T=_int32([token for piece in pieces for token in piece.tokens]),
                query_starts_S1=starts.to(torch.int32),
                first_positions_S=_int32([piece.first for piece in pieces]),
                table_rows_S=_int32([piece.row for piece in pieces]),
                block_tables_XB=self.tables,
                logit_rows_R=torch.arange(sum(lengths), dtype=torch.int32),
            ),
            self.pool,
        )
        return [] if logits is None else list(logits.clone().split(lengths))


def _int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
