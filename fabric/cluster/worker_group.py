"""`WorkerGroup`: the workers of a sharded replica, each a Ray actor in its placement group.

    bundle 0          bundle 1                 one bundle for each TP group of a stage
    replica actor
    worker 0, 1       worker 2, 3              (tp 2, pp 2; a bundle is never split over nodes)

    submit(plan) ──> every worker, over its channel;  receive() <── the one that draws the tokens

A worker that dies, or whose step raises, ends the whole group: the others can't go on without it.
`run`'s end is how that is heard of, by Ray or by the channel, whichever is faster.
"""

from __future__ import annotations

import os
import signal
import threading
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fabric.cluster.bundles import Bundles
from fabric.cluster.kv_ends import GroupEnds, KvEnds, ObjectStore
from fabric.cluster.reports import ShardReport
from fabric.cluster.worker_actor import ModelNumbers, SliceReport, Whereabouts, WorkerActor
from fabric.cluster.workers import StepOverdue
from fabric.core.engine.plan import StepPlan, StepResult
from fabric.core.errors import FabricError, Unavailable
from fabric.core.shard import Place
from fabric.worker.channel import Channel, ChannelClosed
from fabric.worker.links import GroupAddress
from fabric.worker.member import MemberSettings
from fabric.worker.memory import MemoryReport, PoolSizes, PoolWish
from fabric.worker.plan_codec import decode_result, encode_plan
from fabric.worker.plan_ring import RingChannel, rings_work_here
from fabric.worker.plan_socket import Doorman
from fabric.worker.warm_up import SWAP_BLOCKS, WarmUpTimes, warm_up

START_TIMEOUT_S = 120.0
LOAD_TIMEOUT_S = 1800.0
CONNECT_TIMEOUT_S = 60.0
PLAN_TIMEOUT_S = 60.0
WARM_UP_STEP_S = 60.0
REASON_TIMEOUT_S = 5.0


