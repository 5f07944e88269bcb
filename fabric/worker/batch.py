"""Plan -> tensors. The worker's memory of its sequences, and the batch that one step runs.

A plan carries deltas, so this file keeps per sequence what does not change: token history, block
table row, sampling state. The block table is one persistent int32 tensor; a sequence owns a row of
it from its start to its drop, and a step writes only the entries that are new.

Shape legend: T tokens, S sequences in the step, X table rows, B blocks a sequence, R logit rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy
import torch
from torch import Tensor

from fabric.core.engine.plan import Previous, SequenceStart, SequenceStep
from fabric.kernels.program import StepBatch
from fabric.worker.sampler import SamplingState


class SequenceState:
    """One sequence as the worker knows it. `tokens` is its whole history, prompt first."""

    __slots__ = ("blocks", "epoch", "prompt_length", "row", "sampling", "sequence", "tokens")

    def __init__(self, start: SequenceStart, row: int, sampling: SamplingState) -> None:
        self.sequence = start.sequence
        self.epoch = start.epoch
        self.row = row
        self.tokens = list(start.tokens)
        self.prompt_length = start.prompt_length
        self.blocks = len(start.blocks)
        self.sampling = sampling


class SequenceTable:
    """All sequences of a worker by their id. A step that names an unknown one, or another epoch of
    one, is a bug of the caller and stops here: it never computes with stale state."""

    def __init__(self, *, max_sequences: int, context_limit: int, block_size: int) -> None:
        self._block_size = block_size
        self._columns = -(-context_limit // block_size)
        self._states: dict[int, SequenceState] = {}
        self._free_rows: list[int] = []
        self.blocks_XB = torch.zeros((0, self._columns), dtype=torch.int32)
        self._grow(max_sequences)

    def __len__(self) -> int:
        return len(self._states)

    def start(self, start: SequenceStart, sampling: SamplingState) -> SequenceState:
        """Take a full record. It replaces what is known under a lower epoch."""
        known = self._states.get(start.sequence)
        assert known is None or known.epoch < start.epoch, (
            f"sequence {start.sequence} starts again at epoch {start.epoch}"
        )
        if known is not None:
            self.drop(start.sequence)
        if not self._free_rows:
            self._grow(2 * len(self.blocks_XB))
        state = SequenceState(start, self._free_rows.pop(), sampling)
        self._states[start.sequence] = state
        assert state.blocks <= self._columns, f"sequence {start.sequence} outgrew its block table"
        self._blocks[state.row, : state.blocks] = start.blocks
        return state

    def drop(self, sequence: int) -> None:
        """Forget a sequence; one that is not known was dropped with its replica's loss."""
        state = self._states.pop(sequence, None)
        if state is not None:
            self._free_rows.append(state.row)

    def advance(self, step: SequenceStep, resolve: Callable[[Previous], int]) -> SequenceState:
        """Apply a step's deltas and check that it continues what is known."""
        state = self._states.get(step.sequence)
        assert state is not None, f"sequence {step.sequence} is not known to this worker"
        assert state.epoch == step.epoch, f"sequence {step.sequence}: another epoch"
        for token in step.tokens:
            state.tokens.append(resolve(token) if isinstance(token, Previous) else token)
        if step.blocks:
            end = state.blocks + len(step.blocks)
            assert end <= self._columns, f"sequence {step.sequence} outgrew its block table"
            self._blocks[state.row, state.blocks : end] = step.blocks
            state.blocks = end
        if step.replace is not None:
            index, block = step.replace
            assert index < state.blocks
            self._blocks[state.row, index] = block
        reached = step.start + step.count
        assert step.count > 0 and reached <= state.blocks * self._block_size, (
            f"sequence {step.sequence}: no block for position {reached - 1}"
        )
        assert step.samples == (reached == len(state.tokens)) and reached <= len(state.tokens), (
            f"sequence {step.sequence}: samples iff it reaches the end of its history"
        )
        return state

    def _grow(self, rows: int) -> None:
        blocks_XB = torch.zeros((rows, self._columns), dtype=torch.int32)
        blocks_XB[: len(self.blocks_XB)] = self.blocks_XB
        self._free_rows.extend(reversed(range(len(self.blocks_XB), rows)))
        self.blocks_XB = blocks_XB
        self._blocks = blocks_XB.numpy()


class Span:
    """Positions [start, start + count) of one sequence, as part of a batch; `logits`: how many of
    its last positions want logits."""

    __slots__ = ("count", "logits", "start", "state")

    def __init__(self, state: SequenceState, start: int, count: int, logits: int) -> None:
        self.state = state
        self.start = start
        self.count = count
        self.logits = logits


class BatchBuilder:
    """Spans -> `StepBatch`, in one buffer that the next build reuses.

    A batch of the same shape as an earlier one is that very record, filled anew: decode steps
    follow each other with one shape, and an executor can keep what it prepared for it.
    """

    _SHAPES_MAX = 256

    def __init__(self) -> None:
        self._shapes: dict[tuple[int, int, int], tuple[_Integers, StepBatch]] = {}
        self._tables_XB: Tensor | None = None
        self._resize(4096)

    def build(self, spans: Iterable[Span], blocks_XB: Tensor) -> StepBatch:
        """One ragged batch; spans of one sequence must not be in it twice."""
        token_ids: list[int] = []
        query_starts = [0]
        first_positions: list[int] = []
        table_rows: list[int] = []
        logit_rows: list[int] = []
        for span in spans:
            state, start, count = span.state, span.start, span.count
            if count == 1:
                token_ids.append(state.tokens[start])
            else:
                token_ids += state.tokens[start : start + count]
            end = len(token_ids)
            query_starts.append(end)
            first_positions.append(start)
            table_rows.append(state.row)
            if span.logits == 1:
                logit_rows.append(end - 1)
            elif span.logits:
                logit_rows.extend(range(end - span.logits, end))
        shape = (len(token_ids), len(first_positions), len(logit_rows))
        target, batch = self._of_shape(shape, blocks_XB)
        target[:] = token_ids + query_starts + first_positions + table_rows + logit_rows
        return batch

    def _of_shape(
        self, shape: tuple[int, int, int], blocks_XB: Tensor
    ) -> tuple[_Integers, StepBatch]:
        if blocks_XB is not self._tables_XB or len(self._shapes) >= self._SHAPES_MAX:
            self._shapes.clear()
            self._tables_XB = blocks_XB
        known = self._shapes.get(shape)
        if known is not None:
            return known
        tokens, sequences, rows = shape
        lengths = (tokens, sequences + 1, sequences, sequences, rows)
        total = sum(lengths)
        if total > self._buffer.numel():
            self._resize(2 * total)
        token_ids_T, query_starts_S1, first_positions_S, table_rows_S, logit_rows_R = self._buffer[
            :total
        ].split(lengths)
        batch = StepBatch(
            token_ids_T=token_ids_T,
            query_starts_S1=query_starts_S1,
            first_positions_S=first_positions_S,
            table_rows_S=table_rows_S,
            block_tables_XB=blocks_XB,
            logit_rows_R=logit_rows_R,
        )
        self._shapes[shape] = self._array[:total], batch
        return self._shapes[shape]

    def _resize(self, size: int) -> None:
        self._shapes.clear()
        self._buffer = torch.zeros(size, dtype=torch.int32)
        self._array: _Integers = self._buffer.numpy()


_Integers = numpy.ndarray[tuple[int], numpy.dtype[numpy.int32]]
