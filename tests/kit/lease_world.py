"""Three dispatchers with real queues, a control plane that splits leases, and a bad network.

A tick is a tenth of a second. Demands and leases get lost or late; one dispatcher dies. Demands
travel with heartbeats: what a dispatcher has running ends when its replicas have not heard of it
for as long as a lease holds.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from kit.traffic_machines import NS_PER_S, request_of

from fabric.core.configs import AdmissionConfig
from fabric.core.control.leases import TTL_NS, LeaseSplit
from fabric.core.lease import Lease
from fabric.core.request import Request
from fabric.core.tenants import Tenant
from fabric.core.tiers import Tier
from fabric.core.traffic.admission import Admission, Admitted, cost, work_tokens

TICK_NS = NS_PER_S // 10
TIERS = (Tier(name="standard", ttft_ms=1_000, tpot_ms=100),)
TENANTS = (
    Tenant(name="few", max_concurrent=4),
    Tenant(name="slow", requests_per_minute=120),
    Tenant(name="light", weight=1.0),
    Tenant(name="heavy", weight=2.0),
)
LARGEST = 30
OUTPUT = 4


class LeaseWorld:
    """`run` it; it checks as it goes. `homes`: which dispatchers a tenant's requests come to."""

    def __init__(self, seed: int, homes: dict[str, tuple[int, ...]], places: int) -> None:
        self.dice = Random(seed)
        self.homes = homes
        self.places = places  # requests that the fleet takes in a tick
        config = AdmissionConfig(tiers=TIERS, tenants=TENANTS, max_queued_requests=40)
        self.fronts = [Admission(config, dispatchers=3) for _ in range(3)]
        self.split = LeaseSplit(TIERS, TENANTS)
        self.running: list[list[Request]] = [[], [], []]
        self.dead: tuple[int, int] | None = None  # who, since when
        self.heard = [0, 0, 0]
        self.letters: list[tuple[int, int, Lease]] = []  # arrives, for whom, what
        self.served = dict.fromkeys(homes, 0)
        self.let_in: list[int] = []  # when requests of "slow" were
        self.number = 0
        self.allowance = 0.0

    def run(self, ticks: int, dies_at: int | None = None) -> None:
        """So many tenths of a second."""
        for tick in range(ticks):
            now = tick * TICK_NS
            if tick == dies_at:
                self.dead = (2, now)
            self._give_up(now)
            self._mail(now, whole=tick == 0 or tick == 10)
            for index in self._alive():
                self._arrivals(index, now)
            if tick % 10 == 0:
                self._sync(now, whole=tick in (0, 10))
                if tick <= 10:
                    self._mail(now, whole=True)
            self._work(now)
            self._check(now)

    def _give_up(self, now: int) -> None:
        for index, running in enumerate(self.running):
            if now - self.heard[index] >= TTL_NS:
                for took in running:
                    self.fronts[index].completed(took, now, tokens=0, finished=False)
                running.clear()

    def _alive(self) -> list[int]:
        return [index for index in range(3) if self.dead is None or self.dead[0] != index]

    def _arrivals(self, index: int, now: int) -> None:
        for tenant, homes in self.homes.items():
            if index not in homes:
                continue
            for _ in range(self.dice.randint(1, 3) + (6 if now == 0 else 0)):
                request = replace(
                    request_of(self.number, self.dice.randint(1, LARGEST), now), tenant=tenant
                )
                self.number += 1
                outcome = self.fronts[index].offer(request, now)
                if isinstance(outcome, Admitted) and tenant == "slow":
                    self.let_in.append(now)

    def _work(self, now: int) -> None:
        """The fleet takes so many, from whoever asks first; some that run come to their end."""
        for _ in range(self.places):
            asks = self._alive()
            self.dice.shuffle(asks)
            for index in asks:
                heads = self.fronts[index].heads(now)
                if heads:
                    took = self.fronts[index].take(heads[0].request_id, now)
                    self.running[index].append(took)
                    break
        for index in self._alive():
            for took in self.running[index][:]:
                if self.dice.random() < 0.3:
                    self.running[index].remove(took)
                    front = self.fronts[index]
                    front.completed(took, now, tokens=OUTPUT, finished=True)
                    self.served[took.tenant] += cost(work_tokens(took), OUTPUT)
            self.fronts[index].expire(now)
            if now % NS_PER_S == 0:
                self.fronts[index].check()

    def _sync(self, now: int, *, whole: bool) -> None:
        demands = []
        for index in self._alive():
            if whole or self.dice.random() < 0.8:
                self.heard[index] = now
                demands.append(self.fronts[index].demand(f"d{index}", now))
        leases = self.split.split(demands, now)
        self.split.check()
        self.allowance = max(self.allowance, self.split._allowance)
        for lease in leases:
            late = 0 if whole else self.dice.randint(0, 4)
            if whole or self.dice.random() < 0.8:
                self.letters.append((now + late * TICK_NS, int(lease.dispatcher_id[1]), lease))

    def _mail(self, now: int, *, whole: bool) -> None:
        for letter in [one for one in self.letters if one[0] <= now or whole]:
            self.letters.remove(letter)
            _, index, lease = letter
            if index in self._alive():
                self.fronts[index].renew(lease, now)

    def _check(self, now: int) -> None:
        few = sum(one.tenant == "few" for running in self.running for one in running)
        assert few <= 4, f"{few} run at once, four may"
        for index, since in enumerate(self.let_in):
            allowed = 120 / 6 + 120 / 60 * (now - since) / NS_PER_S
            assert len(self.let_in) - index <= allowed + 1e-6, "too many requests a minute"
