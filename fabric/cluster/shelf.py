"""What was lent stays in the store for whoever wants it next, within a limit of bytes."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

# Where a run of blocks begins, and the hash of all up to its end.
Key = tuple[int, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """References to one run's groups; Ray keeps what they refer to."""

    references: tuple[Any, ...]
    size_bytes: int


class Shelf:
    """The least recently used goes first. `limit_bytes` may be more than the store has memory: then
    Ray writes to disk what it has no room for, and reads it again when it is asked for."""

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise ValueError("a shelf of less than nothing")
        self.limit_bytes = limit_bytes
        self.size_bytes = 0
        self._kept: OrderedDict[Key, Kept] = OrderedDict()

    def find(self, key: Key) -> tuple[Any, ...]:
        """References to a run's groups; none: it is not here."""
        kept = self._kept.get(key)
        if kept is None:
            return ()
        self._kept.move_to_end(key)
        return kept.references

    def put(self, key: Key, references: tuple[Any, ...], size_bytes: int) -> None:
        """Keep it, if it has room; others make room for it."""
        self.drop(key)
        if size_bytes > self.limit_bytes:
            return
        self._kept[key] = Kept(references=references, size_bytes=size_bytes)
        self.size_bytes += size_bytes
        while self.size_bytes > self.limit_bytes:
            self.size_bytes -= self._kept.popitem(last=False)[1].size_bytes

    def drop(self, key: Key) -> None:
        """It is not there any more, or not to be."""
        kept = self._kept.pop(key, None)
        if kept is not None:
            self.size_bytes -= kept.size_bytes

    def clear(self) -> None:
        """Who put it there is gone."""
        self._kept.clear()
        self.size_bytes = 0

    def check(self) -> None:
        """What is counted is what is there."""
        assert self.size_bytes == sum(one.size_bytes for one in self._kept.values())
        assert self.size_bytes <= self.limit_bytes
