"""An `EngineReplica` in this process, behind the same calls that Ray carries.

The worker is scripted (pure Python), everything from the engine to the dispatcher is real.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from kit.scripted_worker import ScriptedWorker

from fabric.cluster.dispatcher import Dispatcher, Policy
from fabric.cluster.engine_replica import EngineReplica
from fabric.cluster.link import ReplicaGone
from fabric.cluster.loading import EngineParts
from fabric.cluster.workers import InProcess
from fabric.core.configs import AdmissionConfig, EngineConfig, PairingConfig, RouterConfig
from fabric.core.engine.engine import Engine
from fabric.core.engine.plan import StepPlan, StepResult
from fabric.core.journal import Recorder, watched
from fabric.core.request import Request, SamplingParams, TokenChunk
from fabric.core.traffic.fetching import Fetch
from fabric.gateway.backend import ServedModel

MODEL = ServedModel(
    name="scripted",
    version="1",
    created=0,
    context_limit=256,
    vocab=50,
    eos_token_ids=(),
    folder="",
)


class SlowWorker:
    """A scripted worker whose steps take time, so that requests can be met in every phase.

    `hold` set: the next step does not return. `fail`: it raises.
    """

    def __init__(self, config: EngineConfig, step_s: float) -> None:
        self.inner = ScriptedWorker(config)
        self._step_s = step_s
        self.hold = False
        self.fail = False

    def execute(self, plan: StepPlan) -> StepResult:
        """One step."""
        time.sleep(self._step_s)
        while self.hold:
            time.sleep(0.001)
        if self.fail:
            raise RuntimeError("planted")
        return self.inner.execute(plan)


def paced(step_s: float) -> Callable[[EngineConfig], SlowWorker]:
    """Makes workers whose steps take so long."""
    return lambda config: SlowWorker(config, step_s)


class LocalReplica:
    """The replica and what it is made of. `mends`: a broken engine is made anew in its place."""

    def __init__(
        self,
        replica_id: str,
        config: EngineConfig,
        worker: Callable[[EngineConfig], SlowWorker] | None = None,
        *,
        sockets: Path | None = None,
        mends: bool = False,
        journal: Recorder | None = None,
    ) -> None:
        made = 0
        worker = worker or paced(0.001)

        def load() -> tuple[str, EngineParts]:
            nonlocal made
            made += 1
            if made > 1 and not mends:
                raise RuntimeError("it is not mended here")
            self.engine = watched(journal, "engine", Engine(config))
            self.worker = worker(config)
            parts = EngineParts(
                engine=self.engine,
                workers=InProcess(self.worker.execute),
                executor="scripted",
                context_limit=config.context_limit,
                weight_bytes=1,
                kv_pool_bytes=2,
                host_pool_bytes=3,
            )
            return replica_id, parts

        self.service = EngineReplica(load, sockets)

    def stop(self) -> None:
        """End the engine thread, then check the engine."""
        self.service.loop.stop()
        self.engine.check()


class Killed(Exception):
    """What a call ends with whose replica's process was killed."""


class LocalCalls:
    """`link.Calls` without Ray. `partition()`: as if the network to all replicas were cut."""

    def __init__(self, identity: str, *replicas: LocalReplica) -> None:
        self.identity = identity
        self.replicas = {one.service.replica_id: one for one in replicas}
        self.cut = False
        self.cold_starts = False
        self.gone: set[str] = set()  # Serve does not send calls there any more
        self.woken = asyncio.Event()
        self.knocks = 0
        self._open: dict[str, list[tuple[asyncio.Task[None], asyncio.Future[None]]]] = {}

    def kill(self, replica_id: str) -> LocalReplica:
        """As SIGKILL: its calls end, nothing of it is heard any more. The engine is let go of."""
        dead = self.replicas.pop(replica_id)
        for task, ended in self._open.pop(replica_id, []):
            if not ended.done():
                ended.set_exception(Killed(replica_id))
            task.cancel()
        dead.worker.fail = True
        dead.worker.hold = False
        return dead

    def died(self, error: Exception) -> bool:
        """As `EngineCalls` does."""
        return isinstance(error, Killed)

    def serving(self, replica_id: str) -> bool:
        """As the router of Serve knows it."""
        return replica_id in self.replicas and replica_id not in self.gone

    def scaling(self) -> list[dict[str, Any]]:
        """No autoscaler here."""
        return []

    async def wake(self) -> None:
        """Until a test says that a replica is there."""
        self.knocks += 1
        await self.woken.wait()

    def reserve(self, replica_id: str, request: bytes, epoch: int) -> Any:
        """Awaitable."""
        return self.replicas[replica_id].service.reserve(request, self.identity, epoch)

    def give_up(self, replica_id: str, request_id: str, reason: str) -> Any:
        """Awaitable."""
        return self.replicas[replica_id].service.give_up(request_id, reason)

    def generate(
        self,
        replica_id: str,
        request: bytes,
        target: str | None = None,
        epoch: int = 0,
        fetch: Fetch | None = None,
    ) -> Any:
        """A task: awaitable, with `cancel()`."""
        if replica_id not in self.replicas:
            return asyncio.ensure_future(gone(replica_id))
        service = self.replicas[replica_id].service
        run = service.generate(request, self.identity, target, epoch, fetch)
        task = asyncio.ensure_future(run)
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def end(done: asyncio.Task[None]) -> None:
            if ended.done():
                return
            if done.cancelled():
                ended.cancel()
            elif (error := done.exception()) is not None:
                ended.set_exception(error)
            else:
                ended.set_result(None)

        task.add_done_callback(end)
        ended.add_done_callback(lambda one: task.cancel() if one.cancelled() else None)
        self._open.setdefault(replica_id, []).append((task, ended))
        return ended

    async def steps(self, replica_id: str) -> AsyncIterator[bytes]:
        """The stream."""
        if replica_id not in self.replicas:
            raise ReplicaGone(replica_id)
        async for item in self.replicas[replica_id].service.steps(self.identity):
            if replica_id not in self.replicas:
                return
            yield item

    def abort_choice(self, replica_id: str, request_id: str, choice: int) -> Any:
        """Awaitable."""
        return self.replicas[replica_id].service.abort_choice(request_id, choice)

    async def heartbeat(self, report: bytes, timeout_s: float) -> list[bytes]:
        """Of all replicas."""
        if self.cut:
            raise ConnectionError("cut")
        services = [one.service for name, one in self.replicas.items() if self.serving(name)]
        if not services:
            raise ConnectionError("nobody is there")
        return [await service.heartbeat(self.identity, report) for service in services]


