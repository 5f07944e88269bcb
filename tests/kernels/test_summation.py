"""One order of adding for any number of workers."""

from __future__ import annotations

from itertools import chain

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.core.shard import split_evenly
from fabric.kernels.summation import ChunkedSum


def fold(values: list[numpy.float32], merges: tuple[int, ...]) -> list[numpy.float32]:
    """What C++ does with a stack."""
    stack: list[numpy.float32] = []
    for value, count in zip(values, merges, strict=True):
        stack.append(value)
        for _ in range(count):
            last = stack.pop()
            stack[-1] = stack[-1] + last
    return stack


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_any_number_of_workers_gives_the_same_bits(sizes: tuple[int, int]) -> None:
    chunks, workers = sizes
    values = list(numpy.random.default_rng(chunks).standard_normal(chunks).astype(numpy.float32))
    alone = ChunkedSum(sizes=(32,) * chunks, runs=(range(chunks),))
    (expected,) = fold(values, alone.chunk_merges(0))
    spread = ChunkedSum(sizes=(32,) * chunks, runs=split_evenly(chunks, workers))
    pieces = [
        fold([values[chunk] for chunk in spread.runs[rank]], spread.chunk_merges(rank))
        for rank in range(workers)
    ]
    assert [len(each) for each in pieces] == [len(spread.pieces(r)) for r in range(workers)]
    assert fold(list(chain(*pieces)), spread.piece_merges()) == [expected]


def test_halves_are_one_piece_each() -> None:
    twelve = ChunkedSum(sizes=(128,) * 12, runs=split_evenly(12, 2))
    assert twelve.pieces(0) == (range(6),)
    assert twelve.pieces(1) == (range(6, 12),)
    assert twelve.inputs(1) == range(768, 1536)


@pytest.mark.parametrize("runs", [(range(2),), (range(2), range(1, 3)), (range(1, 3),), ()])
def test_runs_that_leave_a_chunk_out_or_take_one_twice(runs: tuple[range, ...]) -> None:
    with pytest.raises(ValueError, match="don't share out"):
        ChunkedSum(sizes=(32, 32, 32), runs=runs)
