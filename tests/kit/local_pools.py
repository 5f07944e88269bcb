"""A prefill and a decode replica in this process, with a store and a network that can be hurt.

The workers are scripted; groups, staging, checksums, porters, engines and the dispatcher are real.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from kit.local_replica import LocalCalls, LocalReplica, SlowWorker, dispatcher, engine_config
from kit.scripted_worker import ScriptedWorker

from fabric.cluster.dispatcher import Dispatcher
from fabric.cluster.engine_replica import EngineReplica
from fabric.cluster.kv_ends import SlotOf
from fabric.cluster.loading import EngineParts
from fabric.cluster.loans import Lending
from fabric.cluster.workers import InProcess
from fabric.core.configs import EngineConfig, FetchConfig, PairingConfig, RouterConfig
from fabric.core.engine.borrowing import KvWish
from fabric.core.engine.engine import Engine
from fabric.core.engine.plan import KvExport
from fabric.kernels.program import KvLayout
from fabric.worker.kv_transfer import (
    Bytes,
    GroupError,
    GroupHeader,
    Part,
    open_group,
    pack_group,
)

PART = Part(layers=(0, 1), heads=(0, 1), all_layers=1, all_heads=1)
WAIT_S = 2.0


class Reference:
    """To an object of `Memory`, which is gone when nobody has one any more."""


class Memory:
    """What the object store is to the real ones."""

    def __init__(self) -> None:
        self.objects: weakref.WeakKeyDictionary[Reference, Bytes] = weakref.WeakKeyDictionary()

    def put(self, group: Bytes) -> Reference:
        reference = Reference()
        self.objects[reference] = group.copy()
        return reference

    def get(self, reference: Reference) -> Bytes:
        if reference not in self.objects:
            raise GroupError("lost")
        return self.objects[reference]


class ScriptedEnds:
    """`KvEnds` of a scripted worker: a fingerprint is one head's K (and V) of two elements."""

    def __init__(self, worker: ScriptedWorker, memory: Memory) -> None:
        self._worker = worker
        self._memory = memory
        self._layout = KvLayout(
            dtype="float32",
            packing="plain",
            layers=1,
            kv_heads=1,
            head_dim=2,
            page=worker.config.block_size,
        )
        self._lock = threading.Lock()

    def depart(self, export: KvExport) -> list[Any]:
        slots = range(export.slot, export.slot + export.blocks)
        deadline = time.monotonic() + 10.0
        while any(slot not in self._worker.staging for slot in slots):  # its step is under way
            if time.monotonic() > deadline:
                raise TimeoutError(f"slots {slots} were not filled in time")
            time.sleep(0.001)
        blocks = [self._worker.staging.pop(slot) for slot in slots]
        pages = [np.array([block, block], dtype=np.uint64) for block in blocks]
        rows = [torch.from_numpy(page.reshape(-1).view(np.uint8).copy()) for page in pages]
        return [self._memory.put(pack_group(export, rows, self._layout, PART))]

    def drop(self, export: KvExport) -> None:
        slots = range(export.slot, export.slot + export.blocks)
        self._worker.dropped.update(slots)  # first, lest one be filled between the two
        for slot in slots:
            if self._worker.staging.pop(slot, None) is not None:
                self._worker.dropped.discard(slot)

    def arrive(self, reference: Any, slot_of: SlotOf) -> GroupHeader:
        header, content = open_group(self._memory.get(reference))
        slot = slot_of(header)
        for index, block in enumerate(content):
            found = block.view(np.uint64)[: self._layout.page]
            self._worker.staging[slot + index] = [int(one) for one in found]
        return header

    def discard(self, slot: int, count: int) -> None:
        for index in range(count):
            self._worker.staging.pop(slot + index, None)


