"""What a step's kernels read of the step: integers, in one buffer, so that they travel in one copy.

Shape legend: T tokens, S decoding sequences, C sequences with more tokens, N prefill tiles, R logit
rows, B blocks of a sequence's table.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fabric.kernels.paged_attention import Decoding
from fabric.kernels.prefill_attention import Prefill, tiles
from fabric.kernels.program import StepBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """How a step is laid out: what a captured graph is captured for. `longest`: bound of what a
    decoding sequence sees; `blocks`: columns of the tables."""

    tokens: int
    logit_rows: int
    decoding: int
    chunks: int
    tiles: int
    longest: int
    blocks: int

    def lengths(self) -> tuple[int, ...]:
        """Of the parts of the buffer, in the order of `StepInputs.of`."""
        sequences = self.decoding + self.chunks
        one = (self.tokens, self.tokens, self.tokens, self.logit_rows, self.decoding, self.decoding)
        chunked = (self.chunks, self.chunks, self.chunks, self.chunks, self.tiles, self.tiles)
        return (*one, self.decoding, *chunked, sequences * self.blocks)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepInputs:
    """Views of the buffer, int32. `slots_T`: where a token's keys go, block * page + place; -1:
    nowhere. Tables list the decoding sequences first, then those with chunks."""

    token_ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    logit_rows_R: Tensor
    decoding: Decoding | None
    prefill: Prefill | None
    tables_XB: Tensor

    @staticmethod
    def of(buffer: Tensor, shape: StepShape) -> StepInputs:
        """The parts of a buffer of `sum(shape.lengths())` integers or more."""
        lengths = shape.lengths()
        parts = buffer[: sum(lengths)].split(lengths)
        decoding = Decoding(
            tokens_S=parts[4], rows_S=parts[5], lengths_S=parts[6], longest=shape.longest
        )
        prefill = Prefill(
            starts_S=parts[7],
            counts_S=parts[8],
            first_S=parts[9],
            rows_S=parts[10],
            tile_sequences_N=parts[11],
            tile_rows_N=parts[12],
        )
        return StepInputs(
            token_ids_T=parts[0],
            positions_T=parts[1],
            slots_T=parts[2],
            logit_rows_R=parts[3],
            decoding=decoding if shape.decoding else None,
            prefill=prefill if shape.chunks else None,
            tables_XB=parts[13].view(shape.decoding + shape.chunks, shape.blocks),
        )


class StepPacker:
    """Batches -> integers. `group`: query heads of a kv head; `tile_rows`: of a prefill tile."""

    def __init__(self, *, page: int, group: int, tile_rows: int) -> None:
        self._page = page
        self._group = group
        self._tile_rows = tile_rows

    def pack(self, batch: StepBatch) -> tuple[StepShape, Tensor]:
        """One step as it is."""
        starts = batch.query_starts_S1.tolist()
        counts = [end - start for start, end in pairwise(starts)]
        firsts = batch.first_positions_S.tolist()
        ones = [index for index, count in enumerate(counts) if count == 1]
        many = [index for index, count in enumerate(counts) if count > 1]
        reached = [first + count for first, count in zip(firsts, counts, strict=True)]
        tile_sequences, tile_rows = tiles(
            [counts[index] for index in many], self._group, self._tile_rows
        )
        blocks = -(-max(reached) // self._page)
        tables = batch.block_tables_XB[batch.table_rows_S[ones + many].long(), :blocks]
        positions_T, slots_T = self._places(batch, counts, firsts)
        shape = StepShape(
            tokens=len(batch.token_ids_T),
            logit_rows=len(batch.logit_rows_R),
            decoding=len(ones),
            chunks=len(many),
            tiles=len(tile_rows),
            longest=max((reached[index] for index in ones), default=0),
            blocks=blocks,
        )
        rest = [
            [starts[index] for index in ones],
            list(range(len(ones))),
            [reached[index] for index in ones],
            [starts[index] for index in many],
            [counts[index] for index in many],
            [firsts[index] for index in many],
            list(range(len(ones), len(ones) + len(many))),
            tile_sequences,
            tile_rows,
        ]
        listed = torch.tensor([value for part in rest for value in part], dtype=torch.int32)
        known = (batch.token_ids_T, positions_T, slots_T, batch.logit_rows_R)
        return shape, torch.cat([*known, listed, tables.flatten()])

    def pack_padded(self, batch: StepBatch, *, sequences: int, longest: int) -> Tensor:
        """A step of decoding sequences only, filled up to `sequences` of up to `longest` keys:
        padding reads token 0 at position 0, writes no keys, sees none, and gets logits nobody
        wants."""
        given = len(batch.token_ids_T)
        padding = sequences - given
        blocks = -(-longest // self._page)
        positions_T, slots_T = self._places(batch, [1] * given, batch.first_positions_S.tolist())
        tables = torch.zeros((sequences, blocks), dtype=torch.int32)
        used = batch.block_tables_XB[batch.table_rows_S.long(), :blocks]
        tables[:given, : used.shape[1]] = used

        def padded(values: Tensor, filler: int = 0) -> Tensor:
            return torch.nn.functional.pad(values, (0, padding), value=filler)

        every = torch.arange(sequences, dtype=torch.int32)
        decoding = (every, every, padded(positions_T + 1))
        known = (padded(batch.token_ids_T), padded(positions_T), padded(slots_T, -1), every)
        return torch.cat([*known, *decoding, tables.flatten()])

    def _places(
        self, batch: StepBatch, counts: list[int], firsts: list[int]
    ) -> tuple[Tensor, Tensor]:
        repeats = torch.tensor(counts)
        within = torch.arange(int(repeats.sum())) - (repeats.cumsum(0) - repeats).repeat_interleave(
            repeats
        )
        positions = torch.tensor(firsts).repeat_interleave(repeats) + within
        rows = batch.table_rows_S.long().repeat_interleave(repeats)
        blocks = batch.block_tables_XB[rows, positions // self._page]
        slots = blocks * self._page + (positions % self._page)
        return positions.to(torch.int32), slots.to(torch.int32)
