"""What a porter does with groups: real staging areas and a real engine, no worker in between."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import torch
from kit.local_pools import Memory

from fabric.cluster.kv_ends import OwnEnds, SlotOf
from fabric.cluster.porter import Porter
from fabric.core.configs import EngineConfig
from fabric.core.engine.engine import Engine
from fabric.core.engine.plan import KvExport
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
