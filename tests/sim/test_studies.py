"""Studies are functions of their seed, and the oracle knows the load; results: docs/studies.md."""

from __future__ import annotations

from itertools import islice, pairwise
from pathlib import Path

import pytest

from fabric.sim.clock import NS_PER_S
from fabric.sim.studies import STUDIES, Study, study
from fabric.sim.studies.autoscaling import DAY_S, MOST, Schedule, schedule_for, week
from fabric.sim.studies.study import Recorded
from fabric.workload.replay import Replay

DATA = Path(__file__).parent.parent / "data"


def test_the_week_has_days_and_is_its_seed() -> None:
    arrivals = [one.arrival for one in islice(week("0"), 3000)]
    assert all(a <= b for a, b in pairwise(arrivals))
    assert arrivals[:50] == [one.arrival for one in islice(week("0"), 50)]
    middles, nights = 0, 0
    for arrival in arrivals:
        part = arrival / NS_PER_S / DAY_S
        middles += 0.4 <= part < 0.5
        nights += part < 0.1
    assert middles > 3 * nights > 0


def test_the_oracles_schedule_holds_what_comes() -> None:
    found = schedule_for([0, 1000, 5000, 0, 0, 10**9], each=100.0)
    assert found == Schedule(replicas=(1, 5, 5, 5, MOST, MOST))
    assert found.peak == MOST


def test_a_study_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="there are disaggregation, routing, autoscaling"):
        study("weather")


@pytest.mark.nightly
@pytest.mark.parametrize("chosen", STUDIES, ids=lambda one: one.name)
def test_a_study_says_what_it_found(chosen: Study) -> None:
    """Whether its targets are met stands in docs/studies.md, missed ones too."""
    trace = Recorded(path=DATA / "azure2023_conv_300.csv", how=Replay())
    result = chosen.run("0", trace)
    assert result.targets
    assert len(result.rows) > 2
