"""Which replica gets the next request: the one where it costs least, if it has head-room.

    cost = wait (prompts ahead of it, a place, blocks) + its output beside all others
           + a row more in each step of those others, as long as its output lasts
           + its prompt, less what is cached there, once for itself and once for each sequence that
             a replica runs on average: they wait while it is computed           see `outlook`
           or, of what another replica holds, the time to fetch it if that is less: `fetching`

What it costs others counts like what it costs itself, as tolls on a road do: what everybody would
choose for himself alone crowds the replicas that hold popular prefixes. So a prefix draws requests
to where it is held until waiting there costs more than computing it anew. Where the cheapest holder
has no head-room yet, its request waits in the queue, for no longer than `patience_ns` and twice its
tier's TTFT target, and others go before it ("delay scheduling", Zaharia et al., EuroSys 2010). With
many replicas only holders and a few drawn at random are looked at. That bounds the cost of a
choice, and several dispatchers with equally old snapshots don't all send to the same replica.

Mitzenmacher, "The power of two choices in randomized load balancing" (1996).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from fabric.core.configs import RouterConfig
from fabric.core.request import Request
from fabric.core.snapshot import ReplicaSnapshot
from fabric.core.traffic.admission import work_tokens
from fabric.core.traffic.counter_random import CounterRandom
from fabric.core.traffic.fetching import Fetch, Price, best_holder, find_fetch
from fabric.core.traffic.outlook import Outlook, Sent, output_tokens
from fabric.core.traffic.policies import POLICIES, Ask
from fabric.core.traffic.prefix_index import PrefixIndex
from fabric.core.traffic.station import Promise, Station

# A request that waits for a holder is reckoned through again when one has room, or so much later.
RECHECK_NS = 200_000_000
MAX_WAITS = 4_096
NS_PER_MS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Send the request there. `work_tokens`: to compute before it and for its prompt; of these
    prompts' tokens `cached_tokens` are probably there already. `cost_ns`: until it is done.
    `prefill_id`: the replica that computes the prompt and hands its KV over (None: no other).
    `fetch`: from whom these are to be fetched, where that is cheaper (None: nothing is)."""

    replica_id: str
    work_tokens: int
    cached_tokens: int = 0
    cost_ns: int = 0
    prefill_id: str | None = None
    fetch: Fetch | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NoReplica:
    """Keep the request. `busy`: there are replicas, but none has head-room; ask again later.
    `holder`: its turn there is worth waiting for; others may go before it."""

    busy: bool
    holder: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """A request waits for `holder`, since `began` (ns); it is looked at again when one of `names`
    has room, or when its promise ends."""

    began: int
    holder: str
    names: frozenset[str]
    promise: Promise


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
        self._stations: dict[str, Station] = {}
        self._waits: OrderedDict[str, Wait] = OrderedDict()
        self._random = CounterRandom(seed)
        self._turn = 0
        self._number = 0
        self._crowd = 0.0

    def choose(
        self,
        request: Request,
        snapshots: Sequence[ReplicaSnapshot],
        now: int,
        *,
        landing: int = 0,
    ) -> Choice | NoReplica:
        """The replica where it costs least, or none yet. Ties: the lower id. `landing`: KV of so
        many tokens, beside the prompt's, comes there from elsewhere."""
        self._see(snapshots)
        if not snapshots:
            return NoReplica(busy=False)
        if self.config.policy != "cost":
            chosen = self._compare(request)
        else:
            roomy = self._with_room(self._rank(request.tier), now)
            if not roomy:
                return NoReplica(busy=True)
            if self.still_waits(request.request_id, now):
                return NoReplica(busy=True, holder=self._waits[request.request_id].holder)
            chosen = self._best(request, roomy, now, landing)
            if chosen.replica_id not in roomy:
                return NoReplica(busy=True, holder=chosen.replica_id)
        at = chosen.replica_id
        station = self._stations[at]
        station.send(self._sent(request, chosen.cached_tokens, now, landing))
        self.forget(request.request_id)
        self.index.note(at, request, station.snapshot.blocks_total)
        return chosen

    def still_waits(self, request_id: str, now: int) -> bool:
        """It waits for a holder, and as far as was seen nothing has changed for it."""
        wait = self._waits.get(request_id)
        if wait is None or now >= wait.promise.until or wait.holder not in self._stations:
            return False
        rank = wait.promise.sent.rank
        for name in wait.names:
            station = self._stations.get(name)
            if station is not None and station.seems_roomy(rank, now):
                return False
        return True

    def has_room(self, request: Request, snapshots: Sequence[ReplicaSnapshot], now: int) -> bool:
        """Would `choose` find a replica with head-room? Nothing is taken for sent."""
        self._see(snapshots)
        if self.config.policy != "cost":
            return bool(snapshots)
        return bool(self._with_room(self._rank(request.tier), now))

    def forget(self, request_id: str) -> None:
        """It waits for no holder any more: it has gone, or goes elsewhere."""
        wait = self._waits.pop(request_id, None)
        if wait is not None and wait.holder in self._stations:
            self._stations[wait.holder].promised.pop(request_id, None)

    def check(self) -> None:
        """What was sent is in order of time, and each but the last found head-room in its rank."""
        self.index.check()
        assert len(self._waits) <= MAX_WAITS, "too many that wait for a holder"
        for name, station in self._stations.items():
            for waiting, promise in station.promised.items():
                wait = self._waits[waiting]
                assert (wait.holder, wait.promise) == (name, promise), "two views of who waits"
        for station in self._stations.values():
            sent = list(station.sent)
            times = [item.at for item in sent]
            assert times == sorted(times), "sent in order"
            if self.config.policy == "cost" and sent:
                before = sum(i.tokens for i in sent[:-1] if i.rank <= sent[-1].rank)
                assert before < self.config.headroom_tokens, "sent without head-room"

    def _best(self, request: Request, roomy: list[str], now: int, landing: int) -> Choice:
        """The cheapest of the candidates. One without head-room: the request waits for it."""
        rank = self._rank(request.tier)
        depths = self.index.match(self.index.digests(request))
        holders = sorted(depths, key=lambda name: (-depths[name], name))[: 2 * self.config.choices]
        wait = self._waits.get(request.request_id)
        began = now if wait is None else wait.began
        self._number += 1
        since = self._number if wait is None else wait.promise.since
        patience_ns = min(self.config.patience_ns, 2 * self.config.tiers[rank].ttft_ms * NS_PER_MS)
        if now >= began + patience_ns:
            holders = [name for name in holders if name in roomy]
        best: tuple[int, str] | None = None
        choice = None
        for name in dict.fromkeys([*holders, *self._sample(roomy)]):
            view = self._stations[name].outlook(rank, now, since)
            found = self._price(request, name, view, depths, landing)
            if best is None or (found.cost_ns, name) < best:
                best, choice = (found.cost_ns, name), found
        assert choice is not None, "somebody has room"
        self.forget(request.request_id)
        if choice.replica_id not in roomy:
            promise = Promise(
                since=since,
                until=min(now + RECHECK_NS, began + patience_ns),
                sent=self._sent(request, choice.cached_tokens, now, landing),
            )
            names = frozenset(holders).difference(roomy)
            self._remember(
                request.request_id,
                Wait(began=began, holder=choice.replica_id, names=names, promise=promise),
            )
        return choice

    def _sample(self, roomy: list[str]) -> list[str]:
        """All of a few, some of many."""
        few = self.config.choices
        if len(roomy) <= 2 * few:
            return roomy
        return [roomy[at] for at in self._random.sample(few, len(roomy))]

    def _with_room(self, rank: int, now: int) -> list[str]:
        return [name for name, one in self._stations.items() if one.has_room(rank, now)]

    def _remember(self, request_id: str, wait: Wait) -> None:
        self._waits[request_id] = wait
        self._stations[wait.holder].promised[request_id] = wait.promise
        if len(self._waits) > MAX_WAITS:  # of clients that have left, mostly
            self.forget(next(iter(self._waits)))

    def _sent(self, request: Request, cached: int, now: int, landing: int) -> Sent:
        return Sent(
            at=now,
            rank=self._rank(request.tier),
            tokens=max(work_tokens(request) - cached, 1),
            output=output_tokens(request),
            landing=landing,
        )

    def _price(
        self,
        request: Request,
        replica_id: str,
        view: Outlook,
        depths: dict[str, int],
        landing: int = 0,
    ) -> Choice:
        size = self.config.block_size
        total, output = work_tokens(request), output_tokens(request)
        held = cached = min(depths.get(replica_id, 0) * size, total - 1)
        cost_ns = 0.0
        price = self._fetch(request, replica_id, depths)
        if price is not None:
            cached, cost_ns = min(price.fetch.tokens, total - 1), price.cost_ns
        blocks = -(-(total - held + landing + output) // size)
        cost_ns += view.wait_ns(self.config.chunk_tokens, blocks)
        cost_ns += view.service_ns(total - cached, output) + view.burden_ns(output)
        cost_ns += self._crowd * (total - cached) * view.token_ns
        if not self.index.has_adapter(replica_id, request.adapter):
            cost_ns += self.config.adapter_load_ns
        return Choice(
            replica_id=replica_id,
            work_tokens=round(view.ahead_tokens) + total - cached,
            cached_tokens=cached,
            cost_ns=round(cost_ns),
            fetch=None if price is None else price.fetch,
        )

    def _fetch(self, request: Request, at: str, depths: dict[str, int]) -> Price | None:
        """What is not there of its prefix, from who has most of it, if that pays."""
        holder = best_holder(depths, at) if self.config.fetch is not None else None
        if holder is None or request.sampling.prompt_logprobs is not None:  # all is computed
            return None
        assert self.config.fetch is not None
        size = self.config.block_size
        return find_fetch(
            self.config.fetch,
            self._stations[at].snapshot,
            self._stations[holder].snapshot,
            held=(depths.get(at, 0) * size, depths[holder] * size),
            crowd=self._crowd,
        )

    def _see(self, snapshots: Sequence[ReplicaSnapshot]) -> None:
        """Who is there, and what is new of them. Mostly nothing is: then it is a look at each."""
        stations = self._stations
        for snapshot in snapshots:
            station = stations.get(snapshot.replica_id)
            if station is None:
                stations[snapshot.replica_id] = Station(self.config, snapshot)
            elif station.snapshot is not snapshot and station.snapshot != snapshot:
                station.see(snapshot)  # not what only looks new, as all does in a replay
        if len(stations) > len(snapshots):
            there = {snapshot.replica_id for snapshot in snapshots}
            for name in [name for name in stations if name not in there]:
                del stations[name]
                self.index.forget(name)
        running = sum(snapshot.running for snapshot in snapshots)
        self._crowd = running / max(len(snapshots), 1)

    def _compare(self, request: Request) -> Choice:
        """One of the policies that are there to be compared with: no head-room, no cost."""
        self._turn += 1
        open_requests = [
            one.snapshot.running + one.snapshot.waiting + one.snapshot.swapped + len(one.sent)
            for one in self._stations.values()
        ]
        digests = self.index.digests(request)
        depths = self.index.match(digests)
        names = list(self._stations)
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
        price = self._fetch(request, at, depths)
        return Choice(
            replica_id=at,
            work_tokens=work_tokens(request),
            cached_tokens=cached,
            fetch=None if price is None else price.fetch,
        )

    def _rank(self, tier: str) -> int:
        return self._ranks.get(tier, len(self._ranks) - 1)
