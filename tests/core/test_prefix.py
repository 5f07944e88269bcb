"""Block hashes: the same on every machine, and different whenever the KV may differ."""

from __future__ import annotations

from itertools import combinations

from fabric.core.prefix import chain, root


def test_the_hash_is_pinned() -> None:
    # A changed hash would silently lose every prefix that is kept outside of a process.
    assert chain(root("v1", None, ""), range(16)).hex() == "ea8b87122402169b357354d8d377f000"


def test_a_hash_names_its_whole_history() -> None:
    start = root("v1", None, "")
    first, other = chain(start, [1, 2]), chain(start, [1, 3])
    assert first != other
    assert chain(first, [4, 5]) != chain(other, [4, 5])
    assert chain(first, [4, 5]) == chain(chain(start, [1, 2]), [4, 5])


def test_salts_never_run_together() -> None:
    salts = [
        root("ab", "c", ""),
        root("a", "bc", ""),
        root("ab", None, "c"),
        root("ab", "", "c"),
        root("", "ab", "c"),
        root("a", "1:b", "c"),
    ]
    assert all(one != other for one, other in combinations(salts, 2))
