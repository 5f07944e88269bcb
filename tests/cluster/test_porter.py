"""What a porter does with groups: real staging areas and a real engine, no worker in between."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from kit.local_pools import Memory

from fabric.cluster import porter
from fabric.cluster.kv_ends import OwnEnds, SlotOf
from fabric.cluster.porter import Porter
from fabric.core.configs import EngineConfig
from fabric.core.engine.engine import Engine
from fabric.core.engine.plan import BlockCopy, CopyKind, KvExport
from fabric.core.prefix import Hasher, chain_all, root
from fabric.core.request import Request, SamplingParams
from fabric.kernels.program import KvLayout
from fabric.worker.kv_transfer import Bytes, GroupHeader, Part, Staging, pack_group

PAGE, HEADS = 16, 2
REQUEST = Request(
    request_id="r", prompt=tuple(range(2 * PAGE)), sampling=SamplingParams(max_tokens=8), arrival=0
)


def staging(*heads: int) -> Staging:
    """Of a worker with one layer and these KV heads."""
    layout = KvLayout(
        dtype="float32",
        packing="plain",
        layers=1,
        kv_heads=len(heads),
        head_dim=8,
        page=PAGE,
    )
    part = Part(layers=(0, 1), heads=(heads[0], heads[-1] + 1), all_layers=1, all_heads=HEADS)
    return Staging(layout, part)


def export(index: int = 0) -> KvExport:
    """One block of the prompt."""
    salt = root("", None, "")
    return KvExport(
        request_id="r",
        epoch=1,
        first=index * PAGE,
        end=(index + 1) * PAGE,
        last=index == 1,
        slot=index,
        blocks=1,
        salt=salt,
        digest=chain_all(salt, REQUEST.prompt, PAGE, Hasher())[index],
    )


def group(index: int, *heads: int) -> Bytes:
    """What a worker with these heads sends of block `index`."""
    side = staging(*heads)
    rows = [torch.zeros(side.layout.block_bytes(), dtype=torch.uint8)]
    return pack_group(export(index), rows, side.layout, side.part)


class Receiver:
    """The decode side: a porter, its engine and its worker's staging area."""

    def __init__(self, ends: Callable[[Staging, Memory], OwnEnds] = OwnEnds) -> None:
        self.memory = Memory()
        self.staging = staging(*range(HEADS))
        self.engine = Engine(EngineConfig(num_blocks=64, block_size=PAGE))
        self.porter = Porter(ends(self.staging, self.memory), self.ask)

    async def ask(self, verb: Callable[[Engine], Any]) -> Any:
        return verb(self.engine)

    async def land(self, *groups: Bytes) -> bool:
        references = [self.memory.put(one) for one in groups]
        return await self.porter.land("r", references)


async def test_workers_that_share_heads_send_the_same() -> None:
    one = Receiver()
    await one.porter.reserve(REQUEST, 1, "d")
    for index in range(2):
        assert await one.land(*(group(index, head) for head in (0, 0, 1, 1)))
    assert one.porter.counts["runs_landed"] == 2
    assert one.engine.add(REQUEST, 0)
    plan = one.engine.schedule(0)
    assert plan is not None
    one.staging.copy(plan.copies, torch.zeros((64, one.staging.layout.block_bytes())).byte())
    assert not one.staging.used


class Slow(OwnEnds):
    """It stops before it puts a group into its slots, until it is let go."""

    def __init__(self, staging: Staging, memory: Memory) -> None:
        super().__init__(staging, memory)
        self.inside, self.go = threading.Event(), threading.Event()

    def arrive(self, reference: Any, slot_of: SlotOf) -> GroupHeader:
        def slowly(header: GroupHeader) -> int:
            slot = slot_of(header)
            self.inside.set()
            assert self.go.wait(10.0)
            return slot

        return super().arrive(reference, slowly)


