"""The shelf against a list in order of use: what is found, what has gone, how much is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from hypothesis.stateful import run_state_machine_as_test as run
from kit.planting import SEARCH, Wrong, constant, planted

from fabric.cluster.shelf import Kept, Key, Shelf

keys = st.sampled_from([(0, b"a"), (256, b"a"), (0, b"b"), (0, b"c")])
sizes = st.sampled_from([4, 4, 5, 12])


class ShelfMachine(RuleBasedStateMachine):
    """Its verbs in any order. `kept`: the least recently used first."""

    @initialize(limit=st.sampled_from([0, 8, 10, 14]))
    def build(self, limit: int) -> None:
        self.shelf = Shelf(limit)
        self.kept: list[tuple[Key, tuple[str, ...], int]] = []
        self.number = 0

    @rule(key=keys, size=sizes)
    def put(self, key: Key, size: int) -> None:
        self.number += 1
        references = (f"group {self.number}",)
        self.shelf.put(key, references, size)
        self._leave(key)
        if size <= self.shelf.limit_bytes:
            self.kept.append((key, references, size))
        while sum(size for *_, size in self.kept) > self.shelf.limit_bytes:
            del self.kept[0]

    @rule(key=keys)
    def find(self, key: Key) -> None:
        expected = [one for one in self.kept if one[0] == key]
        assert self.shelf.find(key) == (expected[0][1] if expected else ())
        self._leave(key)
        self.kept += expected

    @rule(key=keys)
    def drop(self, key: Key) -> None:
        self.shelf.drop(key)
        self._leave(key)

    @rule()
    def clear(self) -> None:
        self.shelf.clear()
        self.kept = []

    @invariant()
    def exact(self) -> None:
        if hasattr(self, "shelf"):
            self.shelf.check()
            assert self.shelf.size_bytes == sum(size for *_, size in self.kept)
            assert list(self.shelf._kept) == [key for key, *_ in self.kept]

    def _leave(self, key: Key) -> None:
        self.kept = [one for one in self.kept if one[0] != key]


def test_the_shelf_does_as_a_list_would() -> None:
    run(ShelfMachine, settings=settings(max_examples=25, stateful_step_count=20))


def test_less_than_nothing_is_misuse() -> None:
    with pytest.raises(ValueError, match="less than nothing"):
        Shelf(-1)


def first_come(_: Callable[..., Any]) -> Callable[..., Any]:
    """What is asked for often goes as early as what nobody wants."""

    def find(self: Shelf, key: Key) -> tuple[Any, ...]:
        kept = self._kept.get(key)
        return kept.references if kept else ()

    return find


def whatever_its_size(_: Callable[..., Any]) -> Callable[..., Any]:
    """One that is larger than the shelf stays."""

    def put(self: Shelf, key: Key, references: tuple[Any, ...], size_bytes: int) -> None:
        self.drop(key)
        self._kept[key] = Kept(references=references, size_bytes=size_bytes)
        self.size_bytes += size_bytes
        while self.size_bytes > self.limit_bytes and len(self._kept) > 1:
            self.size_bytes -= self._kept.popitem(last=False)[1].size_bytes

    return put


def without_counting(_: Callable[..., Any]) -> Callable[..., Any]:
    """What is withdrawn leaves no room."""

    def drop(self: Shelf, key: Key) -> None:
        self._kept.pop(key, None)

    return drop


MUTATIONS: list[tuple[type, str, Wrong]] = [
    (Shelf, "find", first_come),
    (Shelf, "put", whatever_its_size),
    (Shelf, "drop", without_counting),
    (Shelf, "drop", constant(None)),
    (Shelf, "clear", constant(None)),
]


@pytest.mark.parametrize(("owner", "method", "wrong"), MUTATIONS)
def test_a_planted_bug_is_found(owner: type, method: str, wrong: Wrong) -> None:
    with planted(owner, method, wrong), pytest.raises(AssertionError):
        run(ShelfMachine, settings=SEARCH)
