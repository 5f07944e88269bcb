"""Prompts in one pool, outputs in another: which pair serves a request, and how far it has come.

    Began ──> reserve at the decode replica, prefill at the other
    Sampled (token 1) ──> decode, from the prompt's KV and this token
    Refused (no room) / PrefillLost ──> without KV: what is missing is computed by whoever decodes
    Closed ──> nothing of it is kept anywhere

A request is never worse off than without a detour but in time: every way on is that of an ordinary
request, or of one that is resumed. Zhong et al., "DistServe" (2024); Patel et al., "Splitwise"
(2024).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum

from fabric.core.configs import PairingConfig, RouterConfig
from fabric.core.request import Finish, Request
from fabric.core.snapshot import ReplicaSnapshot
from fabric.core.traffic.router import Choice, NoReplica, Router
from fabric.core.traffic.speed import Capacity, capacity_of

PREFILL = "prefill"


class Direct(StrEnum):
    """Why a request takes no detour."""

    SHAPE = "shape"  # several choices, one token, prompt logprobs, or it is resumed
    SHORT = "short"  # too little to compute
    HELD = "held"  # the decode pool has most of it
    NO_PREFILL = "no_prefill"  # nobody there
    IDLE = "idle"  # the prefill pool is full, and a decode replica has nothing to do


class Pairing:
    """A router for two pools: `choose` as `Router` has it, `kinds` tells the pool of a replica.

    `direct_total` counts requests without a detour, by reason.
    """

    def __init__(self, config: PairingConfig, router: RouterConfig, *, seed: int = 0) -> None:
        if config.min_prompt_tokens < 1:
            raise ValueError("min_prompt_tokens must be at least 1")
        self.config = config
        self.kinds: Mapping[str, str] = {}
        self.direct_total: dict[str, int] = {}
        self.detours_total = 0
        self._block_size = router.block_size
        self._prefill = Router(router, seed=seed)
        self._decode = Router(router, seed=seed + 1)

    @property
    def routers(self) -> tuple[Router, Router]:
        """Of the prefill pool, and of the decode pool."""
        return self._prefill, self._decode

    def choose(
        self, request: Request, snapshots: Sequence[ReplicaSnapshot], now: int
    ) -> Choice | NoReplica:
        """A decode replica, and with `Choice.prefill_id` who computes the prompt for it."""
        first = [one for one in snapshots if self.kinds.get(one.replica_id) == PREFILL]
        second = [one for one in snapshots if self.kinds.get(one.replica_id) != PREFILL]
        reason = self._direct(request, first, second)
        if reason is not None or not second:
            return self._alone(request, second, now, reason)
        # Only the token that the prefill replica has drawn is left to compute there, and only that
        # one is to be drawn by the other. What is held of the prompt saves nothing then: under a
        # name of its own it waits for nobody who has it, and the prefill replica, which is asked
        # first, keeps no leg that never went.
        stand_in = replace(
            request, request_id=f"{request.request_id}/decode", prompt=request.prompt[-1:]
        )
        leg = replace(request, expected_tokens=1)
        if not self._decode.has_room(stand_in, second, now):
            return NoReplica(busy=True)
        prefill = self._prefill.choose(leg, first, now)
        if isinstance(prefill, NoReplica):
            idle = any(not one.running + one.waiting + one.swapped for one in second)
            return self._alone(request, second, now, Direct.IDLE) if idle else prefill
        landing = len(request.prompt) - 1
        decode = self._decode.choose(stand_in, second, now, landing=landing)
        assert isinstance(decode, Choice), "it had room just now"
        self._decode.forget(request.request_id)
        blocks = next(one.blocks_total for one in second if one.replica_id == decode.replica_id)
        self._decode.index.note(decode.replica_id, request, blocks)
        self.detours_total += 1
        return replace(
            decode, prefill_id=prefill.replica_id, cost_ns=prefill.cost_ns + decode.cost_ns
        )

    def still_waits(self, request_id: str, now: int) -> bool:
        """As `Router` has it, of either pool."""
        return any(router.still_waits(request_id, now) for router in self.routers)

    def check(self) -> None:
        """Both routers."""
        self._prefill.check()
        self._decode.check()

    def _alone(
        self,
        request: Request,
        snapshots: Sequence[ReplicaSnapshot],
        now: int,
        reason: Direct | None,
    ) -> Choice | NoReplica:
        choice = self._decode.choose(request, snapshots, now)
        if isinstance(choice, Choice) and reason is not None:
            self.direct_total[reason] = self.direct_total.get(reason, 0) + 1
            self._prefill.forget(request.request_id)
        return choice

    def _direct(
        self,
        request: Request,
        prefill: Sequence[ReplicaSnapshot],
        decode: Sequence[ReplicaSnapshot],
    ) -> Direct | None:
        sampling = request.sampling
        if sampling.n != 1 or sampling.max_tokens < 2 or sampling.prompt_logprobs is not None:
            return Direct.SHAPE
        if request.resumed:
            return Direct.SHAPE
        if len(request.prompt) < self.config.min_prompt_tokens:
            return Direct.SHORT
        index = self._decode.index
        depths = index.match(index.digests(request))
        held = max((depths.get(one.replica_id, 0) for one in decode), default=0)
        if len(request.prompt) - held * self._block_size < self.config.min_prompt_tokens:
            return Direct.HELD
        return None if prefill else Direct.NO_PREFILL


def capacity(snapshots: Sequence[ReplicaSnapshot], kinds: Mapping[str, str]) -> Capacity:
    """Of both pools together: a request takes a place in the decode pool alone, and its prompt goes
    at the prefill pool's pace. `kinds`: the pool of each replica."""
    if not kinds:
        return capacity_of(snapshots)
    first = [one for one in snapshots if kinds.get(one.replica_id) == PREFILL]
    second = [one for one in snapshots if kinds.get(one.replica_id) != PREFILL]
    found = capacity_of(second)
    return replace(found, token_ns=capacity_of(first).token_ns) if first else found


