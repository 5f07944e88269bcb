"""What Ray is asked for: a TP group of a stage is one bundle, which Ray never splits."""

from __future__ import annotations

import pytest

from fabric.cluster.bundles import Bundles
from fabric.core.shard import Place, ShardSpec


@pytest.mark.parametrize("spec", [(1, 1, 1), (2, 1, 1), (3, 2, 1), (2, 2, 2), (1, 3, 2)])
@pytest.mark.parametrize("per_worker", [False, True])
def test_every_worker_has_its_resources_in_its_bundle(
    spec: tuple[int, int, int], per_worker: bool
) -> None:
    shard = ShardSpec(tp=spec[0], pp=spec[1], ep=spec[2])
    asked = Bundles(spec=shard, per_worker=per_worker, resources={"CPU": 2, "GPU": 1})
    left = asked.all()
    for worker in range(shard.workers):
        left[asked.of(worker)]["CPU"] -= 2
        left[asked.of(worker)]["GPU"] -= 1
    assert all(set(bundle.values()) == {0} for bundle in left)
    assert asked.of(0) == 0, "beside the replica's own actor"


def test_a_tensor_parallel_group_stays_together_and_stages_need_not() -> None:
    shard = ShardSpec(tp=2, pp=3)
    asked = Bundles(spec=shard, per_worker=False, resources={"CPU": 1})
    assert asked.all() == [{"CPU": 2}] * 3
    for worker in range(shard.workers):
        assert asked.of(worker) == Place.of(shard, worker).pp_rank
    apart = Bundles(spec=shard, per_worker=True, resources={"CPU": 1})
    assert apart.all() == [{"CPU": 1}] * 6
