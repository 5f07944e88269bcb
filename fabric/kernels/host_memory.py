"""Host memory on huge pages: KV pools and other large buffers that are walked in big strides."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from contextlib import suppress

import torch
from torch import Tensor

_POPULATE_WRITE = 23  # madvise(2), Linux 5.14: as if every page were written, its content kept
_CHUNK_BYTES = 32 << 20
_LOWEST_PRIORITY = 19


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


def touch_soon(data_X: Tensor) -> None:
    """Give memory that nobody has touched its pages, while others may use it already.

    The first 32 MB are there at the return; a thread of the lowest priority sees to the others. A
    GB of memory that the machine itself had not had yet costs seconds: a server need not wait.
    Where the system can't do that, all of `data_X` is zeroed here.
    """
    chunks = data_X.view(-1).view(torch.uint8).split(_CHUNK_BYTES)
    if not _populate(chunks[0]):
        data_X.zero_()
    elif len(chunks) > 1:
        threading.Thread(
            target=_populate_all, args=(chunks[1:],), name="touch", daemon=True
        ).start()


def _populate_all(chunks: tuple[Tensor, ...]) -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
    for chunk_X in chunks:
        _populate(chunk_X)


def _populate(chunk_X: Tensor) -> bool:
    """Whether the system could. `chunk_X`: uint8, from the beginning of a page on."""
    madvise = ctypes.CDLL(None).madvise
    place, size = ctypes.c_void_p(chunk_X.data_ptr()), ctypes.c_size_t(chunk_X.numel())
    done: int = madvise(place, size, _POPULATE_WRITE)
    return done == 0
