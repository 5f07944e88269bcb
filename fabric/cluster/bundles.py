"""What a sharded replica asks Ray for: how its workers are bundled, and what each needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fabric.core.shard import ShardSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundles:
    """`per_worker`: a bundle for each worker, so that TP may reach over nodes; else the TP group of
    a stage has one, which Ray never splits. `resources`: of one worker, as Ray names them."""

    spec: ShardSpec
    per_worker: bool
    resources: Mapping[str, float]

    def all(self) -> list[dict[str, float]]:
        """For the placement group. The replica's own actor, which needs nothing, is in the first:
        beside worker 0."""
        bundle = {name: amount * self._size for name, amount in self.resources.items()}
        return [dict(bundle) for _ in range(self.spec.workers // self._size)]

    def of(self, worker: int) -> int:
        """The bundle that this worker goes to."""
        return worker // self._size

    @property
    def _size(self) -> int:
        return 1 if self.per_worker else self.spec.tp
