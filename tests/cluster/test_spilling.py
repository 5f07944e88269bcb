"""More is lent than Ray's store has memory for: it goes to disk and comes back as it was."""

from __future__ import annotations

import asyncio
import gc
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from kit.fabric_server import eventually
from ray._private.internal_api import memory_summary

from fabric.cluster.kv_ends import ObjectStore, OwnEnds
from fabric.cluster.loans import RUN_TOKENS, Lending, Loans
from fabric.cluster.porter import Porter
from fabric.core.configs import EngineConfig
from fabric.core.engine.borrowing import KvWish
from fabric.core.engine.engine import Engine
from fabric.core.engine.plan import Sample, StepResult
from fabric.core.prefix import Hasher, chain_all, root
from fabric.core.request import Request, SamplingParams
from fabric.core.traffic.fetching import Fetch
from fabric.kernels.program import KvLayout
from fabric.worker.kv_transfer import Part, Staging

MIB = 1 << 20
STORE_BYTES = 80 * MIB  # hardly more than the least that Ray takes
PAGE = 16
LAYOUT = KvLayout(dtype="bfloat16", packing="plain", layers=30, kv_heads=8, head_dim=64, page=PAGE)
PART = Part(layers=(0, 30), heads=(0, 8), all_layers=30, all_heads=8)
BLOCKS = RUN_TOKENS // PAGE
RUN_BYTES = BLOCKS * LAYOUT.block_bytes()  # 15 MiB
PROMPTS = 12  # together more than twice of what the store has memory for ...
KEPT = 8  # ... and so are those that the shelf has room for


@pytest.fixture
def own_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Ray of this test's own with a small store, and its folder: of a short name, for sockets."""
    for name, value in (
        ("RAY_AUTH_MODE", "disabled"),
        ("RAY_USAGE_STATS_ENABLED", "0"),
        ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0"),
        # A busy machine is no broken one.
        ("RAY_raylet_start_wait_time_s", "120"),
        ("RAY_gcs_server_port_wait_time_s", "120"),
        ("RAY_agent_register_timeout_ms", "120000"),
        ("RAY_worker_register_timeout_seconds", "120"),
        ("RAY_health_check_timeout_ms", "60000"),
    ):
        monkeypatch.setenv(name, value)
    with tempfile.TemporaryDirectory(prefix="s-", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=1,
            include_dashboard=False,
            object_store_memory=STORE_BYTES,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=folder,
            _node_ip_address="127.0.0.1",
        )
        yield Path(folder)
        ray.shutdown()


def prompt(number: int) -> tuple[int, ...]:
    """One run and a token."""
    return (number, *range(1, RUN_TOKENS), 5)


def digests(number: int) -> tuple[bytes, ...]:
    return tuple(chain_all(root("", None, ""), prompt(number), PAGE, Hasher())[:BLOCKS])


