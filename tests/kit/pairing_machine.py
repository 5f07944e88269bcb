"""`Pairing` over two pools: which way a request takes, and what each pool's router books for it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from kit.router_machine import SIZE, prompts, snapshots

from fabric.core.configs import PairingConfig, RouterConfig
from fabric.core.request import Request, SamplingParams
from fabric.core.snapshot import ReplicaSnapshot
from fabric.core.traffic.handoff import PREFILL, Direct, Pairing
from fabric.core.traffic.router import Choice, NoReplica, Router

KINDS = {"p0": PREFILL, "p1": PREFILL, "d0": "decode", "d1": "mixed", "d2": "decode"}
LEAST = 6  # tokens left to compute for which the detour is worth it


class PairingMachine(RuleBasedStateMachine):
    """Whatever is chosen, exactly that is booked; nothing for who has to wait."""

    @initialize(headroom=st.integers(1, 50), patience=st.integers(0, 12), fresh=st.booleans())
    def build(self, headroom: int, patience: int, fresh: bool) -> None:
        router = RouterConfig(
            headroom_tokens=headroom, headroom_ns=200, in_transit_ns=3, block_size=SIZE,
            patience_ns=patience,
        )  # fmt: skip
        self.pairing = Pairing(PairingConfig(min_prompt_tokens=LEAST), router)
        self.pairing.kinds = KINDS
        self.there: dict[str, ReplicaSnapshot] = {}
        self.held: list[tuple[str, tuple[int, ...]]] = []  # by decode replica
        self.waiting: list[Request] = []
        self.detours = 0
        self.direct: Counter[Direct] = Counter()
        self.now = self.number = 0
        for name in ("p0", "d0", "d1") if fresh else ():
            self.there[name] = ReplicaSnapshot(
                replica_id=name, taken=0, places=4, step_ns=9, token_ns=1, row_ns=1
            )

    @rule(replica=st.sampled_from(sorted(KINDS)), seen=snapshots, idle=st.booleans())
    def see(self, replica: str, seen: ReplicaSnapshot, idle: bool) -> None:
        seen = replace(seen, replica_id=replica, taken=self.now)
        self.there[replica] = replace(seen, running=0, waiting=0) if idle else seen

    @rule(replica=st.sampled_from(sorted(KINDS)))
    def lose(self, replica: str) -> None:
        self.there.pop(replica, None)

    @rule(passed_ns=st.integers(1, 5))
    def wait(self, passed_ns: int) -> None:
        self.now += passed_ns

    @rule(prompt=prompts, most=st.sampled_from([1, 9, 9, 9]), n=st.sampled_from([1, 1, 1, 2]))
    def choose(self, prompt: tuple[int, ...], most: int, n: int) -> None:
        request = Request(
            request_id=f"r{self.number}",
            prompt=prompt,
            sampling=SamplingParams(max_tokens=most, n=n),
            arrival=self.now,
        )
        self.number += 1
        self.ask(request)

    @rule(which=st.integers(0, 9))
    def ask_again(self, which: int) -> None:
        if self.waiting:
            self.ask(self.waiting.pop(which % len(self.waiting)))

    def ask(self, request: Request) -> None:
        """Its turn has come, or may have."""
        first, second = self.pool(PREFILL), self.pool("decode")
        self.settle(request)
        books = [booked(router) for router in self.pairing.routers]
        outcome = self.pairing.choose(request, list(self.there.values()), self.now)
        grown = [
            booked(router) - before
            for router, before in zip(self.pairing.routers, books, strict=True)
        ]
        if isinstance(outcome, NoReplica):
            assert not any(grown), "booked, and not sent"
            self.waiting.append(request)
            return
        assert outcome.replica_id in second, "outputs are drawn in the other pool"
        reason = self.reason(request)
        if outcome.prefill_id is None:
            self.alone(request, outcome, reason, grown)
            return
        assert reason is None, f"a detour for nothing: {reason}"
        assert outcome.prefill_id in first
        ((name, tokens, output, landing),) = grown[0].elements()
        assert (name, output, landing) == (outcome.prefill_id, 1, 0), "one token is drawn there"
        assert 1 <= tokens <= len(request.prompt)
        left = (outcome.replica_id, 1, 9, len(request.prompt) - 1)
        assert list(grown[1].elements()) == [left], "the others here, where the KV comes to"
        self.detours += 1
        self.note(outcome, request)

    def alone(
        self,
        request: Request,
        outcome: Choice,
        reason: Direct | None,
        grown: list[Counter[tuple[str, int, int, int]]],
    ) -> None:
        """No detour: the reason is one of the request's, or the prefill pool is full."""
        if reason is None:
            idle = [one for one in self.pool("decode").values() if not one.running + one.waiting]
            assert idle, "there were prefill replicas, and nobody was idle"
            reason = Direct.IDLE
        assert not grown[0], "booked where it does not go"
        ((name, _, _, landing),) = grown[1].elements()
        assert (name, landing) == (outcome.replica_id, 0)
        self.direct[reason] += 1
        self.note(outcome, request)

    @invariant()
    def exact(self) -> None:
        if not hasattr(self, "pairing"):
            return
        self.pairing.check()
        assert self.pairing.detours_total == self.detours
        assert self.pairing.direct_total == self.direct
        waiting = {request.request_id for request in self.waiting}
        for router in self.pairing.routers:
            assert set(router._waits) <= waiting, "waits for a holder, and has gone"

    def reason(self, request: Request) -> Direct | None:
        """Why the request itself takes no detour."""
        if request.sampling.n > 1 or request.sampling.max_tokens == 1:
            return Direct.SHAPE
        if len(request.prompt) < LEAST:
            return Direct.SHORT
        held = max((self.common(request, name) for name in self.pool("decode")), default=0)
        if len(request.prompt) - held < LEAST:
            return Direct.HELD
        return None if self.pool(PREFILL) else Direct.NO_PREFILL

    def common(self, request: Request, name: str) -> int:
        """Tokens of leading full blocks that were sent there before, the last token left out."""
        longest = 0
        for replica, prompt in self.held:
            common = 0
            limit = min(len(prompt), len(request.prompt)) - 1
            while common + SIZE <= limit and (
                prompt[common : common + SIZE] == request.prompt[common : common + SIZE]
            ):
                common += SIZE
            longest = max(longest, common if replica == name else 0)
        return longest

    def note(self, outcome: Choice, request: Request) -> None:
        self.held.append((outcome.replica_id, request.prompt))

    def pool(self, kind: str) -> dict[str, ReplicaSnapshot]:
        """Anything that is not a prefill replica draws outputs."""
        return {
            name: one
            for name, one in self.there.items()
            if (KINDS[name] == PREFILL) == (kind == PREFILL)
        }

    def settle(self, request: Request) -> None:
        """Both routers have seen who is there: what is booked only grows now."""
        self.held = [one for one in self.held if one[0] in self.there]
        for router, kind in zip(self.pairing.routers, (PREFILL, "decode"), strict=True):
            router.has_room(request, list(self.pool(kind).values()), self.now)


def booked(router: Router) -> Counter[tuple[str, int, int, int]]:
    """(replica, tokens to compute, output, KV that comes) of all that was sent and not yet seen."""
    return Counter(
        (name, one.tokens, one.output, one.landing)
        for name, station in router._stations.items()
        for one in station.sent
    )
