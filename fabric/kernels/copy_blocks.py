"""Copies whole KV blocks: swap, copy-on-write, hand-over. A block is one contiguous run of bytes.

Shape legend: X blocks, B bytes of a block.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def copy_blocks(source_XB: Tensor, target_XB: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
    """target_XB[t] = source_XB[s] for each (s, t), in order. uint8, on any two devices.

    In order, because a later pair may read what an earlier one wrote. One memcpy a block: at 368 KB
    (SmolLM2, 16 tokens) the call around it costs nothing.
    """
    for source, target in pairs:
        target_XB[target].copy_(source_XB[source])
