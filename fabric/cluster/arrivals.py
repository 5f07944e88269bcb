"""KV that comes to a replica, group by group: for whom, in which slots, and what is here of it.

claim (checksum right) ──> staged by another thread ──> every layer and head: the engine's
  └─ nobody waits, or it was here before          └─ nobody waits any more: slots are cleared
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

from fabric.cluster.kv_ends import KvEnds
from fabric.core.engine.borrowing import LOAN

if TYPE_CHECKING:
    from fabric.worker.kv_transfer import GroupHeader

# Slots of what comes; those of what leaves are the engine's, and begin at 0.
ARRIVALS_FROM = 1 << 40


class NotExpected(Exception):
    """Nobody waits for this group."""


class CameBefore(Exception):
    """All of this group is here: workers that share KV heads send the same, and calls repeat."""


@dataclass(slots=True, kw_only=True)
class Assembly:
    """The groups of one run of positions: of every layer and head before it counts."""

    slot: int
    count: int  # of slots that are to be cleared
    under_way: int = 0  # groups that another thread is putting into them
    over: bool = False  # nobody wants it: whoever is under way clears the slots afterwards
    claimed: set[tuple[int, int]] = field(default_factory=set)  # staged, or about to be
    cells: set[tuple[int, int]] = field(default_factory=set)  # staged

    def add(self, header: GroupHeader) -> bool:
        """A group of it is staged. Is it whole?"""
        self.cells |= cells_of(header)
        return len(self.cells) == header.part.all_layers * header.part.all_heads


@dataclass(slots=True, kw_only=True)
class Incoming:
    """A prompt that is on its way here."""

    dispatcher: str
    timer: asyncio.TimerHandle
    loan: bool = False  # from no request of its own: see `loans`
    runs: dict[tuple[int, int, int], Assembly] = field(default_factory=dict)


class Arrivals:
    """Who waits is said by the asyncio thread; groups are staged by others, so there is a lock."""

    def __init__(self, ends: KvEnds) -> None:
        self.waiting: dict[str, Incoming] = {}
        self._ends = ends
        self._next_slot = ARRIVALS_FROM
        self._lock = threading.Lock()

    def stage(self, request_id: str, reference: Any) -> tuple[GroupHeader, Assembly]:
        """Another thread, which goes on even if who waits for it is cancelled. Raises
        `NotExpected`, `CameBefore` and what `KvEnds.arrive` raises."""
        claimed: list[Assembly] = []

        def slot_of(header: GroupHeader) -> int:
            """Where a group goes whose checksum is right."""
            with self._lock:
                claimed.append(self._claim(request_id, header))
            return claimed[0].slot

        try:
            header = self._ends.arrive(reference, slot_of)
        finally:
            with self._lock:
                for assembly in claimed:
                    assembly.under_way -= 1
                    self._clear(assembly)
        return header, claimed[0]

    def forget(self, request_id: str) -> None:
        """Nobody waits for it any more: clear what is staged and not the engine's."""
        with self._lock:
            incoming = self.waiting.pop(request_id, None)
            if incoming is None:
                return
            incoming.timer.cancel()
            for assembly in incoming.runs.values():
                assembly.over = True
                self._clear(assembly)

    def is_loan(self, request_id: str) -> bool:
        """Is it waited for, and lent?"""
        incoming = self.waiting.get(request_id)
        return incoming is not None and incoming.loan

    def _claim(self, request_id: str, header: GroupHeader) -> Assembly:
        incoming = self.waiting.get(request_id)
        key = (header.epoch, header.first, header.end)
        if incoming is None or header.request_id != (LOAN if incoming.loan else request_id):
            raise NotExpected
        count = -(-(header.end - header.first) // header.page)
        assembly = incoming.runs.get(key)
        if assembly is None:
            assembly = incoming.runs[key] = Assembly(slot=self._next_slot, count=count)
            self._next_slot += count
        cells = cells_of(header)
        if cells <= assembly.claimed:
            raise CameBefore
        assembly.claimed |= cells
        assembly.under_way += 1
        return assembly

    def _clear(self, assembly: Assembly) -> None:
        """With the lock: its slots, once nobody wants them and nobody fills them."""
        if assembly.over and not assembly.under_way:
            self._ends.discard(assembly.slot, assembly.count)


def cells_of(header: GroupHeader) -> set[tuple[int, int]]:
    """The (layer, head) pairs of a group."""
    part = header.part
    return set(product(range(*part.layers), range(*part.heads)))


def bytes_of(header: GroupHeader) -> int:
    """Of keys and values in a group."""
    layers, heads = header.part.layers, header.part.heads
    element = 4 if header.dtype == "float32" else 2
    rows = (layers[1] - layers[0]) * 2 * (heads[1] - heads[0])
    return rows * (header.end - header.first) * header.head_dim * element
