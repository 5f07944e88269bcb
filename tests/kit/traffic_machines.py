"""`Admission` and `Router` against naive models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from fabric.core.configs import AdmissionConfig
from fabric.core.fair import FairShare
from fabric.core.request import Request, SamplingParams
from fabric.core.tenants import Tenant
from fabric.core.tiers import Tier
from fabric.core.traffic.admission import Admission, Shed, work_tokens
from fabric.core.traffic.speed import Capacity

NS_PER_S = 1_000_000_000
# In tenths of a second: numbers drawn from a wide range are mostly tiny.
TENTH_NS = NS_PER_S // 10


def request_of(number: int, tokens: int, now: int, **fields: int | None) -> Request:
    """A request of so many prompt tokens."""
    return Request(
        request_id=f"r{number}",
        prompt=(1,) * tokens,
        sampling=SamplingParams(max_tokens=4),
        arrival=now,
        **fields,  # type: ignore[arg-type]
    )


TIERS = (
    Tier(name="fast", ttft_ms=400, tpot_ms=50, weight=4.0, reserved_share=0.25),
    Tier(name="plain", ttft_ms=1_000, tpot_ms=100, weight=2.0),
    Tier(name="cheap", ttft_ms=5_000, tpot_ms=500),
)
TENANTS = (
    Tenant(name="a", weight=2.0),
    Tenant(name="b", max_concurrent=1),
    Tenant(name="c", requests_per_minute=12, tokens_per_minute=600),
)


@dataclass(slots=True, kw_only=True)
class Waiting:
    """What the model knows of a request in the queue."""

    request: Request
    rank: int
    expires: int
    key: tuple[int, int]
    again: bool = False


class AdmissionMachine(RuleBasedStateMachine):
    """The model is a list of what waits and one of what runs; sums and orders are made anew."""

    @initialize(
        requests=st.integers(1, 8),
        tokens=st.integers(1, 80),
        ttl_s=st.integers(1, 10),
        share=st.sampled_from([1.0, 0.5]),
        places=st.sampled_from([0, 2, 2, 4]),
    )
    def build(self, requests: int, tokens: int, ttl_s: int, share: float, places: int) -> None:
        self.config = AdmissionConfig(
            max_queued_requests=requests,
            max_queued_tokens=tokens,
            queue_ttl_s=float(ttl_s),
            tenant_share=share,
            tiers=TIERS,
            tenants=TENANTS,
        )
        self.admission = Admission(self.config)
        self.admission.capacity = Capacity(places=places)
        self.waiting: list[Waiting] = []
        self.running: list[Waiting] = []
        self.spent: list[tuple[int, int]] = []  # when, tokens: of tenant c, as far as let in
        self.now = 0
        self.number = 0

    @rule(
        tier=st.sampled_from([0, 1, 2, 2]),
        tenant=st.sampled_from(["", "a", "b", "c"]),
        tokens=st.integers(1, 30),
        priority=st.integers(-6, 6),
        late=st.integers(0, 10),
        patience_s=st.none() | st.integers(1, 5),
    )
    def offer(
        self, tier: int, tenant: str, tokens: int, priority: int, late: int, patience_s: int | None
    ) -> None:
        request = replace(
            request_of(self.number, tokens, max(0, self.now - late * TENTH_NS)),
            tier=TIERS[tier].name,
            tenant=tenant,
            priority=priority,
            deadline=None if patience_s is None else self.now + patience_s * NS_PER_S,
        )
        self.number += 1
        outcome = self.admission.offer(request, self.now)
        if isinstance(outcome, Shed):
            assert 1.0 <= outcome.retry_after_s <= (3600.0 if outcome.own_limit else 10.0)
            if outcome.own_limit:
                assert tenant == "c", "the limit of somebody without limits"
            elif "deadline" in outcome.reason:
                assert patience_s is not None, "late for nothing"
            else:
                assert self.waiting, "alone, and yet turned away"
                assert not self._would_fit(request, tier, []), "there was room"
                everybody = self._may_leave(tier)
                assert not self._would_fit(request, tier, everybody), "a cheaper one should go"
            return
        gone = [one for one in self.waiting if one.request in outcome.displaced]
        assert len(gone) == len(outcome.displaced)
        assert all(one.rank > tier for one in gone), "displaced by a lesser one"
        assert not any(one.again for one in gone), "its client has tokens of it"
        first = [one.request for one in self._may_leave(tier)[: len(gone)]]
        assert list(outcome.displaced) == first, "not the cheapest, or what a tier keeps"
        assert self._would_fit(request, tier, gone), "more than the bound"
        assert not gone or not self._would_fit(request, tier, gone[:-1]) or len(gone) > 1
        self.waiting = [one for one in self.waiting if one not in gone]
        ttl = self.now + int(self.config.queue_ttl_s * NS_PER_S)
        expires = ttl if request.deadline is None else min(ttl, request.deadline)
        key = (self._starts(request, tier), self.number)
        line = [o for o in self.waiting if (o.rank, o.request.tenant) == (tier, tenant)]
        ahead = sum(work_tokens(one.request) for one in line if one.key < key)
        assert outcome.ahead_tokens == ahead, "what is ahead in the line"
        self.waiting.append(Waiting(request=request, rank=tier, expires=expires, key=key))
        if tenant == "c":
            self.spent.append((self.now, tokens))
            for number, (then, _) in enumerate(self.spent):  # 12 a minute, and 2 at once
                allowed = 2 + 12 / 60 * (self.now - then) / NS_PER_S
                assert len(self.spent) - number <= allowed + 1e-6, "too many requests"

    @rule(which=st.integers(0, 2))
    def take(self, which: int) -> None:
        heads = self.admission.heads(self.now)
        found = [next(one for one in self.waiting if one.request is head) for head in heads]
        ranks = [one.rank for one in found]
        assert len(set(ranks)) == len(ranks), "one of a tier"
        for one in found:
            line = [
                other
                for other in self.waiting
                if other.rank == one.rank
                and other.request.tenant == one.request.tenant
                and other.expires > self.now
            ]
            assert one.expires > self.now, "overdue"
            assert one.key == min(other.key for other in line), "not the first of its line"
            assert self._may_run(one), "beyond a limit"
        idle = [o for o in self.waiting if o.rank not in ranks and o.expires > self.now]
        assert not any(self._may_run(one) for one in idle), "a tier is passed over"
        if found:
            one = found[which % len(found)]
            took = self.admission.take(one.request.request_id, self.now)
            priority = one.request.priority
            assert took == replace(
                one.request,
                priority=max(0, priority) if one.request.tenant else priority,
                expected_tokens=took.expected_tokens,
            )
            assert took.expected_tokens is not None
            self.waiting.remove(one)
            self.running.append(one)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 9), tokens=st.integers(0, 4), finished=st.booleans())
    def complete(self, which: int, tokens: int, finished: bool) -> None:
        one = self.running.pop(which % len(self.running))
        self.admission.completed(one.request, self.now, tokens=tokens, finished=finished)
        assert 1.0 <= self.admission.retry_after_s(self.now) <= self.config.queue_ttl_s

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 9), tokens=st.integers(0, 4))
    def lose(self, which: int, tokens: int) -> None:
        """Its replica died after so many tokens: it waits again, where it was."""
        one = self.running.pop(which % len(self.running))
        resumed = replace(one.request, generated=((1,) * tokens,))
        self.number += 1
        self.admission.requeue(resumed, self.now)
        key = (self._starts(one.request, one.rank), self.number)
        expires = self.now + int(self.config.queue_ttl_s * NS_PER_S)
        self.waiting.append(replace(one, request=resumed, expires=expires, key=key, again=True))

    @rule(number=st.integers(0, 30))
    def cancel(self, number: int) -> None:
        waits = [one.request.request_id for one in self.waiting]
        assert self.admission.cancel(f"r{number}", self.now) == (f"r{number}" in waits)
        self.waiting = [o for o in self.waiting if o.request.request_id != f"r{number}"]

    @rule(passed=st.integers(0, 40))
    def wait_and_expire(self, passed: int) -> None:
        self.now += passed * TENTH_NS
        overdue = [one.request for one in self.waiting if one.expires <= self.now]
        assert self.admission.expire(self.now) == overdue
        self.waiting = [one for one in self.waiting if one.expires > self.now]

    @invariant()
    def exact(self) -> None:
        if not hasattr(self, "admission"):
            return
        self.admission.check()
        assert self.admission.queued_requests == len(self.waiting)
        queued = sum(work_tokens(one.request) for one in self.waiting)
        assert self.admission.queued_tokens == queued, "tokens"
        of_tier = tuple(sum(o.rank == rank for o in self.waiting) for rank in range(3))
        assert self.admission.queued_by_tier() == of_tier

    def _starts(self, request: Request, rank: int) -> int:
        target = TIERS[rank].ttft_ms * 1_000_000
        latest = request.arrival + target
        if request.deadline is not None:
            generation = int(3 * self.admission.pace.seconds() * NS_PER_S)
            latest = min(latest, request.deadline - generation)
        clamped = max(-4, min(4, request.priority))
        return max(latest, request.arrival) + clamped * target

    def _would_fit(self, request: Request, rank: int, without: list[Waiting]) -> bool:
        mine = [o for o in self.waiting if o.request.tenant == request.tenant]
        tokens = work_tokens(request)
        if (
            mine
            and self.config.tenant_share < 1
            and self._over(mine, tokens, self.config.tenant_share)
        ):
            return False
        left = [one for one in self.waiting if one not in without]
        if not left:
            return True
        low = [one for one in left if one.rank > 0] if rank else []
        return not self._over(left, tokens, 1.0) and not (low and self._over(low, tokens, 0.75))

    def _may_leave(self, rank: int) -> list[Waiting]:
        """In their order: the cheapest tier's newest first, as long as it has more than its part
        by weight."""
        found: list[Waiting] = []
        for worse in range(len(TIERS) - 1, rank, -1):
            part = TIERS[worse].weight / sum(tier.weight for tier in TIERS)
            left = [one for one in self.waiting if one.rank == worse]
            for one in sorted(left, key=lambda one: one.key[1], reverse=True):
                tokens = sum(work_tokens(other.request) for other in left)
                requests = len(left) > part * self.config.max_queued_requests
                if one.again or not (requests or tokens > part * self.config.max_queued_tokens):
                    continue
                left.remove(one)
                found.append(one)
        return found

    def _over(self, those: list[Waiting], tokens: int, share: float) -> bool:
        queued = sum(work_tokens(one.request) for one in those)
        most = max(1.0, share * self.config.max_queued_requests)
        return len(those) + 1 > most or queued + tokens > share * self.config.max_queued_tokens

    def _may_run(self, one: Waiting) -> bool:
        of_b = sum(other.request.tenant == "b" for other in self.running)
        if one.request.tenant == "b" and of_b >= 1:
            return False
        low = sum(other.rank > 0 for other in self.running)
        places = self.admission.capacity.places
        return not (places and one.rank > 0 and low and low + 1 > 0.75 * places)


class FairMachine(RuleBasedStateMachine):
    """Names come, go and are served; the bound of `fair` holds between any two of them."""

    WEIGHTS: Mapping[str, float] = {"a": 1.0, "b": 3.0, "c": 1.0}
    LARGEST = 50

    @initialize()
    def build(self) -> None:
        self.fair = FairShare(self.WEIGHTS)
        self.backlogged: list[str] = []
        self.served: dict[str, int] = dict.fromkeys("abcd", 0)
        # For each two that are backlogged: what each had been served when the second one came.
        self.since: dict[tuple[str, str], tuple[int, int]] = {}

    @rule(name=st.sampled_from("abcd"))
    def come(self, name: str) -> None:
        self.fair.enter(name)
        if name not in self.backlogged:
            for other in self.backlogged:
                self.since[name, other] = (self.served[name], self.served[other])
            self.backlogged.append(name)

    @rule(name=st.sampled_from("abcd"))
    def go(self, name: str) -> None:
        self.fair.leave(name)
        if name in self.backlogged:
            kept = [
                self.fair.counter(one)
                for one in self.fair._counters
                if one not in self.fair.order()
            ]
            assert all(counter > self.fair._floor for counter in kept), "never forgotten"
            self.backlogged.remove(name)
        self.since = {pair: was for pair, was in self.since.items() if name not in pair}

    @precondition(lambda self: self.backlogged)
    @rule(cost=st.integers(1, 50), times=st.integers(1, 12))
    def serve(self, cost: int, times: int) -> None:
        for _ in range(times):
            order = self.fair.order()
            assert sorted(order) == sorted(self.backlogged)
            self.fair.charge(order[0], cost)
            self.served[order[0]] += cost

    @invariant()
    def nobody_is_behind_its_share(self) -> None:
        if not hasattr(self, "fair"):
            return
        self.fair.check()
        assert len(self.fair._counters) <= 4
        for (one, other), (mine, theirs) in self.since.items():
            weights = self.WEIGHTS.get(one, 1.0), self.WEIGHTS.get(other, 1.0)
            got = (self.served[one] - mine) / weights[0]
            gap = got - (self.served[other] - theirs) / weights[1]
            bound = self.LARGEST / weights[0] + self.LARGEST / weights[1]
            assert abs(gap) <= bound + 1e-6, f"{one} and {other} are {gap} apart"
        shares = [self.fair.share(name) for name in self.backlogged]
        assert not shares or abs(sum(shares) - 1.0) < 1e-9
