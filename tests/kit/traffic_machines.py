"""`Admission` and `Router` against naive models."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from fabric.core.configs import AdmissionConfig, RouterConfig
from fabric.core.request import Request, SamplingParams
from fabric.core.snapshot import ReplicaSnapshot
from fabric.core.traffic.admission import Admission, Admitted, Shed, work_tokens
from fabric.core.traffic.router import Choice, NoReplica, Router

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


class AdmissionMachine(RuleBasedStateMachine):
    """The model is a list of (request, expiry), sorted when asked."""

    @initialize(requests=st.integers(1, 6), tokens=st.integers(1, 60), ttl_s=st.integers(1, 10))
    def build(self, requests: int, tokens: int, ttl_s: int) -> None:
        self.config = AdmissionConfig(
            max_queued_requests=requests, max_queued_tokens=tokens, queue_ttl_s=float(ttl_s)
        )
        self.admission = Admission(self.config)
        self.model: list[tuple[Request, int]] = []
        self.taken: list[Request] = []
        self.now = 0
        self.number = 0

    @rule(
        tokens=st.integers(1, 30),
        priority=st.integers(0, 2),
        late=st.integers(0, 10),
        patience_s=st.none() | st.integers(1, 5),
    )
    def offer(self, tokens: int, priority: int, late: int, patience_s: int | None) -> None:
        deadline = None if patience_s is None else self.now + patience_s * NS_PER_S
        arrival = max(0, self.now - late * TENTH_NS)
        request = request_of(self.number, tokens, arrival, priority=priority, deadline=deadline)
        self.number += 1
        outcome = self.admission.offer(request, self.now)
        queued = sum(work_tokens(other) for other, _ in self.model)
        full = len(self.model) >= self.config.max_queued_requests
        too_long = bool(self.model) and queued + tokens > self.config.max_queued_tokens
        if full or too_long:
            assert isinstance(outcome, Shed), "more than the bound"
            assert 1.0 <= outcome.retry_after_s <= self.config.queue_ttl_s
            return
        assert isinstance(outcome, Admitted), "there was room"
        ttl = self.now + int(self.config.queue_ttl_s * NS_PER_S)
        self.model.append((request, ttl if deadline is None else min(ttl, deadline)))
        ordered = self._ordered()
        ahead = ordered[: [item for item, _ in ordered].index(request)]
        assert outcome.ahead_tokens == sum(work_tokens(item) for item, _ in ahead)

    @rule()
    def take(self) -> None:
        in_time = [request for request, expiry in self._ordered() if expiry > self.now]
        expected = in_time[0] if in_time else None
        assert self.admission.head(self.now) == expected
        assert self.admission.take(self.now) == expected, "not the most important one"
        if expected is not None:
            self.model = [item for item in self.model if item[0] is not expected]
            self.taken.append(expected)

    @rule(number=st.integers(0, 30))
    def cancel(self, number: int) -> None:
        waiting = [request.request_id for request, _ in self.model]
        assert self.admission.cancel(f"r{number}") == (f"r{number}" in waiting)
        self.model = [item for item in self.model if item[0].request_id != f"r{number}"]

    @rule(passed=st.integers(0, 40))
    def wait_and_expire(self, passed: int) -> None:
        self.now += passed * TENTH_NS
        overdue = [request for request, expiry in self._ordered() if expiry <= self.now]
        assert self.admission.expire(self.now) == overdue
        self.model = [item for item in self.model if item[1] > self.now]

    @precondition(lambda self: self.taken)
    @rule(passed=st.integers(0, 10))
    def complete(self, passed: int) -> None:
        self.now += passed * TENTH_NS
        self.admission.completed(self.taken.pop(), self.now)

    @invariant()
    def exact(self) -> None:
        if hasattr(self, "admission"):
            self.admission.check()
            assert self.admission.queued_requests == len(self.model)
            assert self.admission.queued_tokens == sum(work_tokens(r) for r, _ in self.model)

    def _ordered(self) -> list[tuple[Request, int]]:
        """The model is in order of offers, and sorting is stable."""
        return sorted(self.model, key=lambda item: (item[0].priority, item[0].arrival))


class RouterMachine(RuleBasedStateMachine):
    """Replicas come, go and compute; the model remembers every request sent and when."""

    @initialize(headroom=st.integers(1, 50), transit=st.integers(0, 3))
    def build(self, headroom: int, transit: int) -> None:
        self.config = RouterConfig(headroom_tokens=headroom, in_transit_ns=transit)
        self.router = Router(self.config)
        self.snapshots: dict[str, ReplicaSnapshot] = {}
        self.sent: list[tuple[str, int, int]] = []  # replica, when, tokens
        self.now = 0
        self.number = 0

    @rule(replica=st.sampled_from("abc"), waiting=st.integers(0, 60), running=st.integers(0, 20))
    def see(self, replica: str, waiting: int, running: int) -> None:
        self.snapshots[replica] = ReplicaSnapshot(
            replica_id=replica, taken=self.now, waiting_tokens=waiting, running=running
        )

    @rule(replica=st.sampled_from("abc"))
    def lose(self, replica: str) -> None:
        self.snapshots.pop(replica, None)

    @rule(passed_ns=st.integers(1, 5))
    def wait(self, passed_ns: int) -> None:
        self.now += passed_ns

    @rule(tokens=st.integers(1, 40))
    def choose(self, tokens: int) -> None:
        self.sent = [item for item in self.sent if item[0] in self.snapshots]
        predicted = {name: self._predicted(name) for name in self.snapshots}
        roomy = {
            name: work + self.snapshots[name].running
            for name, work in predicted.items()
            if work < self.config.headroom_tokens
        }
        request = request_of(self.number, tokens, self.now)
        self.number += 1
        outcome = self.router.choose(request, tuple(self.snapshots.values()), self.now)
        if not roomy:
            assert outcome == NoReplica(busy=bool(self.snapshots)), "no head-room anywhere"
            return
        assert isinstance(outcome, Choice), "a replica had head-room"
        assert outcome.replica_id in roomy, "released without head-room"
        least = min((work, name) for name, work in roomy.items())
        assert (outcome.work_tokens, outcome.replica_id) == least, "least predicted work"
        self.sent.append((outcome.replica_id, self.now, tokens))

    @invariant()
    def exact(self) -> None:
        if hasattr(self, "router"):
            self.router.check()

    def _predicted(self, name: str) -> int:
        taken = self.snapshots[name].taken
        unseen = [
            tokens
            for replica, when, tokens in self.sent
            if replica == name and when + self.config.in_transit_ns >= taken
        ]
        return self.snapshots[name].waiting_tokens + sum(unseen)
