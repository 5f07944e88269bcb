"""Who takes the detour through the prefill pool, and where it leads."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fabric.core.configs import PairingConfig, RouterConfig
from fabric.core.request import Finish, Request, SamplingParams
from fabric.core.snapshot import ReplicaSnapshot
from fabric.core.traffic.handoff import (
    Direct,
    Pairing,
    capacity,
    decode_leg,
    leg_ends,
    prefill_leg,
)
from fabric.core.traffic.router import Choice, NoReplica

MS = 1_000_000
KINDS = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}


def pairing(least: int = 64, **router: object) -> Pairing:
    settings = {"headroom_tokens": 1024, "headroom_ns": 10**10} | router
    config = RouterConfig(**settings)  # type: ignore[arg-type]
    one = Pairing(PairingConfig(min_prompt_tokens=least), config)
    one.kinds = KINDS
    return one


def snapshots(*names: str, **fields: object) -> list[ReplicaSnapshot]:
    known = {"blocks_total": 400, "blocks_free": 400, "places": 8, "token_ns": MS, "step_ns": MS}
    return [
        ReplicaSnapshot(replica_id=name, taken=0, **known | fields)  # type: ignore[arg-type]
        for name in names or KINDS
    ]


def ask(length: int = 100, *, first: int = 0, **sampling: object) -> Request:
    settings = {"max_tokens": 20} | sampling
    return Request(
        request_id=f"r{length}",
        prompt=tuple(range(first, first + length)),
        sampling=SamplingParams(**settings),  # type: ignore[arg-type]
        arrival=0,
    )


def choice(one: Pairing, request: Request, found: list[ReplicaSnapshot] | None = None) -> Choice:
    chosen = one.choose(request, found or snapshots(), 0)
    one.check()
    assert isinstance(chosen, Choice)
    return chosen


def test_a_long_prompt_takes_a_pair() -> None:
    one = pairing()
    chosen = choice(one, ask())
    assert (KINDS[chosen.replica_id], KINDS[str(chosen.prefill_id)]) == ("decode", "prefill")
    assert chosen.work_tokens == 1, "what is left to compute at the decode replica"
    assert one.detours_total == 1


def test_each_leg_is_booked_where_it_runs() -> None:
    """One token of output there; here the others, and the KV that comes."""
    one = pairing()
    chosen = choice(one, ask(100, max_tokens=20))
    there, here = (
        router._stations[name or ""].outlook(2, 0)
        for router, name in zip(one.routers, (chosen.prefill_id, chosen.replica_id), strict=True)
    )
    assert (there.output_left, there.ahead_tokens) == (1, 100)
    assert (here.output_left, here.ahead_tokens) == (20, 1)
    assert here.blocks_free == 400 - (100 + 20 / 2) / 16
    longer = choice(pairing(), ask(100, max_tokens=220))
    assert longer.cost_ns - chosen.cost_ns == pytest.approx(200 * MS, rel=0.01), "not twice"


def test_places_are_those_of_the_decode_pool() -> None:
    slow = replace(snapshots("p0")[0], token_ns=7 * MS)
    found = capacity([slow, *snapshots("d0", "d1")], KINDS)
    assert (found.replicas, found.places, found.token_ns) == (2, 16, 7 * MS)
    assert capacity(snapshots("d0", "d1"), {}).places == 16


def test_two_prompts_go_to_two_prefill_replicas() -> None:
    one = pairing()
    first, second = choice(one, ask()), choice(one, ask(first=500))
    assert first.prefill_id != second.prefill_id


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (ask(63), Direct.SHORT),
        (ask(n=2), Direct.SHAPE),
        (ask(max_tokens=1), Direct.SHAPE),
        (ask(prompt_logprobs=0), Direct.SHAPE),
        (replace(ask(), generated=((5,),)), Direct.SHAPE),
    ],
)
def test_what_stays_off_the_detour(request_: Request, reason: Direct) -> None:
    one = pairing()
    assert choice(one, request_).prefill_id is None
    assert one.direct_total == {reason: 1}


def test_a_prefix_that_the_decode_pool_holds_is_not_computed_elsewhere() -> None:
    one = pairing()
    first = choice(one, ask(100))
    longer = ask(140)  # 96 of its tokens lie where the first one went
    again = choice(one, longer)
    assert again.prefill_id is None
    assert again.replica_id == first.replica_id
    assert one.direct_total == {Direct.HELD: 1}
    assert choice(one, ask(200)).prefill_id is not None, "too much is left"


def test_without_a_prefill_replica_everything_is_done_in_one_place() -> None:
    one = pairing()
    assert choice(one, ask(), snapshots("d0", "d1")).prefill_id is None
    assert one.direct_total == {Direct.NO_PREFILL: 1}


def test_without_a_decode_replica_nothing_goes() -> None:
    assert pairing().choose(ask(), snapshots("p0", "p1"), 0) == NoReplica(busy=False)


def test_a_full_prefill_pool_is_waited_for_unless_decode_is_idle() -> None:
    full = snapshots("p0", "p1", waiting_tokens=5000, waiting=5)
    one = pairing()
    busy = snapshots("d0", "d1", running=3)
    for _ in range(100):  # asking costs nothing
        assert one.choose(ask(), [*full, *busy], 0) == NoReplica(busy=True)
    half = [*snapshots("d0", running=3), *snapshots("d1")]
    chosen = choice(one, ask(), [*full, *half])
    assert chosen.prefill_id is None
    assert one.direct_total == {Direct.IDLE: 1}


def test_the_decode_leg_waits_for_nobody_who_holds_a_part() -> None:
    """It computes one token: what is held saves nothing, and the prefill leg is booked by then."""
    one = pairing(headroom_tokens=150)
    first = choice(one, ask(40))  # too short for a detour
    known = snapshots("p0")
    for shot in snapshots("d0", "d1"):
        holds = shot.replica_id == first.replica_id
        busy = replace(shot, taken=10 * MS, waiting=9, waiting_tokens=400, token_ns=1)
        slow = replace(shot, taken=10 * MS, running=7, output_tokens_left=9_000, step_ns=9 * MS)
        known.append(busy if holds else slow)
    chosen = one.choose(ask(140), known, 10 * MS)
    assert isinstance(chosen, Choice) and chosen.prefill_id == "p0"
    assert chosen.replica_id != first.replica_id


def test_who_has_answered_has_room_again() -> None:
    one = pairing(headroom_tokens=150)
    for number in range(4):
        choice(one, ask(first=1000 * number))
    assert one.choose(ask(first=9000), snapshots(running=1), 0) == NoReplica(busy=True)
    later = [replace(shot, taken=10 * MS) for shot in snapshots(running=1)]
    assert choice(one, ask(first=9000), later).prefill_id is not None


def test_legs_are_the_request_itself() -> None:
    request = ask(seed=9, temperature=0.7)
    first, second = prefill_leg(request), decode_leg(request, 77)
    assert first.sampling.max_tokens == 1
    assert replace(first, sampling=request.sampling) == request
    assert second.generated == ((77,),)
    assert replace(second, generated=()) == request


def test_which_end_is_the_requests() -> None:
    request = ask(100)
    assert not leg_ends(None, request, 1000)
    assert not leg_ends(Finish.LENGTH, request, 1000)
    assert leg_ends(Finish.LENGTH, request, 101), "the context is full"
    assert leg_ends(Finish.STOP, request, 1000)
    assert leg_ends(Finish.LENGTH, ask(max_tokens=1), 1000)
