"""Which replica gets the next request: the one where it would be done first, if it has head-room.

    cost = wait (prompts ahead of it, a place, blocks) + its prompt, less what is cached there
           + its output beside all others            see `outlook` and `prefix_index`

So a prefix draws requests to where it is held until waiting there costs more than computing it
anew; then a second replica holds it too. With many replicas only a few are looked at: those that
hold the longest prefixes, and some drawn at random. That bounds the cost of a choice, and several
dispatchers with equally old snapshots don't all send to the same replica.

Mitzenmacher, "The power of two choices in randomized load balancing" (1996).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from fabric.core.configs import RouterConfig
from fabric.core.request import Request
from fabric.core.snapshot import ReplicaSnapshot
from fabric.core.traffic.admission import work_tokens
from fabric.core.traffic.counter_random import CounterRandom
from fabric.core.traffic.outlook import Outlook, Sent, outlook, output_tokens
from fabric.core.traffic.policies import POLICIES, Ask
from fabric.core.traffic.prefix_index import PrefixIndex


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Send the request there. `work_tokens`: to compute before it and for its prompt; of these
    prompts' tokens `cached_tokens` are probably there already. `cost_ns`: until it is done.
    `prefill_id`: the replica that computes the prompt and hands its KV over (None: no other)."""

    replica_id: str
    work_tokens: int
    cached_tokens: int = 0
    cost_ns: int = 0
    prefill_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NoReplica:
    """Keep the request. `busy`: there are replicas, but none has head-room; ask again later."""

    busy: bool


