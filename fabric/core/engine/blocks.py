"""The paged KV memory of one replica: who holds which block, which free ones hold a known prefix.

A device block is in exactly one of three places:

    referenced   refs > 0      in one or more block tables (published or not)
    evictable    refs == 0     published: holds a known prefix; the least recently used goes first
    empty        refs == 0     nothing worth keeping

Host blocks (for swapped sequences) are either held by one sequence or empty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from fabric.core.engine.plan import BlockCopy, CopyKind


class BlockPool:
    """Reference counts, the prefix cache and the host pool, with exact accounting.

    The LRU list is intrusive (two arrays of block numbers with one sentinel), so that taking a
    block out of its middle, which every prefix hit does, costs O(1).
    """

    def __init__(self, *, num_blocks: int, num_host_blocks: int) -> None:
        if num_blocks < 1 or num_host_blocks < 0:
            raise ValueError(f"a pool of {num_blocks} device and {num_host_blocks} host blocks")
        self.num_blocks = num_blocks
        self.num_host_blocks = num_host_blocks
        self.refs = [0] * num_blocks
        self.digests: list[bytes | None] = [None] * num_blocks
        self._published: dict[bytes, int] = {}
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._host_empty = list(range(num_host_blocks - 1, -1, -1))
        self._lru_next = [num_blocks] * (num_blocks + 1)
        self._lru_previous = [num_blocks] * (num_blocks + 1)
        self._evictable = 0

    @property
    def free(self) -> int:
        """Device blocks that `allocate` could hand out now."""
        return len(self._empty) + self._evictable

    @property
    def evictable(self) -> int:
        """Of the free ones, those that hold a known prefix."""
        return self._evictable

    @property
    def host_free(self) -> int:
        """Host blocks that `swap_out` could use now."""
        return len(self._host_empty)

    def match(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks that hold the longest known prefix of a hash chain. Takes no reference."""
        blocks = []
        for digest in digests:
            block = self._published.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each, or None (and nothing happens) if there are fewer.

        Empty blocks go first, then the least recently used evictable ones, which lose their hash.
        """
        if count > self.free:
            return None
        blocks = []
        for _ in range(count):
            block = self._empty.pop() if self._empty else self._evict()
            self.refs[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each block; evictable ones come back to life."""
        for block in blocks:
            if self.refs[block] == 0:
                assert self.digests[block] is not None, "an empty block can't be shared"
                self._lru_remove(block)
            self.refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less to each block of a table, last one first: chains are evicted so."""
        for block in reversed(blocks):
            refs = self.refs[block] - 1
            assert refs >= 0, "released more often than held"
            self.refs[block] = refs
            if refs == 0:
                if self.digests[block] is None:
                    self._empty.append(block)
                else:
                    self._lru_append(block)

    def publish(self, block: int, digest: bytes) -> None:
        """A held block is full and computed: others may find it. The first block of a hash wins."""
        assert self.refs[block] > 0, "only a held block can be published"
        if digest not in self._published and self.digests[block] is None:
            self._published[digest] = block
            self.digests[block] = digest

    def unpublish(self, block: int) -> None:
        """A held block is about to be written again: nobody may find it any more."""
        assert self.refs[block] > 0, "only a held block can be written"
        digest = self.digests[block]
        if digest is not None:
            del self._published[digest]
            self.digests[block] = None

    def kept(self, blocks: Sequence[int]) -> int:
        """How many leading blocks of a table stay known if it is given up: others hold them."""
        count = 0
        for block in blocks:
            if self.refs[block] == 1 or self.digests[block] is None:
                break
            count += 1
        return count

    def swap_out(self, blocks: Sequence[int]) -> list[BlockCopy] | None:
        """Move a table to the host: copies to do, references dropped. None if it does not fit.

        Shared and published blocks are copied too: nobody depends on what others keep.
        """
        if len(blocks) > len(self._host_empty):
            return None
        targets = [self._host_empty.pop() for _ in blocks]
        self.release(blocks)
        kind = CopyKind.SWAP_OUT
        return [
            BlockCopy(kind=kind, source=source, target=target)
            for source, target in zip(blocks, targets, strict=True)
        ]

    def swap_in(self, host_blocks: Sequence[int]) -> list[BlockCopy] | None:
        """Bring host blocks back: copies to do, host blocks freed. None if there is no room."""
        targets = self.allocate(len(host_blocks))
        if targets is None:
            return None
        self.release_host(host_blocks)
        kind = CopyKind.SWAP_IN
        return [
            BlockCopy(kind=kind, source=source, target=target)
            for source, target in zip(host_blocks, targets, strict=True)
        ]

    def release_host(self, host_blocks: Sequence[int]) -> None:
        """Host blocks that nobody needs any more."""
        self._host_empty.extend(reversed(host_blocks))

    def check(self, tables: Iterable[Sequence[int]], host_tables: Iterable[Sequence[int]]) -> None:
        """Every block is accounted for, given all tables that hold references. O(blocks)."""
        held = Counter(block for table in tables for block in table)
        assert [held[block] for block in range(self.num_blocks)] == self.refs, "reference counts"
        evictable = self._lru_blocks()
        assert len(evictable) == self._evictable, "LRU length"
        assert all(self.digests[block] is not None for block in evictable), "evictable, no hash"
        assert all(self.digests[block] is None for block in self._empty), "empty, with a hash"
        places = Counter([*evictable, *self._empty, *held])
        assert places == Counter(range(self.num_blocks)), "each block in exactly one place"
        published = {
            digest: block for block, digest in enumerate(self.digests) if digest is not None
        }
        assert published == self._published, "the cache and the blocks name each other"
        host = Counter(block for table in host_tables for block in table)
        host.update(self._host_empty)
        assert host == Counter(range(self.num_host_blocks)), "each host block in exactly one place"

    def _evict(self) -> int:
        block = self._lru_next[self.num_blocks]
        self._lru_remove(block)
        digest = self.digests[block]
        assert digest is not None
        del self._published[digest]
        self.digests[block] = None
        return block

    def _lru_append(self, block: int) -> None:
        sentinel = self.num_blocks
        last = self._lru_previous[sentinel]
        self._lru_next[last] = block
        self._lru_previous[block] = last
        self._lru_next[block] = sentinel
        self._lru_previous[sentinel] = block
        self._evictable += 1

    def _lru_remove(self, block: int) -> None:
        before, after = self._lru_previous[block], self._lru_next[block]
        self._lru_next[before] = after
        self._lru_previous[after] = before
        self._evictable -= 1

    def _lru_blocks(self) -> list[int]:
        blocks: list[int] = []
        block = self._lru_next[self.num_blocks]
        while block != self.num_blocks and len(blocks) <= self.num_blocks:
            blocks.append(block)
            block = self._lru_next[block]
        return blocks
