"""Copies of KV blocks between pools: swap, copy-on-write, hand-over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fabric.kernels.copy_blocks import copy_blocks, copy_blocks_at_once
from fabric.kernels.launch import Launch

COPY_LAUNCH = Launch(sizes=(("BLOCK", 1024),), warps=4, stages=1)


class BlockCopier(Protocol):
    """Implementations: `PlainCopier` (the CPU) and `CudaCopier`."""

    def copy(self, source_XB: Tensor, target_XB: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
        """target_XB[t] = source_XB[s] for each (s, t), in order. What the device is given to do
        afterwards sees the copies."""
        ...

    def finish(self) -> None:
        """Return when all copies are done: the host may read what they wrote."""
        ...


def create_copier(device: torch.device) -> BlockCopier:
    """For pools on `device`, and between it and the host."""
    return CudaCopier(device) if device.type == "cuda" else PlainCopier()


class PlainCopier:
    """One memcpy a block, done when the call returns."""

    def copy(self, source_XB: Tensor, target_XB: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
        """As `BlockCopier` says."""
        copy_blocks(source_XB, target_XB, pairs)

    def finish(self) -> None:
        """Nothing is under way."""


class CudaCopier:
    """Copies to and from pinned host memory go over a stream of their own, so the host queues them
    and goes on; the step that follows waits for them on the device. Inside the device one kernel
    copies all blocks. Not run on a GPU yet."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def copy(self, source_XB: Tensor, target_XB: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
        """As `BlockCopier` says."""
        if source_XB.is_cuda and target_XB.is_cuda:
            copy_blocks_at_once(source_XB, target_XB, pairs, launch=COPY_LAUNCH)
            return
        compute = torch.cuda.current_stream(self._stream.device)
        # A block on its way out holds what earlier steps wrote, one on its way in is read by none.
        self._stream.wait_stream(compute)
        with torch.cuda.stream(self._stream):
            for first, last, shift in runs(pairs):
                source = source_XB[first:last]
                target_XB[first + shift : last + shift].copy_(source, non_blocking=True)
        compute.wait_stream(self._stream)

    def finish(self) -> None:
        """Wait on the host."""
        self._stream.synchronize()


def runs(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(first, last, shift), in order: blocks [first, last) go to [first + shift, last + shift);
    neighbours that go to neighbours are one copy."""
    found: list[tuple[int, int, int]] = []
    for source, target in pairs:
        if found and found[-1][1] == source and found[-1][2] == target - source:
            found[-1] = (found[-1][0], source + 1, target - source)
        else:
            found.append((source, source + 1, target - source))
    return found