class Router:
    """`choose` takes its answer for sent: the caller does send it, or loses a little accuracy.

    `ReplicaSnapshot.taken` and `now` must be of one clock: a snapshot of another machine is
    stamped again when it arrives. `seed`: another one for each dispatcher.
    """

    def __init__(self, config: RouterConfig, *, seed: int = 0) -> None:
        if config.policy != "cost" and config.policy not in POLICIES:
            raise ValueError(f"no policy {config.policy!r}: cost, {', '.join(POLICIES)}")
        self.config = config
        self.index = PrefixIndex(config.block_size)
        self._ranks = {tier.name: rank for rank, tier in enumerate(config.tiers)}
        self._sent: dict[str, deque[Sent]] = {}
        self._random = CounterRandom(seed)
        self._turn = 0

    def choose(
        self, request: Request, snapshots: Sequence[ReplicaSnapshot], now: int
    ) -> Choice | NoReplica:
        """The replica with head-room that would be done with it first. Ties: the lower id."""
        self._forget_what_snapshots_show(snapshots)
        if not snapshots:
            return NoReplica(busy=False)
        depths = self.index.match(self.index.digests(request))
        if self.config.policy != "cost":
            chosen = self._compare(request, snapshots, depths)
        else:
            found = self._best(request, snapshots, depths, now)
            if found is None:
                return NoReplica(busy=True)
            chosen = found
        at = chosen.replica_id
        tokens = max(work_tokens(request) - chosen.cached_tokens, 1)
        sent = Sent(at=now, rank=self._rank(request), tokens=tokens, output=output_tokens(request))
        self._sent.setdefault(at, deque()).append(sent)
        blocks = next(one.blocks_total for one in snapshots if one.replica_id == at)
        self.index.note(at, request, blocks)
        return chosen

    def has_room(self, request: Request, snapshots: Sequence[ReplicaSnapshot], now: int) -> bool:
        """Would `choose` find a replica with head-room? Nothing is taken for sent."""
        self._forget_what_snapshots_show(snapshots)
        if self.config.policy != "cost":
            return bool(snapshots)
        return any(self._has_room(self._outlook(one, request, now)) for one in snapshots)

    def check(self) -> None:
        """What was sent is in order of time, and each but the last found head-room in its rank."""
        self.index.check()
        for sent in self._sent.values():
            times = [item.at for item in sent]
            assert times == sorted(times), "sent in order"
            if self.config.policy == "cost" and sent:
                before = sum(i.tokens for i in list(sent)[:-1] if i.rank <= sent[-1].rank)
                assert before < self.config.headroom_tokens, "sent without head-room"

    def _best(
        self,
        request: Request,
        snapshots: Sequence[ReplicaSnapshot],
        depths: dict[str, int],
        now: int,
    ) -> Choice | None:
        """The cheapest of the candidates with head-room."""
        best: tuple[float, str] | None = None
        choice = None
        for group in self._candidates(snapshots, depths):
            for snapshot in group:
                view = self._outlook(snapshot, request, now)
                if not self._has_room(view):
                    continue
                found = self._price(request, snapshot.replica_id, view, depths)
                place = (found.cost_ns, snapshot.replica_id)
                if best is None or place < best:
                    best, choice = place, found
            if choice is not None:
                break
        return choice

    def _candidates(
        self, snapshots: Sequence[ReplicaSnapshot], depths: dict[str, int]
    ) -> list[list[ReplicaSnapshot]]:
        """All of a few. Of many: the holders of the longest prefixes and a sample; then, if none of
        these has head-room, the others."""
        few = self.config.choices
        if len(snapshots) <= 2 * few:
            return [list(snapshots)]
        drawn = set(self._random.sample(few, len(snapshots)))
        holders = sorted(depths, key=lambda name: (-depths[name], name))[:few]
        first: list[ReplicaSnapshot] = []
        rest: list[ReplicaSnapshot] = []
        for number, snapshot in enumerate(snapshots):
            chosen = number in drawn or snapshot.replica_id in holders
            (first if chosen else rest).append(snapshot)
        return [first, rest]

    def _has_room(self, view: Outlook) -> bool:
        config, ahead = self.config, view.ahead_tokens
        return ahead < config.headroom_tokens and ahead * view.token_ns < config.headroom_ns

    def _outlook(self, snapshot: ReplicaSnapshot, request: Request, now: int) -> Outlook:
        sent = self._sent.get(snapshot.replica_id, ())
        return outlook(snapshot, sent, self._rank(request), now, self.config.block_size)

    def _price(
        self, request: Request, replica_id: str, view: Outlook, depths: dict[str, int]
    ) -> Choice:
        size = self.config.block_size
        total, output = work_tokens(request), output_tokens(request)
        cached = min(depths.get(replica_id, 0) * size, total - 1)
        blocks = -(-(total - cached + output) // size)
        cost_ns = view.wait_ns(max(self.config.headroom_tokens // 2, 1), blocks)
        cost_ns += view.service_ns(total - cached, output)
        if not self.index.has_adapter(replica_id, request.adapter):
            cost_ns += self.config.adapter_load_ns
        return Choice(
            replica_id=replica_id,
            work_tokens=round(view.ahead_tokens) + total - cached,
            cached_tokens=cached,
            cost_ns=round(cost_ns),
        )

    def _compare(
        self, request: Request, snapshots: Sequence[ReplicaSnapshot], depths: dict[str, int]
    ) -> Choice:
        """One of the policies that are there to be compared with: no head-room, no cost."""
        self._turn += 1
        open_requests = [
            one.running + one.waiting + one.swapped + len(self._sent.get(one.replica_id, ()))
            for one in snapshots
        ]
        digests = self.index.digests(request)
        names = [one.replica_id for one in snapshots]
        ask = Ask(
            names=names,
            open_requests=open_requests,
            depths=depths,
            first=digests[0] if digests else b"",
            turn=self._turn,
            random=self._random,
        )
        at = POLICIES[self.config.policy](ask)
        cached = min(depths.get(at, 0) * self.config.block_size, work_tokens(request) - 1)
        return Choice(replica_id=at, work_tokens=work_tokens(request), cached_tokens=cached)

    def _rank(self, request: Request) -> int:
        return self._ranks.get(request.tier, len(self._ranks) - 1)

    def _forget_what_snapshots_show(self, snapshots: Sequence[ReplicaSnapshot]) -> None:
        taken = {snapshot.replica_id: snapshot.taken for snapshot in snapshots}
        for replica_id in [name for name in self._sent if name not in taken]:
            del self._sent[replica_id]
        for replica_id in [name for name in self.index.replicas() if name not in taken]:
            self.index.forget(replica_id)
        for replica_id, sent in self._sent.items():
            while sent and sent[0].at + self.config.in_transit_ns < taken[replica_id]:
                sent.popleft()
