"""Copies whole KV blocks: swap, copy-on-write, hand-over. A block is one contiguous run of bytes.

Shape legend: X blocks, B bytes of a block, N pairs, W words of 8 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fabric.kernels.launch import Launch


def copy_blocks(source_XB: Tensor, target_XB: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
    """target_XB[t] = source_XB[s] for each (s, t), in order. uint8, on any two devices.

    In order, because a later pair may read what an earlier one wrote. One memcpy a block: at 368 KB
    (SmolLM2, 16 tokens) the call around it costs nothing.
    """
    for source, target in pairs:
        target_XB[target].copy_(source_XB[source])


@triton.jit
def copy_blocks_kernel(
    source_ptr: tl.tensor,
    target_ptr: tl.tensor,
    pair_ptr: tl.tensor,
    words: tl.tensor,
    source_stride: tl.tensor,
    target_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """BLOCK words of one pair a program."""
    pair = tl.program_id(0)
    source = tl.load(pair_ptr + 2 * pair).to(tl.int64)
    target = tl.load(pair_ptr + 2 * pair + 1).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < words
    content = tl.load(source_ptr + source * source_stride + at, mask=mask, other=0)
    tl.store(target_ptr + target * target_stride + at, content, mask=mask)


def copy_blocks_at_once(
    source_XB: Tensor, target_XB: Tensor, pairs: Sequence[tuple[int, int]], *, launch: Launch
) -> None:
    """The same inside one device, with one launch for all pairs that don't touch one another's
    blocks: copy-on-write copies many small groups, and a memcpy each costs 5 us of a host."""
    source_XW, target_XW = source_XB.view(torch.int64), target_XB.view(torch.int64)
    words = source_XW.shape[1]
    block = launch.size("BLOCK")
    shared = source_XB.data_ptr() == target_XB.data_ptr()
    for wave in waves(pairs) if shared else _last_writes(pairs):
        pairs_N2 = torch.tensor(wave, dtype=torch.int32).to(source_XB.device, non_blocking=True)
        copy_blocks_kernel[(len(wave), triton.cdiv(words, block))](
            source_XW,
            target_XW,
            pairs_N2,
            words,
            source_XW.stride(0),
            target_XW.stride(0),
            BLOCK=block,
            **launch.options(),
        )


def waves(pairs: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Cut `pairs`, in order, wherever one reads or writes what its wave writes, or writes what its
    wave reads: inside a wave the order does not matter."""
    found: list[list[tuple[int, int]]] = []
    read: set[int] = set()
    written: set[int] = set()
    for source, target in pairs:
        if not found or source in written or target in written or target in read:
            found.append([])
            read, written = set(), set()
        found[-1].append((source, target))
        read.add(source)
        written.add(target)
    return found


def _last_writes(pairs: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Between two pools only the last write of a target counts."""
    last = {target: source for source, target in pairs}
    return [[(source, target) for target, source in last.items()]] if last else []
