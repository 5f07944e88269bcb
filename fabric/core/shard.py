"""How a model is split over workers: what is asked for, and the place of one worker in it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSpec:
    """One replica's workers: `tp` × `ep` in each of `pp` stages.

    `tp`: tensor parallel (heads, MLP columns, vocabulary). `pp`: pipeline stages (layers). `ep`:
    expert parallel (experts of a mixture).
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        if min(self.tp, self.pp, self.ep) < 1:
            raise ValueError("tp, pp and ep must be at least 1")

    @property
    def workers(self) -> int:
        """How many workers a replica has."""
        return self.tp * self.pp * self.ep


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One worker's place, each rank counted from 0. Workers are numbered stage by stage."""

    spec: ShardSpec
    tp_rank: int = 0
    pp_rank: int = 0
    ep_rank: int = 0

    @classmethod
    def of(cls, spec: ShardSpec, worker: int) -> Place:
        """The place of worker number `worker`: tp runs fastest, then ep, then pp."""
        if not 0 <= worker < spec.workers:
            raise ValueError(f"worker {worker} of {spec.workers}")
        rest, tp_rank = divmod(worker, spec.tp)
        pp_rank, ep_rank = divmod(rest, spec.ep)
        return cls(spec=spec, tp_rank=tp_rank, pp_rank=pp_rank, ep_rank=ep_rank)

    @property
    def worker(self) -> int:
        """Its number among the replica's workers."""
        return (self.pp_rank * self.spec.ep + self.ep_rank) * self.spec.tp + self.tp_rank

    @property
    def is_first_stage(self) -> bool:
        """It embeds tokens."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """It has the head."""
        return self.pp_rank == self.spec.pp - 1


def split_evenly(total: int, parts: int) -> tuple[range, ...]:
    """Cut range(total) into `parts` runs whose lengths differ by at most one, longer ones first."""
    if total < 0 or parts < 1:
        raise ValueError(f"can't cut {total} into {parts}")
    size, longer = divmod(total, parts)
    starts = [part * size + min(part, longer) for part in range(parts + 1)]
    return tuple(range(first, last) for first, last in pairwise(starts))