class Side:
    """A replica without HTTP and model: what a worker would compute is put into its pool."""

    def __init__(self, blocks: int, sibling: Any = None) -> None:
        self.engine = Engine(EngineConfig(num_blocks=blocks, block_size=PAGE, context_limit=512))
        self.pool = torch.zeros((blocks, LAYOUT.block_bytes()), dtype=torch.uint8)
        self.staging = Staging(LAYOUT, PART)
        ends = OwnEnds(self.staging, ObjectStore())
        self.porter = Porter(ends, self.ask)
        lending = Lending(
            store_bytes=KEPT * RUN_BYTES,
            block_size=PAGE,
            kv_token_bytes=RUN_BYTES // RUN_TOKENS,
        )
        self.loans = Loans(lending, self.porter, ends, self.ask, sibling)

    async def ask(self, verb: Callable[[Engine], Any]) -> Any:
        outcome = verb(self.engine)
        self.step()
        return outcome

    def step(self) -> None:
        plan = self.engine.schedule(0)
        if plan is not None:
            self.staging.copy(plan.copies, self.pool)
            result = StepResult(plan_id=plan.plan_id, samples=(Sample(token=7),) * len(plan.steps))
            self.engine.commit(plan, result, 0)
        self.engine.check()

    def compute(self, number: int) -> None:
        """As a prefill would, with something in it that no other block has."""
        pool = self.engine._scheduler.pool
        blocks = pool.allocate(BLOCKS)
        assert blocks is not None
        for block, digest in zip(blocks, digests(number), strict=True):
            self.pool[block] = content(number, digest)
            pool.publish(block, digest)
        pool.release(blocks)

    def forget(self) -> None:
        """Other prompts take all of its blocks."""
        pool = self.engine._scheduler.pool
        blocks = pool.allocate(pool.free)
        assert blocks is not None
        pool.release(blocks)
        self.pool.zero_()

    async def borrow(self, number: int) -> int:
        """Tokens of it that came, as they were there."""
        before = self.porter.counts.get("loan_tokens", 0)
        name = f"r{number}"
        request = Request(
            request_id=name,
            prompt=prompt(number),
            sampling=SamplingParams(max_tokens=1),
            arrival=0,
        )
        fetch = Fetch(holder_id="holder", tokens=RUN_TOKENS, patience_ns=60 * 10**9)
        command = self.loans.borrow(request, fetch, "d")
        assert command.ask is not None and command.answer is not None
        self.engine.add(request, 0)
        command.answer(command.ask(self.engine))
        async with asyncio.timeout(90.0):
            while self.loans._tasks:
                await asyncio.sleep(0.005)
        while self.engine.has_work:
            self.step()
        came = int(self.porter.counts.get("loan_tokens", 0) - before)
        found = self.engine._scheduler.pool.match(digests(number)) if came else []
        assert len(found) == came // PAGE
        for block, digest in zip(found, digests(number), strict=False):
            assert torch.equal(self.pool[block], content(number, digest)), "other KV came back"
        return came


class Way:
    """To the holder."""

    def __init__(self, holder: Side) -> None:
        self.holder = holder

    async def lend(self, _: str, wish: KvWish) -> list[Any]:
        return await self.holder.loans.lend(wish)

    async def withdraw(self, _: str, wish: KvWish) -> None:
        self.holder.loans.withdraw(wish)


def content(number: int, digest: bytes) -> torch.Tensor:
    """Of a block: what it is made from is its name."""
    random = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big") + number)
    return torch.randint(256, (LAYOUT.block_bytes(),), dtype=torch.uint8, generator=random)


def in_store(what: str) -> int:
    """MiB that were "Spilled" or "Restored" until now."""
    address = ray.get_runtime_context().gcs_address
    found = re.search(rf"{what} (\d+) MiB", memory_summary(address, stats_only=True))
    return int(found[1]) if found else 0


def spill_files(folder: Path) -> int:
    return sum(one.stat().st_size for one in folder.rglob("ray_spilled_objects*/*"))


@pytest.mark.nightly
@pytest.mark.timeout(300)
async def test_what_the_store_has_no_memory_for_is_on_disk(own_ray: Path) -> None:
    holder = Side(PROMPTS * BLOCKS)
    for number in range(PROMPTS):
        holder.compute(number)
    borrower = Side(4 * BLOCKS, Way(holder))
    for number in range(PROMPTS):
        assert await borrower.borrow(number) == RUN_TOKENS
    assert holder.porter.counts["lent_tokens"] == PROMPTS * RUN_TOKENS
    holder.loans.shelf.check()
    assert len(holder.loans.shelf._kept) == KEPT
    assert KEPT * RUN_BYTES > STORE_BYTES
    assert in_store("Spilled") * MIB >= KEPT * RUN_BYTES - STORE_BYTES
    assert spill_files(own_ray), "nothing is on disk"

    holder.forget()
    borrower.forget()
    came = [await borrower.borrow(number) for number in range(PROMPTS)]
    assert came == [0] * (PROMPTS - KEPT) + [RUN_TOKENS] * KEPT, "the least recently used went"
    assert holder.porter.counts["lent_tokens_kept"] == KEPT * RUN_TOKENS
    assert borrower.porter.counts["loan_failed_missing"] == PROMPTS - KEPT
    assert in_store("Restored") * MIB >= KEPT * RUN_BYTES - STORE_BYTES
    assert not holder.staging.used and not borrower.staging.used

    holder.loans.close()
    gc.collect()
    await asyncio.to_thread(eventually, lambda: not spill_files(own_ray))
