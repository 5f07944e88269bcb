"""The queue meets the router: whoever has a replica with head-room goes, in the queue's order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fabric.core.request import Request
from fabric.core.snapshot import ReplicaSnapshot
from fabric.core.traffic.admission import Admission
from fabric.core.traffic.router import Choice, Router


def release(
    admission: Admission, router: Router, snapshots: Sequence[ReplicaSnapshot], now: int
) -> Iterator[tuple[Request, Choice]]:
    """Each request that goes now, and where. A tier without head-room holds up no other tier."""
    while True:
        for head in admission.heads(now):
            choice = router.choose(head, snapshots, now)
            if isinstance(choice, Choice):
                yield admission.take(head.request_id, now), choice
                break
        else:
            return
