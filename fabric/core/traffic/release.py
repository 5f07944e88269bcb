"""The queue meets the router: whoever has a replica with head-room goes, in the queue's order.

A request whose prefix is worth waiting for lets others go before it, for a bounded time (`router`).
No tenant falls behind its share for it by more than `service.PASSED`, beyond the bound of `fair`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from fabric.core.request import Request
from fabric.core.snapshot import ReplicaSnapshot
from fabric.core.traffic.admission import Admission
from fabric.core.traffic.handoff import Pairing
from fabric.core.traffic.router import Choice, Router

# Of each tier so many are looked at: those that wait for a holder let others go before them.
LOOK = 64


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
            found = _next(admission, router, head, (snapshots, now))
            if found is not None:
                request, choice = found
                taken = admission.take(request.request_id, now)
                yield replace(taken, expected_tokens=request.expected_tokens), choice
                break
        else:
            return


def _next(
    admission: Admission,
    router: Router | Pairing,
    head: Request,
    seen: tuple[Sequence[ReplicaSnapshot], int],
) -> tuple[Request, Choice] | None:
    """The first of a tier that can go, with the length of its output that is expected."""
    snapshots, now = seen
    served_as = admission.served_as(head)
    for number, one in enumerate(admission.behind(head, now)):
        if number and router.still_waits(one.request_id, now):
            continue
        request = replace(one, expected_tokens=admission.expected_tokens(one.request_id))
        asks = request if served_as is None else replace(request, tier=served_as)
        choice = router.choose(asks, snapshots, now)
        if isinstance(choice, Choice):
            return request, choice
        if choice.holder is None or number >= LOOK:
            break
    return None
