"""Who holds what: places number workers one to one, cuts are even and leave nothing out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.core.shard import Place, ShardSpec, split_evenly

SIZES = st.integers(1, 4)


@given(tp=SIZES, pp=SIZES, ep=SIZES)
def test_places_and_worker_numbers_are_one_to_one(tp: int, pp: int, ep: int) -> None:
    spec = ShardSpec(tp=tp, pp=pp, ep=ep)
    places = [Place.of(spec, worker) for worker in range(spec.workers)]
    assert [place.worker for place in places] == list(range(spec.workers))
    assert len(set(places)) == spec.workers
    assert sum(place.is_first_stage for place in places) == tp * ep
    assert sum(place.is_last_stage for place in places) == tp * ep


@given(total=st.integers(0, 1000), parts=st.integers(1, 17))
def test_cuts_are_even_and_complete(total: int, parts: int) -> None:
    cuts = split_evenly(total, parts)
    assert [index for cut in cuts for index in cut] == list(range(total))
    lengths = [len(cut) for cut in cuts]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] <= 1


def test_smollm2_over_two_workers_has_two_and_one_kv_heads() -> None:
    assert [len(cut) for cut in split_evenly(3, 2)] == [2, 1]


def test_what_can_not_be_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ShardSpec(tp=0)
    with pytest.raises(ValueError, match="worker 2 of 2"):
        Place.of(ShardSpec(tp=2), 2)
    with pytest.raises(ValueError, match="into 0"):
        split_evenly(3, 0)