async def test_who_leaves_while_a_group_is_staged_leaves_no_rows() -> None:
    ends: list[Slow] = []

    def made(staging: Staging, memory: Memory) -> Slow:
        ends.append(Slow(staging, memory))
        return ends[0]

    one = Receiver(made)
    await one.porter.reserve(REQUEST, 1, "d")
    landing = asyncio.ensure_future(one.land(group(0, 0)))
    await asyncio.to_thread(ends[0].inside.wait, 10.0)
    await one.porter.give_up("r")
    await one.porter.reserve(REQUEST, 1, "d")  # the name comes again meanwhile
    ends[0].go.set()
    assert not await landing
    assert not one.staging.used, "rows are left"
    assert await one.land(group(0, 0), group(0, 1))
    assert one.porter.counts["runs_landed"] == 1
    await one.porter.give_up("r")


class Targets:
    """Decode replicas of which "dead" never answers."""

    def __init__(self) -> None:
        self.landed: list[str] = []
        self.given_up: list[str] = []

    async def __call__(self, replica_id: str, request_id: str, _: Sequence[Any]) -> bool:
        if replica_id == "dead":
            await asyncio.sleep(3600)
        self.landed.append(request_id)
        return True

    async def give_up(self, _replica_id: str, request_id: str, _reason: str) -> None:
        self.given_up.append(request_id)


class Sender:
    """The prefill side: a porter and its worker's staging area."""

    def __init__(self) -> None:
        self.targets = Targets()
        self.staging = staging(0)
        self.blocks = torch.zeros((1, self.staging.layout.block_bytes()), dtype=torch.uint8)
        self.porter = Porter(OwnEnds(self.staging, Memory()), self.ask, self.targets)
        self._next = 0

    async def ask(self, _: Callable[[Engine], Any]) -> Any:
        raise AssertionError("nothing is asked of a prefill engine")

    def depart(self, name: str, *, last: bool = False) -> None:
        """A step has put a group of that request into the next slot."""
        slot, self._next = self._next, self._next + 1
        self.staging.copy([BlockCopy(kind=CopyKind.EXPORT, source=0, target=slot)], self.blocks)
        self.porter.depart([replace(export(), request_id=name, slot=slot, last=last)])

    async def until(self, met: Callable[[], bool]) -> None:
        async with asyncio.timeout(10.0):
            while not met():
                await asyncio.sleep(0.001)


async def test_a_dead_target_holds_up_nobody_and_little() -> None:
    one = Sender()
    for name in ("r0", "r1"):
        one.porter.send_to(name, "dead")
    one.porter.send_to("r2", "alive")
    for _ in range(500):
        one.depart("r0")
        one.depart("r1")
    await asyncio.sleep(0)
    assert one.staging.used <= porter.GROUPS_WAITING
    one.depart("r2", last=True)
    await one.until(lambda: one.targets.landed == ["r2"])
    await one.until(lambda: sorted(one.targets.given_up) == ["r0", "r1"])
    assert one.porter.counts["groups_dropped"] == 2, "what comes later is not wanted any more"
    one.porter.close()


async def test_after_a_failure_no_more_of_a_request_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(porter, "LAND_TIMEOUT_S", 0.01)
    one = Sender()
    one.porter.send_to("r", "dead")
    for _ in range(20):
        one.depart("r")
    one.depart("r", last=True)
    await one.until(lambda: not one.porter._tasks)
    assert one.targets.given_up == ["r"], "told once"
    assert one.porter.counts["groups_failed"] <= porter.GROUPS_AT_ONCE
    assert not one.staging.used
    assert not one.porter._lanes


async def test_a_replica_is_done_with_a_prompt_when_its_last_group_has_gone() -> None:
    """Serve takes a replica down once its calls have ended."""
    one = Sender()
    one.porter.send_to("r", "alive")
    waiting = asyncio.ensure_future(one.porter.sent("r"))
    one.depart("r")
    await one.until(lambda: one.targets.landed == ["r"])
    assert not waiting.done(), "another one is to come"
    one.depart("r", last=True)
    await waiting
    assert one.targets.landed == ["r", "r"]
    await one.porter.sent("r")
    one.porter.send_to("left", "alive")
    waiting = asyncio.ensure_future(one.porter.sent("left"))
    await asyncio.sleep(0)
    one.porter.stop_sending("left")
    await waiting
    assert not one.porter._outgoing
