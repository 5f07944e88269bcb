"""The sketch's promise: any quantile within 2 %, and merging is adding."""

from __future__ import annotations

import marshal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.core import sketch as sketch_module
from fabric.core.sketch import RELATIVE_ERROR, SMALLEST, Sketch, merged

# From a microsecond to eleven days: 700 buckets, more than are kept.
VALUES = st.one_of(st.just(0.0), st.floats(SMALLEST, 1e6), st.floats(0.01, 10.0))
STREAMS = st.lists(VALUES, min_size=1, max_size=200)


def of(values: list[float]) -> Sketch:
    made = Sketch()
    for value in values:
        made.add(value)
    return made


@given(STREAMS, st.floats(0, 1))
def test_a_quantile_is_within_the_relative_error(values: list[float], q: float) -> None:
    made = of(values)
    made.check()
    true = sorted(values)[int(q * (len(values) - 1))]
    # The buckets' edges are rounded to doubles: far below the error itself.
    assert abs(made.quantile(q) - true) <= (RELATIVE_ERROR + 1e-9) * true
    assert made.total == pytest.approx(sum(values))


@given(STREAMS, STREAMS, STREAMS)
def test_the_merge_of_parts_is_the_sketch_of_the_whole(
    a: list[float], b: list[float], c: list[float]
) -> None:
    whole = of(a + b + c)
    left = merged([merged([of(a), of(b)]), of(c)])
    right = merged(
        [of(a), Sketch.of_row(marshal.loads(marshal.dumps(merged([of(c), of(b)]).row())))]
    )
    for one in (left, right):
        one.check()
        assert one.row()[0] == whole.row()[0]
        assert one.row()[2:] == whole.row()[2:]
        assert one.total == pytest.approx(whole.total)


@given(st.lists(STREAMS, min_size=2, max_size=4), st.randoms(use_true_random=False))
@settings(max_examples=25)
def test_memory_is_bounded_and_the_top_stays_exact(parts: list[list[float]], dice: object) -> None:
    """With room for eight buckets only, what is not collapsed is as exact as ever, in any order."""
    values = [value for part in parts for value in part]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sketch_module, "MAX_BUCKETS", 8)
        whole, parted = of(values), merged([of(part) for part in parts])
        shuffled = sorted(values)
        dice.shuffle(shuffled)  # type: ignore[attr-defined]
        for one in (whole, parted, of(shuffled)):
            one.check()
            assert one.row()[2:] == whole.row()[2:]
        top = max(values)
        assert abs(whole.quantile(1.0) - top) <= (RELATIVE_ERROR + 1e-9) * top
        again = Sketch.of_row(whole.row())
        again.check()
        assert again.row() == whole.row()


def test_nothing_seen_and_misuse() -> None:
    assert Sketch().quantile(0.99) == 0.0
    assert Sketch().quantiles().count == 0
    with pytest.raises(ValueError, match="negative"):
        Sketch().add(-1.0)
    with pytest.raises(ValueError, match="between"):
        of([1.0]).quantile(1.5)