class Wire:
    """From the prefill to the decode replica. `harm`: what becomes of the groups on it."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.harm = "none"
        self.spared = 0  # so many groups more go through as they are
        self.carried = 0
        self.target: LocalReplica | None = None
        self._held: list[tuple[Any, asyncio.Future[Any]]] = []

    async def __call__(self, _: str, request_id: str, references: Sequence[Any]) -> bool:
        assert self.target is not None
        land = self.target.service.land
        (reference,) = references
        self.carried += 1
        harm = self.harm if self.carried > self.spared else "none"
        if harm == "corrupt":
            group = self.memory.objects[reference]
            group[len(group) // 2] ^= 4
        elif harm == "lose":
            del self.memory.objects[reference]
        elif harm == "drop":
            return True
        elif harm == "delay":
            await asyncio.sleep(WAIT_S)
        elif harm == "break":
            raise ConnectionError("the other end is gone")
        elif harm == "fail":
            raise ValueError("it could not be taken")
        elif harm == "swap":
            reference = await self._another(reference)
        wanted = await land(request_id, [reference])
        if harm == "twice":
            wanted = await land(request_id, [reference])
        return wanted

    async def give_up(self, _: str, request_id: str, reason: str) -> None:
        assert self.target is not None
        if self.harm == "break":
            raise ConnectionError("the other end is gone")
        await self.target.service.give_up(request_id, reason)

    async def _another(self, reference: Any) -> Any:
        """What another call brings; that one gets ours. After a while: our own."""
        if self._held:
            other, future = self._held.pop()
            future.set_result(reference)
            return other
        future = asyncio.get_running_loop().create_future()
        self._held.append((reference, future))
        try:
            return await asyncio.wait_for(future, WAIT_S)
        except TimeoutError:
            self._held = [one for one in self._held if one[1] is not future]
            return reference


class PooledReplica(LocalReplica):
    """One of a pool."""

    def __init__(
        self,
        kind: str,
        config: EngineConfig,
        step_s: float,
        memory: Memory,
        peer: Wire | Siblings | None,
        lending: Lending | None = None,
    ) -> None:
        self.engine = Engine(config)
        self.worker = SlowWorker(config, step_s)
        parts = EngineParts(
            engine=self.engine,
            workers=InProcess(self.worker.execute),
            executor="scripted",
            context_limit=config.context_limit,
            weight_bytes=1,
            kv_pool_bytes=2,
            host_pool_bytes=3,
            kv_ends=ScriptedEnds(self.worker.inner, memory),
            lending=lending,
        )
        pool = kind if lending is None else "mixed"
        self.service = EngineReplica(lambda: (kind[0], parts), None, pool, peer)


@asynccontextmanager
async def pools(
    *, step_s: float = 0.0005, **engine: Any
) -> AsyncIterator[tuple[Dispatcher, LocalCalls, Wire]]:
    """A dispatcher, "p" and "d"; whatever happened, both engines' books are right at the end, and
    neither slots nor objects are left."""
    memory = Memory()
    wire = Wire(memory)
    config = engine_config(**{"group_tokens": 8, "num_blocks": 128} | engine)

    prefill = PooledReplica("prefill", config, step_s, memory, wire)
    wire.target = PooledReplica("decode", config, step_s, memory, None)
    calls = LocalCalls("d0", prefill, wire.target)
    try:
        front = await dispatcher(calls, pairing=PairingConfig(min_prompt_tokens=16))
        while front._pairing is None or len(front._pairing.kinds) < 2:
            await asyncio.sleep(0.001)
        yield front, calls, wire
    finally:
        for one in calls.replicas.values():
            one.worker.hold = False
            one.stop()


def counts(calls: LocalCalls, name: str = "d") -> dict[str, float]:
    """What a replica's porter counts."""
    porter = calls.replicas[name].service.porter
    assert porter is not None
    return porter.counts


def fallbacks(calls: LocalCalls) -> dict[str, float]:
    """Why prompts were computed again."""
    found = counts(calls).items()
    return {name.removeprefix("fallback_"): n for name, n in found if name.startswith("fallback_")}


class Siblings:
    """What replicas of one pool say to each other. `harm`: what becomes of the groups that are
    lent."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.harm = "none"
        self.spared = 0  # so many runs more go through as they are
        self.lent = 0
        self.wishes: list[KvWish] = []
        self.replicas: dict[str, LocalReplica] = {}

    async def lend(self, replica_id: str, wish: KvWish) -> list[Any]:
        """As `calls.PoolPeer` does."""
        self.lent += 1
        self.wishes.append(wish)
        harm = self.harm if self.lent > self.spared else "none"
        if harm == "delay":
            await asyncio.sleep(WAIT_S)
        elif harm == "break":
            raise ConnectionError("the holder is gone")
        elif harm == "short":
            wish = replace(wish, digests=wish.digests[:-1])
        elif harm in ("again", "foreign"):  # another run, or another prompt's
            wish = next(one for one in self.wishes if (harm == "again") or one.first == wish.first)
        references = await self.replicas[replica_id].service.lend(wish)
        for reference in references:
            if harm == "corrupt":
                group = self.memory.objects[reference] = self.memory.objects[reference].copy()
                group[len(group) // 2] ^= 4
            elif harm == "lose":
                del self.memory.objects[reference]
        return [] if harm == "drop" else references

    async def withdraw(self, replica_id: str, wish: KvWish) -> None:
        """As `calls.PoolPeer` does."""
        await self.replicas[replica_id].service.withdraw(wish)


@asynccontextmanager
async def lenders(
    *,
    kinds: str = "ab",
    store_bytes: int = 1 << 20,
    fetch: FetchConfig | None = None,
    **engine: Any,
) -> AsyncIterator[tuple[Dispatcher, LocalCalls, Siblings]]:
    """A dispatcher and a replica for each of `kinds`, which get requests in turns and may fetch
    prefixes from each other. Whatever happened, the engines' books are right at the end."""
    memory = Memory()
    siblings = Siblings(memory)
    config = engine_config(**{"num_blocks": 128, "kv_token_bytes": 16} | engine)
    lending = Lending(store_bytes=store_bytes, block_size=config.block_size, kv_token_bytes=16)
    for kind in kinds:
        one = PooledReplica(kind, config, 0.0005, memory, siblings, lending)
        siblings.replicas[kind] = one
    calls = LocalCalls("d0", *siblings.replicas.values())
    router = RouterConfig(
        headroom_tokens=64,
        block_size=config.block_size,
        policy="round_robin",
        fetch=fetch or FetchConfig(latency_ns=0, bytes_per_s=10**9, min_tokens=8),
    )
    try:
        yield await dispatcher(calls, router=router), calls, siblings
    finally:
        for one in calls.replicas.values():
            one.worker.hold = False
            one.stop()
