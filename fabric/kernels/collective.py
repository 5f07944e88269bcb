"""`Collective`: how the workers of a group exchange tensors in the middle of a step.

`SharedMemoryCollective` (kernels/cpu/shared_memory.py) inside one machine, `ProcessGroupCollective`
(kernels/process_group.py) over gloo between machines and over NCCL between GPUs. Every rank calls
the same operations in the same order. Whoever waits, waits for a bounded time.

A group that has failed once is of no more use: what the others have seen is not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class CollectiveError(RuntimeError):
    """A peer is gone, has given up, or did not answer in time; the message names its rank."""


class Collective(Protocol):
    """One rank's end of a group. Tensors are contiguous, of one device and dtype in all ranks."""

    @property
    def rank(self) -> int:
        """This worker's number, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many workers the group has."""
        ...

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, in the order of ranks; all have the same shape."""
        ...

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, added in their order in `tensor`'s dtype: equal bits everywhere."""
        ...

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """`parts[i]` goes to rank i; back comes what each rank had for this one. Parts may differ
        in their number of rows (also none), in nothing else."""
        ...

    def send(self, tensor: Tensor, to: int) -> None:
        """One tensor to one rank, which calls `receive` with the same shape. Up to two wait in
        between; then this waits, too."""
        ...

    def receive(self, into: Tensor, source: int) -> Tensor:
        """Fill `into` with what `source` sent, in the order sent. Returns `into`."""
        ...

    def barrier(self) -> None:
        """Return when every rank has come here."""
        ...

    def close(self) -> None:
        """Leave the group; the others notice when they wait for this rank."""
        ...
