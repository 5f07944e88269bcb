"""`BlockPool` against a naive model: tables as lists, evictable blocks as one list in LRU order."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from fabric.core.engine.blocks import BlockPool
from fabric.core.engine.plan import BlockCopy, CopyKind


class Table:
    """The blocks that somebody holds, on the device or on the host."""

    def __init__(self, blocks: list[int], *, host: bool = False) -> None:
        self.blocks = blocks
        self.host = host


class PoolMachine(RuleBasedStateMachine):
    """Every verb in any order; after each, exact accounting and the model's view of the cache."""

    tables = Bundle("tables")

    @initialize(blocks=st.integers(1, 12), host=st.integers(0, 8))
    def build(self, blocks: int, host: int) -> None:
        self.pool = BlockPool(num_blocks=blocks, num_host_blocks=host)
        self.held: list[Table] = []
        self.digest_of: dict[int, bytes] = {}  # block -> what it is published as
        self.lru: list[int] = []  # evictable blocks, the next victim first
        self.next_digest = 0

    @rule(target=tables, count=st.integers(0, 6))
    def allocate(self, count: int) -> Table:
        empty = self.pool.num_blocks - len(self._referenced()) - len(self.lru)
        blocks = self.pool.allocate(count)
        if count > empty + len(self.lru):
            assert blocks is None, "allocated what is not there"
            return self._hold([])
        assert blocks is not None and len(set(blocks)) == count, "not enough, or one twice"
        assert not set(blocks) & self._referenced(), "somebody holds that"
        victims = self.lru[: max(0, count - empty)]
        assert [b for b in blocks if b in self.lru] == victims, "empty first, then by LRU"
        for victim in victims:
            self.lru.remove(victim)
            del self.digest_of[victim]
        return self._hold(blocks)

    @rule(target=tables, table=tables, count=st.integers(0, 6))
    def share_prefix(self, table: Table, count: int) -> Table:
        if table.host:
            return self._hold([])
        blocks = table.blocks[:count]
        self.pool.share(blocks)
        return self._hold(list(blocks))

    @rule(target=tables, table=tables)
    def share_what_matches(self, table: Table) -> Table:
        chain = [self.digest_of[b] for b in sorted(self.digest_of)]
        found = self.pool.match([*chain, b"unknown", *chain])
        assert found == sorted(self.digest_of), "the longest known prefix"
        self.pool.share(found)
        self.lru = [block for block in self.lru if block not in found]
        return self._hold(found)

    @rule(table=tables)
    def publish(self, table: Table) -> None:
        for block in () if table.host else table.blocks:
            digest = b"%d" % self.next_digest
            self.next_digest += 1
            self.pool.publish(block, digest)
            self.digest_of.setdefault(block, digest)

    @rule(table=tables, other=tables)
    def publish_a_known_hash(self, table: Table, other: Table) -> None:
        """Two sequences computed the same block: the first stays, the second stays private."""
        known = [self.digest_of[b] for b in other.blocks if b in self.digest_of and not other.host]
        private = [b for b in table.blocks if b not in self.digest_of and not table.host]
        if known and private:
            self.pool.publish(private[0], known[0])
            assert self.pool.match(known[:1]) != private[:1], "the second took over"

    @rule(table=tables)
    def unpublish(self, table: Table) -> None:
        for block in () if table.host else table.blocks[:1]:
            self.pool.unpublish(block)
            self.digest_of.pop(block, None)

    @rule(table=consumes(tables))
    def release(self, table: Table) -> None:
        self.held.remove(table)
        if table.host:
            self.pool.release_host(table.blocks)
        else:
            self.pool.release(table.blocks)
            self._now_evictable(table.blocks)

    @precondition(lambda self: self.pool.num_host_blocks)
    @rule(table=tables)
    def swap_out(self, table: Table) -> None:
        if table.host:
            return
        room = self.pool.host_free
        copies = self.pool.swap_out(table.blocks)
        if copies is None:
            assert len(table.blocks) > room, "there was room"
            return
        self._check_copies(copies, CopyKind.SWAP_OUT, table.blocks)
        blocks, table.blocks, table.host = table.blocks, [c.target for c in copies], True
        self._now_evictable(blocks)

    @rule(table=tables)
    def swap_in(self, table: Table) -> None:
        if not table.host:
            return
        room = self.pool.free
        copies = self.pool.swap_in(table.blocks)
        if copies is None:
            assert len(table.blocks) > room, "there was room"
            return
        self._check_copies(copies, CopyKind.SWAP_IN, table.blocks)
        table.blocks, table.host = [copy.target for copy in copies], False
        for block in table.blocks:
            if block in self.lru:
                self.lru.remove(block)
                del self.digest_of[block]

    @invariant()
    def exact(self) -> None:
        if not hasattr(self, "pool"):
            return
        device = [table.blocks for table in self.held if not table.host]
        self.pool.check(device, [table.blocks for table in self.held if table.host])
        assert self.pool.free == self.pool.num_blocks - len(self._referenced())
        assert self.pool.evictable == len(self.lru)
        for block, digest in self.digest_of.items():
            assert self.pool.match([digest]) == [block], "a published block is not found"

    def _hold(self, blocks: list[int]) -> Table:
        table = Table(blocks)
        self.held.append(table)
        return table

    def _referenced(self) -> set[int]:
        return {block for table in self.held if not table.host for block in table.blocks}

    def _now_evictable(self, released: list[int]) -> None:
        """Last block first: a chain must lose its end before its beginning."""
        for block in reversed(released):
            if block not in self._referenced() and block in self.digest_of:
                self.lru.append(block)

    def _check_copies(self, copies: list[BlockCopy], kind: CopyKind, sources: list[int]) -> None:
        assert [copy.source for copy in copies] == sources, "each block once, in table order"
        assert all(copy.kind is kind for copy in copies)
