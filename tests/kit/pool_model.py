"""A pool of replicas in three numbers: what an autoscaler sees of it, without engines."""

from __future__ import annotations

from random import Random

from fabric.core.configs import AutoscalerConfig
from fabric.core.control.autoscaler import Autoscaler, Target
from fabric.core.snapshot import PoolSnapshot, ReplicaSnapshot

NS_PER_S = 1_000_000_000
TOKENS_PER_S = 1_000  # prompt tokens that one full replica works off in a second
BLOCKS = 1_000


class PoolModel:
    """Replicas that share `work` (in full replicas) evenly; more than they can do queues up.

    `noise`: standard deviation of the work of one tick, relative. `cold_start_s`: until a new one
    helps. `part`: of the prompt tokens that arrive, what is computed here; below 1 the queue is
    that of another pool too.
    """

    def __init__(
        self,
        config: AutoscalerConfig,
        *,
        replicas: int = 1,
        noise: float = 0.0,
        seed: int = 0,
        part: float = 1.0,
    ) -> None:
        self._part = part
        self.autoscaler = Autoscaler(config)
        self.wanted = replicas
        self.now = 0
        self.burn = 0.0
        self.cold_start_s = 10
        self.backlog = 0.0  # tokens
        self.changes: list[tuple[int, int, Target]] = []  # second, replicas before, what is new
        self._ready = {
            f"r{i}": ReplicaSnapshot(replica_id=f"r{i}", taken=0) for i in range(replicas)
        }
        self._starting: dict[str, int] = {}
        self._named = replicas
        self._noise = noise
        self._random = Random(seed)
        self._arrived = 0.0
        self._requests = 0

    @property
    def ready(self) -> int:
        """Replicas that work."""
        return len(self._ready)

    def tick(self, work: float, seconds: int = 1) -> Target:
        """So much time with so much work, then a decision, which is obeyed."""
        self.now += seconds * NS_PER_S
        for name in [name for name, when in self._starting.items() if when <= self.now]:
            del self._starting[name]
            self._ready[name] = ReplicaSnapshot(replica_id=name, taken=self.now)
        offered = max(0.0, work * (1 + self._noise * self._random.gauss(0, 1))) * TOKENS_PER_S
        arrived = offered * seconds
        self._arrived += arrived
        self._requests += arrived > 0
        done = min(self.backlog + arrived, TOKENS_PER_S * seconds * self.ready)
        self.backlog += arrived - done
        full = done / (TOKENS_PER_S * seconds * self.ready) if self.ready else 0.0
        self._ready = {
            name: _worked(one, full, seconds, self.now) for name, one in self._ready.items()
        }
        target = self.autoscaler.decide(self._pool(), self.now)
        self.autoscaler.check()
        if target.replicas != self.wanted:
            self.changes.append((self.now // NS_PER_S, self.wanted, target))
            self._obey(target.replicas)
        return target

    def run(self, work: float, seconds: int, step: int = 1) -> Target:
        """The same work for so long."""
        for _ in range(seconds // step):
            target = self.tick(work, step)
        return target

    def _obey(self, wanted: int) -> None:
        while self.ready + len(self._starting) > wanted:
            (self._starting or self._ready).popitem()
        while self.ready + len(self._starting) < wanted:
            self._starting[f"r{self._named}"] = self.now + self.cold_start_s * NS_PER_S
            self._named += 1
        self.wanted = wanted

    def _pool(self) -> PoolSnapshot:
        """As it is told live: at zero replicas nobody tells of arrivals."""
        return PoolSnapshot(
            pool="mixed",
            taken=self.now,
            wanted=self.wanted,
            replicas=tuple(self._ready.values()),
            queued_requests=round(self.backlog / 100),
            queued_tokens=round(self.backlog / self._part),
            arrived_requests_total=self._requests if self._ready else 0,
            arrived_tokens_total=round(self._arrived / self._part) if self._ready else 0,
            burn_minute=self.burn,
            burn_ten_minutes=self.burn,
            shared_queue=self._part < 1,
        )


def _worked(before: ReplicaSnapshot, full: float, seconds: int, now: int) -> ReplicaSnapshot:
    return ReplicaSnapshot(
        replica_id=before.replica_id,
        taken=now,
        running=1 if full else 0,
        places=64,
        blocks_total=BLOCKS,
        blocks_free=round(BLOCKS * (1 - full)),
        prompt_tokens_total=before.prompt_tokens_total + round(full * TOKENS_PER_S * seconds),
        busy_ns_total=before.busy_ns_total + round(full * seconds * NS_PER_S),
        token_ns=NS_PER_S // TOKENS_PER_S,
    )