class WorkerGroup:
    """Behaves as a `Worker` while it is loaded, and as `Executes` afterwards."""

    def __init__(self, bundles: Bundles) -> None:
        self.spec = bundles.spec
        self.plans_max = bundles.spec.pp
        self._where: list[Whereabouts] = []
        self._slices: list[SliceReport] = []
        self.memories: list[MemoryReport] = []
        self._places = [Place.of(self.spec, worker) for worker in range(self.spec.workers)]
        self._actors = [_start(bundles, place) for place in self._places]
        self._channels: list[Channel] = []
        self._ends: list[Future[Any]] = []
        self._under_way: deque[int] = deque()
        self._problem: str | None = None
        self._stopping = threading.Event()
        self._pools = (1, 0, 1, 1)  # blocks, host blocks, block size, context limit
        self._expert_loads: list[tuple[int, ...]] = [()] * self.spec.workers
        self._asked: list[Future[Any]] = []  # for newer ones

    # -- loading: the verbs of `Worker` ----------------------------------------------------------

    def load(self, settings: MemberSettings) -> None:
        """Every worker loads its slice, all at once. Raises what a worker raises (`ModelError`,
        `ConfigError`), `Unavailable` when one is lost."""
        self._where = self._ask("whereabouts", timeout_s=START_TIMEOUT_S)
        address = GroupAddress(
            name=f"fabric-{uuid.uuid4().hex[:16]}",
            nodes=tuple(one.node for one in self._where),
            hosts=tuple(one.host for one in self._where),
            store_port=self._where[0].free_port,
        )
        self._slices = self._ask("load", settings, address, timeout_s=LOAD_TIMEOUT_S)
        self.memories = [one.memory for one in self._slices]
        self._connect()

    @property
    def config(self) -> ModelNumbers:
        """The whole model's numbers."""
        return self._slices[0].config

    @property
    def description(self) -> str:
        """Which code runs, on how many workers."""
        spec = self.spec
        return f"{self._slices[0].description}; tp {spec.tp}, pp {spec.pp}, ep {spec.ep}"

    def pool_sizes(self, wish: PoolWish) -> PoolSizes:
        """The smallest pools of all workers: a block's number means the same on each."""
        nodes = [one.node for one in self._where]
        shared = replace(wish, sharers=max(nodes.count(node) for node in nodes))
        sizes: list[PoolSizes] = self._ask("pool_sizes", shared, timeout_s=START_TIMEOUT_S)
        return PoolSizes(
            num_blocks=min(one.num_blocks for one in sizes),
            num_host_blocks=min(one.num_host_blocks for one in sizes),
            context_limit=min(one.context_limit for one in sizes),
        )

    def allocate(
        self,
        *,
        num_blocks: int,
        num_host_blocks: int,
        block_size: int,
        max_sequences: int,
        context_limit: int,
    ) -> MemoryReport:
        """Every worker makes its part of each block."""
        sizes = PoolSizes(
            num_blocks=num_blocks, num_host_blocks=num_host_blocks, context_limit=context_limit
        )
        wish = PoolWish(
            block_size=block_size,
            max_sequences=max_sequences,
            context_limit=context_limit,
            device_bytes=None,
            host_bytes=0,
        )
        self._pools = (num_blocks, num_host_blocks, block_size, context_limit)
        self.memories = self._ask("allocate", wish, sizes, timeout_s=LOAD_TIMEOUT_S)
        return self.memory()

    def memory(self) -> MemoryReport:
        """Of all workers together."""
        return MemoryReport(
            weight_bytes=sum(one.weight_bytes for one in self.memories),
            rope_bytes=sum(one.rope_bytes for one in self.memories),
            kv_pool_bytes=sum(one.kv_pool_bytes for one in self.memories),
            host_pool_bytes=sum(one.host_pool_bytes for one in self.memories),
        )

    def warm_up(self) -> WarmUpTimes:
        """The group's first steps, timed from here."""
        num_blocks, host_blocks, block_size, context_limit = self._pools
        return warm_up(
            self._execute,
            context_limit=min(context_limit, num_blocks * block_size),
            block_size=block_size,
            swap_blocks=min(SWAP_BLOCKS, num_blocks, host_blocks),
        )

    # -- running: `Executes` ---------------------------------------------------------------------

    def submit(self, plan: StepPlan) -> None:
        """Hand a plan to every worker."""
        data = encode_plan(plan)
        try:
            for channel in self._channels:
                channel.send(data, PLAN_TIMEOUT_S)
        except ChannelClosed:
            raise Unavailable(self._reason()) from None
        self._under_way.append(plan.plan_id)

    def receive(self, deadline_s: float) -> StepResult:
        """The oldest plan's result."""
        plan_id = self._under_way.popleft()
        try:
            result = decode_result(self._channels[self._sampler].receive(deadline_s))
        except ChannelClosed:
            raise Unavailable(self._reason()) from None
        except TimeoutError:
            self._fail(f"a worker hangs: plan {plan_id} has no result after {deadline_s:.0f} s")
            raise StepOverdue(self._reason()) from None
        assert result.plan_id == plan_id, "results come in the order of their plans"
        return result

    def kv_ends(self) -> KvEnds:
        """Where hand-overs take KV from, and put it."""
        return GroupEnds(self._actors, ObjectStore())

    def problem(self) -> str | None:
        """Which worker was lost, and why."""
        return self._problem

    def shards(self) -> tuple[ShardReport, ...]:
        """What each worker holds, and the newest count of rows that its experts got."""
        if all(future.done() for future in self._asked):
            for worker, future in enumerate(self._asked):
                if future.exception() is None:
                    self._expert_loads[worker] = future.result()
            self._asked = []
            if self._problem is None and self.config.has_experts:
                calls = [actor.expert_loads.remote() for actor in self._actors]
                self._asked = [call.future() for call in calls]
        return tuple(self._shard(worker) for worker in range(self.spec.workers))

    def stop(self) -> None:
        """End every worker. None of them outlives the replica's placement group either way."""
        self._stopping.set()
        for channel in self._channels:
            channel.close()
        own_node = ray.get_runtime_context().get_node_id()
        for where, end in zip(self._where, self._ends, strict=False):
            # One that stands still does not hear Ray. Whose call has ended may be another process.
            if where.node == own_node and not end.done():
                with suppress(ProcessLookupError):
                    os.kill(where.pid, signal.SIGKILL)
        for actor in self._actors:
            ray.kill(actor)

    # -- inside ----------------------------------------------------------------------------------

    @property
    def _sampler(self) -> int:
        """The worker that draws the tokens: the first of the last stage."""
        return self.spec.workers - self.spec.tp * self.spec.ep

    def _shard(self, worker: int) -> ShardReport:
        place, where, memory = self._places[worker], self._where[worker], self.memories[worker]
        return ShardReport(
            tp_rank=place.tp_rank,
            pp_rank=place.pp_rank,
            ep_rank=place.ep_rank,
            node=where.host,
            pid=where.pid,
            weight_bytes=memory.weight_bytes,
            kv_pool_bytes=memory.kv_pool_bytes,
            host_pool_bytes=memory.host_pool_bytes,
            holds=self._slices[worker].holds,
            expert_loads=self._expert_loads[worker],
        )

    def _execute(self, plan: StepPlan) -> StepResult:
        self.submit(plan)
        return self.receive(WARM_UP_STEP_S)

    def _connect(self) -> None:
        """Open a channel to every worker and set its loop going."""
        own_node = ray.get_runtime_context().get_node_id()
        host = ray.util.get_node_ip_address()
        for worker, where in enumerate(self._where):
            near = where.node == own_node and rings_work_here()
            end = RingChannel.create() if near else Doorman(host)
            self._ends.append(self._actors[worker].run.remote(end.address).future())
            try:
                come = end if isinstance(end, RingChannel) else end.welcome(CONNECT_TIMEOUT_S)
            except TimeoutError as error:
                raise Unavailable(f"{self._reason()} ({error})") from None
            self._channels.append(come)
        for worker, future in enumerate(self._ends):
            future.add_done_callback(self._watcher(worker))

    def _watcher(self, worker: int) -> Callable[[Future[Any]], None]:
        """Called when that worker's loop has ended, on a thread of Ray's."""

        def ended(future: Future[Any]) -> None:
            error = future.exception()
            place = self._places[worker]
            self._fail(
                f"worker tp {place.tp_rank} pp {place.pp_rank} ep {place.ep_rank} "
                f"(pid {self._where[worker].pid}) {'ended' if error is None else _told(error)}"
            )

        return ended

    def _fail(self, problem: str) -> None:
        """The first problem is the cause; what follows from it is not told."""
        if self._problem is None and not self._stopping.is_set():
            self._problem = problem
        for channel in self._channels:
            channel.close()

    def _reason(self) -> str:
        """Why a channel closed; Ray may take a moment longer to say."""
        for future in self._ends:
            if self._problem is None:
                try:
                    future.exception(REASON_TIMEOUT_S / len(self._ends))
                except FutureTimeout:
                    continue
        return self._problem or "a worker closed its channel"

    def _ask(self, method: str, *arguments: object, timeout_s: float) -> list[Any]:
        """Call all workers at once; their answers in order. The first error is raised."""
        calls = [getattr(actor, method).remote(*arguments) for actor in self._actors]
        waiting: Sequence[Any] = calls
        try:
            while waiting:  # whichever fails first: the others may be waiting for that one
                done, waiting = ray.wait(waiting, num_returns=1, timeout=timeout_s)
                if not done:
                    raise Unavailable(f"no answer to {method} from a worker in {timeout_s:.0f} s")
                ray.get(done)
            answers: list[Any] = ray.get(calls)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, FabricError | ValueError):
                raise cause from None
            raise Unavailable(f"a worker failed: {_told(error)}") from None
        except ray.exceptions.RayActorError as error:
            raise Unavailable(f"a worker was lost while loading: {_told(error)}") from None
        return answers


def _start(bundles: Bundles, place: Place) -> Any:
    """A worker actor in the replica's own placement group."""
    resources = dict(bundles.resources)
    return (
        ray.remote(WorkerActor)
        .options(
            num_cpus=resources.pop("CPU", 0),
            num_gpus=resources.pop("GPU", 0),
            resources=resources,
            max_restarts=0,
            max_concurrency=4,  # `run` takes one
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=ray.util.get_current_placement_group(),
                placement_group_bundle_index=bundles.of(place.worker),
            ),
        )
        .remote(place)
    )


def _told(error: BaseException) -> str:
    """An actor's end in one line."""
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0].strip() if lines else ''}"
