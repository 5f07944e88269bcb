"""Groups of KV: packings, shares of the model, damage; and a prompt that one worker computes and
another one goes on from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from kit.local_engine import LocalEngine, ask
from torch import Tensor

from fabric.core.engine.handover import Landing, arrival_of
from fabric.core.engine.plan import BlockCopy, CopyKind, KvExport
from fabric.kernels.program import KvLayout
from fabric.model.source import ModelFolder
from fabric.worker import kv_transfer
from fabric.worker.kv_transfer import GroupError, Part, Staging, open_group
from fabric.worker.worker import Worker

LAYERS, HEADS, WIDTH, PAGE = 4, 3, 8, 16
EXPORT = KvExport(
    request_id="r",
    epoch=3,
    first=32,
    end=32 + 2 * PAGE + 5,
    last=True,
    slot=7,
    blocks=3,
    salt=b"salt" * 4,
    digest=b"hash" * 4,
)
PROMPT = [504, 6376, 314, 260, 1345] * 15 + [504]  # four blocks and a tail


def staging(packing: str, *, layers: range = range(LAYERS), heads: range = range(HEADS)) -> Staging:
    layout = KvLayout(
        dtype="bfloat16",
        packing=packing,
        layers=len(layers),
        kv_heads=len(heads),
        head_dim=WIDTH,
        page=PAGE,
    )
    part = Part(
        layers=(layers.start, layers.stop),
        heads=(heads.start, heads.stop),
        all_layers=LAYERS,
        all_heads=HEADS,
    )
    return Staging(layout, part)


def pool_of(side: Staging, content_LKGTE: Tensor) -> Tensor:
    """Blocks of a worker that hold its part of `content`, element by element, packed as `KvLayout`
    says; the slots behind the last position hold rubbish."""
    layout, part = side.layout, side.part
    blocks = -(-content_LKGTE.shape[3] // PAGE)
    pool = torch.full((blocks, layout.block_bytes() // 2), 0x7FC1, dtype=torch.int16)
    pages = pool.view(blocks, layout.layers, 2, layout.kv_heads, PAGE * WIDTH)
    for position in range(content_LKGTE.shape[3]):
        block, slot = divmod(position, PAGE)
        own = content_LKGTE[slice(*part.layers), :, slice(*part.heads), position]
        for element in range(WIDTH):
            k_at = v_at = slot * WIDTH + element
            if layout.packing == "vnni":
                k_at = (element // 2 * PAGE + slot) * 2 + element % 2
                v_at = (slot // 2 * WIDTH + element) * 2 + slot % 2
            pages[block, :, 0, :, k_at] = own[:, 0, :, element]
            pages[block, :, 1, :, v_at] = own[:, 1, :, element]
    return pool.view(torch.uint8)


def send(source: Staging, pool_XB: Tensor) -> np.ndarray:
    source.copy(copies(CopyKind.EXPORT, len(pool_XB)), pool_XB)
    group = source.collect(EXPORT)
    assert source.used == 0
    return group


def copies(kind: CopyKind, count: int) -> list[BlockCopy]:
    """Between blocks 0, 1, ... and the slots from EXPORT.slot on."""
    pairs = [(index, EXPORT.slot + index) for index in range(count)]
    if kind is CopyKind.IMPORT:
        pairs = [(slot, block) for block, slot in pairs]
    return [BlockCopy(kind=kind, source=one, target=other) for one, other in pairs]


@pytest.fixture(scope="module")
def content() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    shape = (LAYERS, 2, HEADS, EXPORT.end - EXPORT.first, WIDTH)
    return torch.randint(-30000, 30000, shape, dtype=torch.int16, generator=generator)


SHARES = {
    "one to one": ([(range(4), range(3))], [(range(4), range(3))]),
    "tp 1 to tp 2": ([(range(4), range(3))], [(range(4), range(2)), (range(4), range(2, 3))]),
    "tp 2 to tp 1": ([(range(4), range(2)), (range(4), range(2, 3))], [(range(4), range(3))]),
    "tp 3 to pp 2": (
        [(range(4), range(h, h + 1)) for h in range(3)],
        [(range(2), range(3)), (range(2, 4), range(3))],
    ),
}


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("packings", [("vnni", "vnni"), ("vnni", "plain"), ("plain", "vnni")])
def test_every_element_arrives(content: Tensor, shares: str, packings: tuple[str, str]) -> None:
    senders, receivers = SHARES[shares]
    groups = []
    for layers, heads in senders:
        source = staging(packings[0], layers=layers, heads=heads)
        groups.append(send(source, pool_of(source, content)))
    for layers, heads in receivers:
        target = staging(packings[1], layers=layers, heads=heads)
        for group in groups:
            target.stage(EXPORT.slot, group)
        pool = torch.full((3, target.layout.block_bytes()), 255, dtype=torch.uint8)
        target.copy(copies(CopyKind.IMPORT, 3), pool)
        assert torch.equal(pool, pool_of(target, padded(content))), "unwritten positions are zero"
        assert target.used == 0


def padded(content: Tensor) -> Tensor:
    """As whole blocks."""
    zeros = torch.zeros((LAYERS, 2, HEADS, 3 * PAGE - content.shape[3], WIDTH))
    return torch.cat([content, zeros.to(torch.int16)], dim=3)


@pytest.mark.parametrize("packing", ["vnni", "plain"])
def test_memory_of_a_group_is_used_again(content: Tensor, packing: str) -> None:
    """And nothing of what was in it is seen."""
    source, target = staging(packing), staging(packing)
    first = send(source, pool_of(source, content)).copy()
    for _ in range(2):
        group = send(source, pool_of(source, content))
        assert np.array_equal(group, first)
        group[:] = 0xFF
        source.release(group)
    target.stage(0, first)


def test_the_header_says_what_it_is(content: Tensor) -> None:
    source = staging("vnni")
    header, found = open_group(send(source, pool_of(source, content)))
    assert (header.request_id, header.epoch) == ("r", 3)
    assert (header.first, header.end) == (EXPORT.first, EXPORT.end)
    assert (header.salt, header.digest) == (EXPORT.salt.hex(), EXPORT.digest.hex())
    assert header.layout() == source.layout
    wanted = pool_of(source, padded(content))
    assert np.array_equal(found, wanted.numpy()), "nothing beyond the last position"


def test_any_damage_is_seen(content: Tensor) -> None:
    source = staging("vnni")
    group = send(source, pool_of(source, content))
    target = staging("vnni")
    places = [*range(0, 400, 7), *range(400, len(group), 997), len(group) - 1]
    for place in places:
        damaged = group.copy()
        damaged[place] ^= 1 << place % 8
        with pytest.raises(GroupError, match="checksum"):
            target.stage(0, damaged)
    for length in (0, 3, 8, 100, len(group) - 1):
        with pytest.raises(GroupError, match="checksum"):
            target.stage(0, group[:length])
    assert target.used == 0


@pytest.mark.parametrize("other", ["page", "head_dim", "dtype", "model"])
def test_another_layout_is_refused(content: Tensor, other: str) -> None:
    source = staging("vnni")
    group = send(source, pool_of(source, content))
    target = staging("vnni")
    if other == "model":
        target.part = replace(target.part, all_layers=LAYERS + 1)
    else:
        value = {"page": 32, "head_dim": 16, "dtype": "float32"}[other]
        target.layout = replace(target.layout, **{other: value})
    with pytest.raises(GroupError, match="layout"):
        target.stage(0, group)
    assert target.used == 0


def test_discarded_slots_are_free(content: Tensor) -> None:
    source, target = staging("vnni"), staging("plain")
    target.stage(4, send(source, pool_of(source, content)))
    assert target.used == 3
    target.discard(4, 3)
    assert target.used == 0


def test_a_step_that_comes_too_late_leaves_no_rows(
    content: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_transfer, "COLLECT_TIMEOUT_S", 0.0)
    source = staging("vnni")
    pool = pool_of(source, content)
    source.copy(copies(CopyKind.EXPORT, 1), pool)  # and the others: later
    with pytest.raises(TimeoutError):
        source.collect(EXPORT)
    assert source.used == 0
    source.copy(copies(CopyKind.EXPORT, 3)[1:], pool)
    assert source.used == 0
    send(source, pool)


@pytest.fixture(scope="module")
def second_worker(demo_model: ModelFolder) -> Worker:
    return Worker(demo_model.path, device="cpu")


@pytest.mark.parametrize("chunk", [32, 1024])
def test_another_worker_goes_on(demo_worker: Worker, second_worker: Worker, chunk: int) -> None:
    request = ask("r", PROMPT, max_tokens=12)
    whole = LocalEngine(demo_worker).run(request)["r", 0].tokens
    prefill = LocalEngine(demo_worker, chunk_tokens=chunk, group_tokens=16)
    decode = LocalEngine(second_worker)
    decode.engine.reserve(request, 1)
    prefill.begin(ask("r", PROMPT, max_tokens=1))
    prefill.engine.export("r", 1)
    groups = 0
    while prefill.engine.has_work:
        prefill.step()
        for export in prefill.plans[-1].exports:
            groups += 1
            land(decode, export, prefill.worker.staging.collect(export))
    assert groups == (3 if chunk == 32 else 1)
    first = prefill.finish()["r", 0].tokens
    assert first == whole[:1]
    decode.begin(replace(request, generated=(tuple(first),)))
    assert decode.finish()["r", 0].tokens == whole[1:]
    computed = sum(step.count for plan in decode.plans for step in plan.steps)
    assert computed == 11, "nothing of the prompt was computed again"
    assert prefill.worker.staging.used == decode.worker.staging.used == 0


def land(decode: LocalEngine, export: KvExport, group: np.ndarray) -> None:
    decode.worker.staging.stage(export.first, group)  # any number that is used once
    arrival = arrival_of(export, export.request_id, export.first)
    assert decode.engine.landed(arrival) is Landing.LANDED
    if decode.engine.has_work:
        decode.step()
