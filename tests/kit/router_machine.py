"""`Router` against a model that remembers every request and adds everything up anew each time."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fabric.core.configs import FetchConfig, RouterConfig
from fabric.core.request import Request, SamplingParams
from fabric.core.snapshot import ReplicaSnapshot
from fabric.core.tiers import BUILT_IN
from fabric.core.traffic.router import Choice, NoReplica, Router

SIZE = 2
TIERS = [tier.name for tier in BUILT_IN]

snapshots = st.builds(
    ReplicaSnapshot,
    replica_id=st.just(""),
    taken=st.just(0),
    running=st.integers(0, 6),
    waiting=st.integers(0, 3),
    waiting_tokens_by_tier=st.tuples(*[st.integers(0, 20)] * 3),
    sequences_by_tier=st.tuples(*[st.integers(0, 3)] * 3),
    places=st.sampled_from([0, 4, 8]),
    kv_token_bytes=st.sampled_from([0, 2, 2]),
    output_tokens_left=st.integers(0, 100),
    step_ns=st.integers(1, 20),
    token_ns=st.sampled_from([1, 2, 5]),
    row_ns=st.integers(1, 3),
    blocks_total=st.sampled_from([0, 100]),
    blocks_free=st.integers(0, 40),
)
prompts = st.builds(
    lambda base, length: tuple(base + i // 4 for i in range(length)),
    st.sampled_from([1, 50]),
    st.integers(1, 24),
)


# A token of two bytes takes one, two or eight ns.
fetches = st.builds(
    FetchConfig,
    latency_ns=st.integers(0, 12),
    bytes_per_s=st.sampled_from([2 * 10**9, 10**9, 25 * 10**7]),
    min_tokens=st.integers(1, 6),
)


@dataclass(frozen=True, slots=True)
class Sent:
    """One request as the model remembers it."""

    replica: str
    when: int
    rank: int
    tokens: int
    output: int


@dataclass(frozen=True, slots=True)
class Promise:
    """A request that waits for a holder. `order`: of all that began to wait; `names`: holders
    without head-room when it was looked at last."""

    replica: str
    order: int
    until: int
    names: set[str]
    sent: Sent


class RouterMachine(RuleBasedStateMachine):
    """Three replicas come, go and compute; every choice must be the cheapest one with room."""

    @initialize(
        headroom=st.integers(1, 50),
        transit=st.integers(0, 3),
        ns=st.integers(20, 200),
        patience=st.integers(0, 12),
        fetch=st.none() | fetches,
    )
    def build(
        self, headroom: int, transit: int, ns: int, patience: int, fetch: FetchConfig | None
    ) -> None:
        self.config = RouterConfig(
            headroom_tokens=headroom, in_transit_ns=transit, headroom_ns=ns, block_size=SIZE,
            adapter_load_ns=40, patience_ns=patience, fetch=fetch,
        )  # fmt: skip
        self.router = Router(self.config)
        self.snapshots: dict[str, ReplicaSnapshot] = {}
        self.sent: list[Sent] = []
        self.prompts: list[tuple[str, str | None, tuple[int, ...]]] = []  # replica, adapter, prompt
        self.asked: dict[str, tuple[Request, int]] = {}  # waits for a holder; since when
        self.promises: dict[str, Promise] = {}
        self.now = 0
        self.number = 0

    @rule(replica=st.sampled_from("abc"), seen=snapshots)
    def see(self, replica: str, seen: ReplicaSnapshot) -> None:
        fields = {name: getattr(seen, name) for name in seen.__slots__}
        fields |= {"replica_id": replica, "taken": self.now}
        self.snapshots[replica] = ReplicaSnapshot(**fields)

    @rule(replica=st.sampled_from("abc"))
    def lose(self, replica: str) -> None:
        self.snapshots.pop(replica, None)

    @rule(passed_ns=st.integers(1, 5))
    def wait(self, passed_ns: int) -> None:
        self.now += passed_ns

    @rule(
        prompt=prompts,
        tier=st.sampled_from(TIERS),
        expected=st.none() | st.integers(1, 9),
        adapter=st.sampled_from([None, None, "lora"]),
    )
    def choose(
        self, prompt: tuple[int, ...], tier: str, expected: int | None, adapter: str | None
    ) -> None:
        request = Request(
            request_id=f"r{self.number}",
            prompt=prompt,
            sampling=SamplingParams(max_tokens=4),
            arrival=self.now,
            tier=tier,
            adapter=adapter,
            expected_tokens=expected,
        )
        self.number += 1
        self._ask(request)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def ask_again(self, data: st.DataObject) -> None:
        self._ask(self.asked[data.draw(st.sampled_from(sorted(self.asked)))][0])

    def _ask(self, request: Request) -> None:
        there = self.snapshots
        self.sent = [one for one in self.sent if one.replica in there]
        self.prompts = [one for one in self.prompts if one[0] in there]
        mine = request.request_id
        rank = TIERS.index(request.tier)
        roomy = {name for name in there if self._has_room(name, rank)}
        began = self.asked.get(mine, (request, self.now))[1]
        outcome = self.router.choose(request, tuple(there.values()), self.now)
        if not roomy:
            assert outcome == NoReplica(busy=bool(there)), "no head-room anywhere"
            return
        promise = self.promises.get(mine)
        holds = promise and self.now < promise.until and promise.replica in there
        if promise and holds and not promise.names & roomy:
            assert outcome == NoReplica(busy=True, holder=promise.replica), "no news for it"
            return
        holders = {name for name in there if self._cached(name, request)}
        looked_at = set(roomy)
        if self.now < began + self.config.patience_ns:
            looked_at |= holders
        costs = {name: round(self._cost(name, request)) for name in looked_at}
        least, name = min((costs[name], name) for name in looked_at)
        fetched = self._fetched(name, request)
        cached = fetched[1] if fetched else self._cached(name, request)
        tokens = max(len(request.prompt) - cached, 1)
        sent = Sent(name, self.now, rank, tokens, self._output(request))
        if name not in roomy:
            assert outcome == NoReplica(busy=True, holder=name), "not worth waiting for"
            self.asked[mine] = (request, began)
            until = began + self.config.patience_ns
            order = promise.order if promise else self.number
            self.promises[mine] = Promise(name, order, until, holders - roomy, sent)
            return
        assert isinstance(outcome, Choice), "a replica had head-room"
        assert (outcome.replica_id, outcome.cost_ns) == (name, least), "not where it costs least"
        assert outcome.cached_tokens == cached, "what was sent there before is there"
        assert (outcome.fetch is not None) == (fetched is not None), "fetched iff it pays"
        if outcome.fetch and fetched:
            assert (outcome.fetch.holder_id, outcome.fetch.tokens) == fetched[:2]
            most = (cached - self._cached(name, request)) * there[name].token_ns
            assert outcome.fetch.patience_ns == most, "no longer than to compute it"
        self.asked.pop(mine, None)
        self.promises.pop(mine, None)
        self.sent.append(sent)
        self.prompts.append((name, request.adapter, request.prompt))

    @invariant()
    def exact(self) -> None:
        if hasattr(self, "router"):
            self.router.check()

    def _unseen(self, name: str) -> list[Sent]:
        taken = self.snapshots[name].taken - self.config.in_transit_ns
        return [one for one in self.sent if one.replica == name and one.when >= taken]

    def _ahead(self, name: str, rank: int) -> float:
        seen = self.snapshots[name]
        computed = 0.5 * (self.now - seen.taken) / self._pace(name)
        known = max(0.0, sum(seen.waiting_tokens_by_tier[: rank + 1]) - computed)
        return known + sum(one.tokens for one in self._unseen(name) if one.rank <= rank)

    def _has_room(self, name: str, rank: int) -> bool:
        """In whole numbers: twice the ns that what is ahead takes."""
        seen, pace = self.snapshots[name], self._pace(name)
        waits = sum(seen.waiting_tokens_by_tier[: rank + 1])
        twice = max(0, 2 * waits * pace - (self.now - seen.taken))
        twice += 2 * pace * sum(one.tokens for one in self._unseen(name) if one.rank <= rank)
        in_time = twice < 2 * self.config.headroom_ns
        return in_time and twice < 2 * pace * self.config.headroom_tokens

    def _pace(self, name: str) -> int:
        """A token's time, and its part of a step's."""
        seen, chunk = self.snapshots[name], max(self.config.headroom_tokens // 2, 1)
        return seen.token_ns + -(-seen.step_ns // chunk)

    def _before(self, name: str, request: Request) -> list[Sent]:
        """What is promised there to those that waited before it."""
        mine = self.promises.get(request.request_id)
        order = mine.order if mine else self.number
        return [
            one.sent
            for one in self.promises.values()
            if one.replica == name and one.order < order and one.until > self.now
        ]

    def _output(self, request: Request) -> int:
        return 4 if request.expected_tokens is None else request.expected_tokens

    def _cached(self, name: str, request: Request) -> int:
        """Blocks in common with the prompt that shares most."""
        longest = 0
        for replica, adapter, prompt in self.prompts:
            if (replica, adapter) != (name, request.adapter):
                continue
            common = 0
            while prompt[common : common + SIZE] == request.prompt[common : common + SIZE] and (
                common + SIZE <= min(len(prompt), len(request.prompt)) - 1
            ):
                common += SIZE
            longest = max(longest, common)
        return longest

    def _fetched(self, name: str, request: Request) -> tuple[str, int, int] | None:
        """Who has most of the prompt (of equals the first), how much, and the ns to fetch it; None:
        computing it takes no longer."""
        fetch, here = self.config.fetch, self._cached(name, request)
        others = [one for one in sorted(self.snapshots) if one != name]
        if fetch is None or not others:
            return None
        holder = max(others, key=lambda one: self._cached(one, request))
        there, seen = self._cached(holder, request), self.snapshots[name]
        if there - here < fetch.min_tokens or not seen.kv_token_bytes:
            return None
        size = (there - here) * seen.kv_token_bytes
        cost = fetch.latency_ns + self.snapshots[holder].step_ns + size * 10**9 // fetch.bytes_per_s
        if cost >= (1 + self._crowd()) * (there - here) * seen.token_ns:
            return None
        return holder, there, cost

    def _crowd(self) -> float:
        return sum(one.running for one in self.snapshots.values()) / len(self.snapshots)

    def _cost(self, name: str, request: Request) -> float:
        """Waiting for prompts, for places and for blocks; the prompt and the output, both also for
        those who have to wait meanwhile."""
        output = self._output(request)
        before = self._before(name, request)
        seen, unseen = self.snapshots[name], [*self._unseen(name), *before]
        rank = TIERS.index(request.tier)
        step = seen.step_ns + len(unseen) * seen.row_ns
        ahead = self._ahead(name, rank) + sum(one.tokens for one in before if one.rank <= rank)
        wait = ahead * seen.token_ns + ahead / max(self.config.headroom_tokens // 2, 1) * step
        sequences = seen.running + seen.waiting + seen.swapped + len(unseen)
        new = tokens = len(request.prompt) - self._cached(name, request)
        fetched = self._fetched(name, request)
        if fetched:
            tokens = len(request.prompt) - fetched[1]
        if sequences:
            wait += step / 2
            left = seen.output_tokens_left + sum(one.output for one in unseen)
            first = sum(seen.sequences_by_tier[: rank + 1])
            first += sum(one.rank <= rank for one in unseen)
            ends = first - seen.places + 1.0 if seen.places and first >= seen.places else 0.0
            taken = sum((one.tokens + one.output / 2) / SIZE for one in unseen)
            free = max(seen.blocks_free - taken, 0.0)
            needed = -(-(new + output) // SIZE)
            if seen.blocks_total and needed > free:
                each = max((seen.blocks_total - free) / sequences, 1.0)
                ends = max(ends, (needed - free) / each)
            running = min(sequences, seen.places) if seen.places else sequences
            wait += ends * left / sequences * step / running
        loaded = any(one[:2] == (name, request.adapter) for one in self.prompts)
        load = 0 if request.adapter is None or loaded else self.config.adapter_load_ns
        prompt = (1 + self._crowd()) * tokens * seen.token_ns
        prompt += fetched[2] if fetched else 0
        beside = min(sequences, seen.places) if seen.places else sequences
        return wait + prompt + output * (step + (1 + beside) * seen.row_ns) + load
