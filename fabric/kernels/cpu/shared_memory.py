"""`SharedMemoryCollective`: a group of processes on one machine, over one segment of memory.

Every operation is the same exchange in C++ (`group.h`): write your outbox, share, read the others'.
What is larger than an outbox goes in pieces. The executor takes the same group into its steps.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from fabric.kernels.collective import CollectiveError
from fabric.kernels.cpu.build import load_library

OUTBOX_BYTES = 8 << 20  # of each rank, twice; memory is taken only as far as it is used
TIMEOUT_S = 60.0


class SharedMemoryCollective:
    """Rank `rank` of `size`. All ranks give the same `name`, which no other group may use.

    Returns when all have come. `timeout_s` bounds that, and every later wait for a peer; one that
    has died is noticed within 20 ms. Raises `CollectiveError`, and `BuildError` where the C++
    library can't be had.
    """

    def __init__(
        self,
        name: str,
        rank: int,
        size: int,
        *,
        outbox_bytes: int = OUTBOX_BYTES,
        timeout_s: float = TIMEOUT_S,
        cache_folder: Path | None = None,
    ) -> None:
        if not 0 <= rank < size or not name or "/" in name:
            raise ValueError(f"rank {rank} of {size} in a group named {name!r}")
        self._library = _typed(load_library(cache_folder))
        self._rank, self._size = rank, size
        problem = ctypes.create_string_buffer(200)
        handle = self._library.fabric_group_open(
            f"/{name}".encode(), rank, size, outbox_bytes, int(timeout_s * 1000), problem
        )
        if not handle:
            raise CollectiveError(f"{name}: {problem.value.decode()}")
        self._handle: int | None = handle
        self._close = weakref.finalize(self, self._library.fabric_group_close, handle)
        self._capacity = int(self._library.fabric_group_capacity(handle))

    @property
    def rank(self) -> int:
        """This worker's number, from 0."""
        return self._rank

    @property
    def size(self) -> int:
        """How many workers the group has."""
        return self._size

    @property
    def handle(self) -> int:
        """The group in C++, for the executor's steps; it lives until `close`."""
        if self._handle is None:
            raise CollectiveError("the group is closed")
        return self._handle

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """As `Collective` says."""
        gathered = [torch.empty_like(tensor) for _ in range(self._size)]
        mine, theirs = _bytes(tensor), [_bytes(each) for each in gathered]
        for begin in range(0, len(mine), self._capacity):
            piece = slice(begin, min(begin + self._capacity, len(mine)))
            for each, box in zip(theirs, self._exchange(mine[piece]), strict=True):
                each[piece] = box
        return gathered

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """As `Collective` says."""
        total, *others = self.all_gather(tensor)
        for other in others:
            total += other
        return total

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """As `Collective` says."""
        if len(parts) != self._size:
            raise ValueError(f"{len(parts)} parts for {self._size} ranks")
        lengths = torch.tensor([part.nbytes for part in parts])
        lengths_RR = torch.stack(self.all_gather(lengths))  # [from, to]
        ends_RR = lengths_RR.cumsum(dim=1)
        row_bytes = parts[0].element_size() * prod(parts[0].shape[1:])
        received = [
            torch.empty((int(length) // row_bytes, *parts[0].shape[1:]), dtype=parts[0].dtype)
            for length in lengths_RR[:, self._rank]
        ]
        mine = torch.cat([_bytes(part) for part in parts])
        for begin in range(0, int(ends_RR[:, -1].max()), self._capacity):
            boxes = self._exchange(mine[begin : begin + self._capacity], padded=True)
            for source, box in enumerate(boxes):
                end = int(ends_RR[source, self._rank])
                first = end - int(lengths_RR[source, self._rank])
                low, high = max(first, begin), min(end, begin + self._capacity)
                if low < high:
                    _bytes(received[source])[low - first : high - first] = box[
                        low - begin : high - begin
                    ]
        return received

    def send(self, tensor: Tensor, to: int) -> None:
        """As `Collective` says."""
        data = _bytes(tensor)
        self._done(self._library.fabric_group_send(self.handle, to, data.data_ptr(), data.numel()))

    def receive(self, into: Tensor, source: int) -> Tensor:
        """As `Collective` says."""
        data = _bytes(into)
        self._done(
            self._library.fabric_group_receive(self.handle, source, data.data_ptr(), data.numel())
        )
        return into

    def barrier(self) -> None:
        """As `Collective` says."""
        self._done(self._library.fabric_group_share(self.handle, 0))

    def close(self) -> None:
        """As `Collective` says."""
        self._handle = None
        self._close()

    def _exchange(self, mine: Tensor, *, padded: bool = False) -> list[Tensor]:
        """Every rank's outbox, once all have filled theirs: as long as `mine`, or whole."""
        length = mine.numel()
        outbox = self._library.fabric_group_outbox(self.handle)
        ctypes.memmove(outbox, mine.data_ptr(), length)
        self._done(self._library.fabric_group_share(self.handle, length))
        return [
            _memory(
                self._library.fabric_group_inbox(self.handle, rank),
                self._capacity if padded else length,
            )
            for rank in range(self._size)
        ]

    def _done(self, problem: bytes | None) -> None:
        if problem is not None:
            raise CollectiveError(problem.decode())


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory as uint8, one dimension."""
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError("a group in shared memory moves contiguous tensors on the CPU")
    return tensor.view(-1).view(torch.uint8)


def _memory(address: int, length: int) -> Tensor:
    if length == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer((ctypes.c_uint8 * length).from_address(address), dtype=torch.uint8)


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    problem = ctypes.c_char_p
    for name, result, arguments in (
        ("open", pointer, [problem, integer, integer, size, integer, problem]),
        ("close", None, [pointer]),
        ("capacity", size, [pointer]),
        ("outbox", pointer, [pointer]),
        ("inbox", pointer, [pointer, integer]),
        ("share", problem, [pointer, size]),
        ("send", problem, [pointer, integer, pointer, size]),
        ("receive", problem, [pointer, integer, pointer, size]),
    ):
        function = getattr(library, f"fabric_group_{name}")
        function.restype, function.argtypes = result, arguments
    return library
