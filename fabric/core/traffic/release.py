"""The queue meets the router: whoever has a replica with head-room goes, in the queue's order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from fabric.core.request import Request
from fabric.core.snapshot import ReplicaSnapshot
from fabric.core.traffic.admission import Admission
from fabric.core.traffic.handoff import Pairing
from fabric.core.traffic.router import Choice, Router


def release(
    admission: Admission,
    router: Router | Pairing,
    snapshots: Sequence[ReplicaSnapshot],
    now: int,
) -> Iterator[tuple[Request, Choice]]:
    """Each request that goes now, and where. A tier without head-room holds up no other tier.

    Router and engine reckon with the output length that the queue expects."""
    while True:
        for head in admission.heads(now):
            expected = admission.expected_tokens(head.request_id)
            choice = router.choose(replace(head, expected_tokens=expected), snapshots, now)
            if isinstance(choice, Choice):
                taken = admission.take(head.request_id, now)
                yield replace(taken, expected_tokens=expected), choice
                break
        else:
            return
