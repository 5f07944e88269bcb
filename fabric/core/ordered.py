"""A small list kept in order of importance: two parts queue by the same key."""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import pairwise
from operator import attrgetter
from typing import Generic, Protocol, TypeVar


class HasKey(Protocol):
    """Numbers, most important first, the last one unique: lowest first. Fixed while queued."""

    @property
    def key(self) -> tuple[int, ...]:
        """The item's place."""
        ...


T = TypeVar("T", bound=HasKey)
_key = attrgetter("key")


class Ordered(Generic[T]):
    """Items in ascending key order. `items` is for reading and iterating.

    Adding and removing compare O(log n) keys and move pointers; at the few hundred items that an
    engine runs this is cheaper than any tree, and iterating is a plain list's.
    """

    __slots__ = ("items",)

    def __init__(self) -> None:
        self.items: list[T] = []

    def __len__(self) -> int:
        return len(self.items)

    def add(self, item: T) -> None:
        """Put an item in its place."""
        insort(self.items, item, key=_key)

    def remove(self, item: T) -> None:
        """Take out an item that is there."""
        index = bisect_left(self.items, item.key, key=_key)
        assert self.items[index] is item, "not in the queue"
        del self.items[index]

    def check(self) -> None:
        """Strictly ascending."""
        keys = [item.key for item in self.items]
        assert all(low < high for low, high in pairwise(keys)), "order"
