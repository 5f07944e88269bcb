"""`Guarded`: tensors with poisoned bands around them, so that a kernel's stray touch is seen."""

from __future__ import annotations

import torch
from torch import Tensor

BAND_BYTES = 256  # also keeps what lies inside aligned as a CUDA allocation is


class Guarded:
    """Makes tensors inside larger buffers of 0xFF bytes: NaN in every float format, -1 in integers.

    A read beyond a tensor finds NaN and shows in the result; a write beyond it, `check()` finds.
    """

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, int]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Contiguous, full of poison: a kernel must write all of it, or not read it."""
        size = torch.Size(shape).numel() * dtype.itemsize
        room = -(-size // BAND_BYTES) * BAND_BYTES
        buffer = torch.full((room + 3 * BAND_BYTES,), 0xFF, dtype=torch.uint8)
        shift = -buffer.data_ptr() % BAND_BYTES
        buffer = buffer[shift : shift + room + 2 * BAND_BYTES]
        self._buffers.append((buffer, size))
        return buffer[BAND_BYTES : BAND_BYTES + size].view(dtype).view(shape)

    def copy(self, values: Tensor) -> Tensor:
        """The same values between bands."""
        guarded = self.empty(tuple(values.shape), values.dtype)
        guarded.copy_(values)
        return guarded

    def check(self) -> None:
        """Every band is as it was."""
        for buffer, size in self._buffers:
            assert (buffer[:BAND_BYTES] == 0xFF).all(), "the band below a buffer was written"
            assert (buffer[BAND_BYTES + size :] == 0xFF).all(), (
                "the band above a buffer was written"
            )