async def gone(replica_id: str) -> None:
    """What a call to a replica that has left raises."""
    raise ReplicaGone(replica_id)


def engine_config(**fields: Any) -> EngineConfig:
    """Small enough that blocks run out."""
    defaults: dict[str, Any] = {
        "block_size": 4,
        "num_blocks": 64,
        "num_host_blocks": 32,
        "max_sequences": 8,
        "step_tokens": 32,
        "chunk_tokens": 16,
        "context_limit": 256,
    }
    return EngineConfig(**defaults | fields)


async def dispatcher(
    calls: LocalCalls,
    *,
    journal: Recorder | None = None,
    pairing: PairingConfig | None = None,
    router: RouterConfig | None = None,
    **admission: Any,
) -> Dispatcher:
    """A started dispatcher that has met its replicas."""
    one = Dispatcher(
        calls,
        identity=calls.identity,
        model=MODEL,
        policy=Policy(
            admission=AdmissionConfig(**admission),
            router=router or RouterConfig(headroom_tokens=64, block_size=4),
            pairing=pairing,
        ),
        launcher_pid=1,
        journal=journal,
    )
    one.start()
    while len(one._replicas.live()) < len(calls.replicas):
        await asyncio.sleep(0.001)
    return one


def request(
    name: str, prompt: int = 8, *, max_tokens: int = 8, n: int = 1, priority: int = 0
) -> Request:
    """A request of `prompt` tokens."""
    return Request(
        request_id=name,
        prompt=tuple((hash_of(name) + i) % 50 for i in range(prompt)),
        sampling=SamplingParams(max_tokens=max_tokens, n=n, seed=hash_of(name)),
        arrival=time.time_ns(),
        priority=priority,
    )


def hash_of(name: str) -> int:
    """A number that is the same in every run."""
    return sum(name.encode())


@asynccontextmanager
async def fleet(
    *,
    replicas: int = 1,
    step_s: float = 0.0005,
    engine: dict[str, Any] | None = None,
    **admission: Any,
) -> AsyncIterator[tuple[Dispatcher, LocalCalls]]:
    """A dispatcher and its replicas; every engine is checked at the end."""
    config = engine_config(**engine or {})
    local = [LocalReplica(f"r{number}", config, paced(step_s)) for number in range(replicas)]
    calls = LocalCalls("d0", *local)
    try:
        yield await dispatcher(calls, **admission), calls
    finally:
        for one in local:
            one.worker.hold = False
            one.stop()


async def collect(front: Dispatcher, one: Request) -> list[TokenChunk]:
    """All chunks of a request."""
    chunks: list[TokenChunk] = []
    async with aclosing(front.stream(one)) as items:
        async for item in items:
            chunks += item
    return chunks


def tokens_of(chunks: list[TokenChunk], choice: int = 0) -> list[int]:
    """One choice's tokens; positions must follow on each other."""
    mine = [chunk for chunk in chunks if chunk.choice == choice]
    tokens: list[int] = []
    for chunk in mine:
        assert chunk.position == len(tokens)
        tokens += chunk.tokens
    assert [chunk.finish for chunk in mine[:-1]] == [None] * (len(mine) - 1)
    assert mine[-1].finish is not None
    return tokens


async def settle(calls: LocalCalls) -> None:
    """Until every engine is idle."""
    while any(one.engine.has_work for one in calls.replicas.values()):
        await asyncio.sleep(0.002)


def assert_idle(calls: LocalCalls) -> None:
    """Every gauge of every engine is zero, and every block is free."""
    for one in calls.replicas.values():
        one.engine.check()
        snapshot = one.engine.snapshot("", 0)
        assert (snapshot.running, snapshot.waiting, snapshot.swapped) == (0, 0, 0)
        assert snapshot.blocks_free == snapshot.blocks_total
        assert snapshot.host_blocks_free == snapshot.host_blocks_total


def alone(one: Request, **engine: Any) -> list[list[int]]:
    """The tokens of each choice when nothing else runs and nobody is in between."""
    config = engine_config(**engine)
    core, worker = Engine(config), ScriptedWorker(config)
    core.add(one, 0)
    found: list[list[int]] = [[] for _ in range(one.sampling.n)]
    while (plan := core.schedule(0)) is not None:
        for chunk in core.commit(plan, worker.execute(plan), 0):
            found[chunk.choice] += chunk.tokens
    return found
