"""Host memory on huge pages: KV pools and other large buffers that are walked in big strides."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor


def huge_page_bytes(shape: tuple[int, ...], *, touch: bool = True) -> Tensor:
    """A zeroed uint8 tensor, contiguous, on 2 MB pages where the system grants them.

    Pages of a KV pool lie apart, so with 4 KB pages nearly every one costs TLB misses. All of it is
    touched here: the first touch of cold memory costs 30 times a warm one, and not in a step.
    Without `touch`, pages take memory when they are first used.
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
    # The tensor keeps the region alive; the system hands out its pages zeroed.
    data_X = torch.frombuffer(region, dtype=torch.uint8)
    return (data_X.zero_() if touch else data_X).view(shape)
