"""Where a sequence's next tokens are written: blocks it lacks, a block that others read too."""

from __future__ import annotations

from fabric.core.engine.blocks import BlockPool
from fabric.core.engine.plan import BlockCopy, CopyKind
from fabric.core.engine.sequence import Sequence


class Writes:
    """Copy-on-write over the pool. `size`: tokens a block."""

    def __init__(self, pool: BlockPool, size: int) -> None:
        self._pool = pool
        self._size = size

    def first_is_shared(self, sequence: Sequence) -> bool:
        """Only the block written at `computed` can be: a fork's tail, which others read too."""
        index = sequence.computed // self._size
        if index >= len(sequence.blocks):
            return False
        block = sequence.blocks[index]
        return self._pool.refs[block] > 1 or self._pool.digests[block] is not None

    def missing(self, sequence: Sequence, count: int) -> int:
        """Blocks to allocate before `count` more tokens can be written, copy-on-write included."""
        end = sequence.computed + count
        new = max(0, -(-end // self._size) - len(sequence.blocks))
        if self.first_is_shared(sequence):
            index = sequence.computed // self._size
            new += self._pool.refs[sequence.blocks[index]] > 1
        return new

    def own_first(self, sequence: Sequence) -> tuple[BlockCopy | None, tuple[int, int] | None]:
        """Make the first block written the sequence's own, for which there must be room: the copy
        to make, and (index, new block). Nothing of both where it need not be another block."""
        if not self.first_is_shared(sequence):
            return None, None
        index = sequence.computed // self._size
        block = sequence.blocks[index]
        if self._pool.refs[block] == 1:  # nobody else reads it: hide it and write in place
            self._pool.unpublish(block)
            return None, None
        own = self._pool.allocate(1)
        assert own is not None, "room was made"
        self._pool.release([block])
        sequence.blocks[index] = own[0]
        copy = BlockCopy(kind=CopyKind.DEVICE, source=block, target=own[0])
        return copy, (index, own[0])