class Stage(StrEnum):
    """Where a handed-over request is."""

    NEW = "new"
    PREFILL = "prefill"
    DECODE = "decode"
    OVER = "over"


class Event(StrEnum):
    """What has happened."""

    BEGAN = "began"
    REFUSED = "refused"  # the decode replica has no room for the KV
    SAMPLED = "sampled"  # token 1 is there, and the request goes on
    ENDED = "ended"  # its last token is there
    PREFILL_LOST = "prefill_lost"
    DECODE_LOST = "decode_lost"
    CLOSED = "closed"  # the client has left


class Action(StrEnum):
    """What is to be done, in this order."""

    RESERVE = "reserve"  # at the decode replica
    PREFILL = "prefill"  # the prompt and one token
    DECODE = "decode"  # from what was sent so far
    GIVE_UP = "give_up"  # the decode replica keeps nothing and waits for nothing
    RETRY = "retry"  # the request goes back to the queue, with what was sent so far


class Handoff:
    """One request on its way through both pools. `advance` takes what happened."""

    def __init__(self) -> None:
        self.stage = Stage.NEW
        self.began: int | None = None
        self.sampled: int | None = None
        self.reserved = False
        self.failure: Event | None = None

    def advance(self, event: Event, now: int) -> tuple[Action, ...]:
        """What to do now. `ValueError`: this can't happen here."""
        stage = self.stage
        if stage is Stage.OVER:
            return ()  # news that was on its way
        if event is Event.BEGAN and stage is Stage.NEW:
            self.stage, self.began, self.reserved = Stage.PREFILL, now, True
            return Action.RESERVE, Action.PREFILL
        if stage is Stage.NEW:
            raise ValueError(f"{event} before it began")
        if event is Event.REFUSED:
            self.reserved, self.failure = False, event
            return ()
        if event is Event.SAMPLED and stage is Stage.PREFILL:
            self.stage, self.sampled = Stage.DECODE, now
            return (Action.DECODE,)
        if event is Event.ENDED and stage is Stage.DECODE:
            self.reserved = False  # the decode leg has used it up; one that ends early may not have
        if event in {Event.ENDED, Event.CLOSED}:
            return self._end(())
        if event is Event.PREFILL_LOST and stage is Stage.PREFILL:
            self.failure = event
            return self._end((Action.RETRY,))
        if event is Event.DECODE_LOST and stage is Stage.DECODE:
            self.failure = event
            return self._end((Action.RETRY,))
        raise ValueError(f"{event} while in {stage}")

    def check(self) -> None:
        """Nothing is kept for what is over, and times follow on each other."""
        assert not (self.reserved and self.stage in {Stage.NEW, Stage.OVER})
        if self.sampled is not None:
            assert self.began is not None and self.began <= self.sampled

    def _end(self, then: tuple[Action, ...]) -> tuple[Action, ...]:
        held, self.reserved, self.stage = self.reserved, False, Stage.OVER
        return (Action.GIVE_UP, *then) if held else then


def prefill_leg(request: Request) -> Request:
    """What the prefill replica computes: the prompt and one token."""
    return replace(request, sampling=replace(request.sampling, max_tokens=1))


def decode_leg(request: Request, token: int) -> Request:
    """What is left, as that of any resumed request."""
    return replace(request, generated=((token,),))


def leg_ends(finish: Finish | None, request: Request, context_limit: int) -> bool:
    """A first token's `finish`: is it the request's, or only that of the leg?"""
    if finish is not Finish.LENGTH:
        return finish is not None
    return request.sampling.max_tokens == 1 or len(request.prompt) + 1 >= context_limit
