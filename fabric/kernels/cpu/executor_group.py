"""The group of a program as C++ takes it, and the records of what is spread over it."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import torch
from torch import Tensor

from fabric.kernels.collective import Collective, CollectiveError
from fabric.kernels.cpu.shared_memory import OUTBOX_BYTES, SharedMemoryCollective
from fabric.kernels.program import Program
from fabric.kernels.summation import ChunkedSum

INPUT_STEP = 32  # kStepInputs in packed_matrix.h: a chunk begins at a multiple of it
STACK_HEIGHT = 16  # kStackHeight in program.h


class ExecutorGroup:
    """`handle` is a Group of group.h (None: the program is alone), `vocab_starts` an int32 array.

    A group in shared memory is used as it is: the step never leaves C++. Any other is called back
    for each exchange.
    """

    def __init__(self, library: ctypes.CDLL, program: Program) -> None:
        group = program.group
        runs = program.vocab_runs or (range(program.vocab),)
        starts = [*(run.start for run in runs), program.vocab]
        self.vocab_starts = torch.tensor(starts, dtype=torch.int32)
        self.handle: int | None = None
        self._keep: list[Any] = [group]
        self._shared: SharedMemoryCollective | None = None
        self._error: Exception | None = None
        if isinstance(group, SharedMemoryCollective):
            self.handle = group.handle
            self._shared = group
        elif group is not None:
            self._call_back(library, group)

    def require_open(self) -> None:
        """C++ must not touch a group that was closed. Raises `CollectiveError`."""
        if self._shared is not None:
            assert self._shared.handle == self.handle

    def raise_lost(self, problem: str) -> None:
        """The error of a group that is lost."""
        error, self._error = self._error, None
        raise CollectiveError(problem) from error

    def _call_back(self, library: ctypes.CDLL, group: Collective) -> None:
        def gather(mine: int, everybodys: int, size: int) -> int:
            try:
                parts = group.all_gather(_memory(mine, size).clone())
                for rank, part in enumerate(parts):
                    _memory(everybodys + rank * size, size).copy_(part)
            except Exception as error:  # noqa: BLE001 - C++ must not see it; `raise_lost` tells
                self._error = error
                return 1
            return 0

        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        callback = kind(gather)
        self._keep.append(callback)
        create = library.fabric_group_of_callback
        create.restype = ctypes.c_void_p
        create.argtypes = [kind, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
        self.handle = create(callback, group.rank, group.size, OUTBOX_BYTES)
        close = library.fabric_group_close
        close.restype, close.argtypes = None, [ctypes.c_void_p]
        weakref.finalize(self, close, self.handle)


class ChunkRecords:
    """The chunks and pieces of a Linear as arrays of three int32 (program.h: Chunk, Piece)."""

    def __init__(self, chunked: ChunkedSum | None, group: Collective | None) -> None:
        chunks: list[tuple[int, int, int]] = []
        pieces: list[tuple[int, int, int]] = []
        if chunked is not None:
            rank = group.rank if group is not None else 0
            first = 0
            for chunk, merges in zip(chunked.runs[rank], chunked.chunk_merges(rank), strict=True):
                steps = -(-chunked.sizes[chunk] // INPUT_STEP)
                chunks.append((first, steps, merges))
                first += steps
            if group is not None:
                whose = [
                    (each, index)
                    for each in range(group.size)
                    for index in range(len(chunked.pieces(each)))
                ]
                pieces = [
                    (*place, merges)
                    for place, merges in zip(whose, chunked.piece_merges(), strict=True)
                ]
        self.chunks = _array(chunks)
        self.pieces = _array(pieces)


def unsupported_chunks(chunked: ChunkedSum, group: Collective | None) -> str | None:
    """Why the C++ path can't add in this order; None if it can."""
    rank = group.rank if group is not None else 0
    if len(chunked.runs) != (group.size if group is not None else 1):
        return "its chunks are for another number of workers"
    run = chunked.runs[rank]
    if any(chunked.sizes[chunk] % INPUT_STEP for chunk in run[:-1]):
        return f"a chunk does not end at a multiple of {INPUT_STEP} inputs"
    heights = [_height(chunked.chunk_merges(rank)), _height(chunked.piece_merges())]
    if max(heights) > STACK_HEIGHT:
        return f"its sum needs {max(heights)} partial sums at once"
    return None


def _height(merges: tuple[int, ...]) -> int:
    height = highest = 0
    for each in merges:
        height += 1
        highest = max(highest, height)
        height -= each
    return highest


def _array(rows: list[tuple[int, int, int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, 3)


def _memory(address: int, length: int) -> Tensor:
    buffer = (ctypes.c_uint8 * length).from_address(address)
    return torch.frombuffer(buffer, dtype=torch.uint8) if length else torch.empty(0).byte()
