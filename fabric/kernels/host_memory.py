"""Host memory on huge pages: KV pools and other large buffers that are walked in big strides."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor


def huge_page_bytes(shape: tuple[int, ...]) -> Tensor:
    """A zeroed uint8 tensor, contiguous, on 2 MB pages where the system grants them.

    Pages of a KV pool lie apart, so with 4 KB pages nearly every one costs TLB misses. All of it is
    touched here: the first touch of cold memory costs 30 times a warm one, and not in a step.
    Raises `OSError` when the memory is not to be had.
    """
    size = 1
    for extent in shape:
        size *= extent
    if size == 0:
        return torch.empty(shape, dtype=torch.uint8)
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            region.madvise(mmap.MADV_HUGEPAGE)
    # The tensor keeps the region alive.
    return torch.frombuffer(region, dtype=torch.uint8).zero_().view(shape)
