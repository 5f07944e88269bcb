"""The worker's parts on their own: its memory of sequences, its pools, its refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kit.cpp import without_cpp
from kit.fabric_server import eventually
from kit.local_engine import LocalEngine, ask

from fabric.core.engine.plan import (
    BlockCopy,
    CopyKind,
    Previous,
    SequenceStart,
    SequenceStep,
    StepPlan,
)
from fabric.core.errors import ConfigError
from fabric.core.request import SamplingParams
from fabric.kernels.device import (
    _cgroup_free_bytes,
    allocate_host_pool,
    allocate_pool,
    choose_device,
)
from fabric.kernels.program import KvLayout
from fabric.worker import runner as runner_module
from fabric.worker.kv_cache import KvCache
from fabric.worker.kv_transfer import Part
from fabric.worker.memory import PoolWish, size_pools
from fabric.worker.worker import Worker

MIB = 1 << 20
GREEDY = SamplingParams(max_tokens=4, temperature=0.0)


def start(sequence: int, tokens: tuple[int, ...], **changes: object) -> SequenceStart:
    record = SequenceStart(
        sequence=sequence,
        epoch=0,
        choice=0,
        tokens=tokens,
        prompt_length=len(tokens),
        blocks=(sequence,),
        sampling=GREEDY,
    )
    return replace(record, **changes)  # type: ignore[arg-type]


def step(sequence: int, first: int, count: int, **changes: object) -> SequenceStep:
    record = SequenceStep(sequence=sequence, epoch=0, start=first, count=count, samples=True)
    return replace(record, **changes)  # type: ignore[arg-type]


@pytest.fixture
def worker(tiny_worker: Worker) -> Worker:
    tiny_worker.allocate(
        num_blocks=8, num_host_blocks=4, block_size=16, max_sequences=2, context_limit=48
    )
    return tiny_worker


def execute(worker: Worker, plan_id: int, *steps: SequenceStep, **more: object) -> list[int | None]:
    plan = StepPlan(plan_id=plan_id, steps=steps, **more)  # type: ignore[arg-type]
    return [sample.token for sample in worker.execute(plan).samples]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (step(7, 4, 1, tokens=(9,)), "not known"),
        (step(1, 4, 1, tokens=(9,), epoch=1), "another epoch"),
        (step(1, 4, 1, tokens=(9,), samples=False), "samples iff"),
        (step(1, 4, 1), "samples iff"),
        (step(1, 4, 13, tokens=tuple(range(13))), "no block"),
        (step(1, 4, 1, tokens=(9,), blocks=(1, 2, 3)), "outgrew"),
    ],
)
def test_a_plan_that_does_not_continue_what_is_known(
    worker: Worker, wrong: SequenceStep, message: str
) -> None:
    execute(worker, 0, step(1, 0, 4), starts=(start(1, (5, 6, 7, 8)),))
    with pytest.raises(AssertionError, match=message):
        execute(worker, 1, wrong)


def test_a_start_under_the_same_epoch_is_refused(worker: Worker) -> None:
    execute(worker, 0, step(1, 0, 4), starts=(start(1, (5, 6, 7, 8)),))
    with pytest.raises(AssertionError, match="starts again"):
        execute(worker, 1, step(1, 0, 4), starts=(start(1, (5, 6, 7, 8)),))
    execute(worker, 2, step(1, 0, 4, epoch=1), starts=(start(1, (5, 6, 7, 8), epoch=1),))


def test_more_sequences_than_places(worker: Worker) -> None:
    """Preempted ones are still known for a while; the table grows."""
    prompts = {sequence: (5 + sequence, 6, 7) for sequence in range(5)}
    starts = tuple(start(sequence, tokens) for sequence, tokens in prompts.items())
    together = execute(worker, 0, *(step(s, 0, 3) for s in prompts), starts=starts)
    execute(worker, 1, drops=tuple(prompts))
    alone = [
        execute(worker, 2 + s, step(s, 0, 3), starts=(start(s, t),))[0] for s, t in prompts.items()
    ]
    assert together == alone


def test_an_input_token_may_be_a_result(worker: Worker) -> None:
    """`Previous`: one plan ahead, without waiting for the first one's token."""
    prompt = (5, 6, 7, 8)
    (first,) = execute(worker, 0, step(1, 0, 4), starts=(start(1, prompt),))
    assert first is not None
    (known,) = execute(worker, 1, step(1, 4, 1, tokens=(first,)))
    execute(worker, 2, step(2, 0, 4), starts=(start(2, prompt),))
    (referred,) = execute(worker, 3, step(2, 4, 1, tokens=(Previous(plan_id=2, row=0),)))
    assert referred == known


def test_copies_run_in_order() -> None:
    """Swap out, overwrite, swap in elsewhere: bytes travel whole."""
    layout = KvLayout(dtype="bfloat16", packing="plain", layers=2, kv_heads=1, head_dim=8, page=16)
    part = Part(layers=(0, 1), heads=(0, 1), all_layers=1, all_heads=1)
    device = torch.device("cpu")
    cache = KvCache(layout, num_blocks=4, num_host_blocks=2, device=device, part=part)
    device_XB, host_XB = cache.pool.blocks_XB, cache.host_XB
    assert device_XB.shape == (4, layout.block_bytes())
    generator = torch.Generator().manual_seed(1)
    before_XB = torch.randint(0, 256, device_XB.shape, dtype=torch.uint8, generator=generator)
    device_XB.copy_(before_XB)
    cache.copy(
        [
            BlockCopy(kind=CopyKind.SWAP_OUT, source=0, target=1),
            BlockCopy(kind=CopyKind.DEVICE, source=3, target=0),
            BlockCopy(kind=CopyKind.DEVICE, source=0, target=2),
            BlockCopy(kind=CopyKind.SWAP_IN, source=1, target=3),
        ]
    )
    assert torch.equal(device_XB, before_XB[[3, 1, 3, 0]])
    assert torch.equal(host_XB[1], before_XB[0])
    assert cache.device_bytes == 4 * layout.block_bytes()
    assert cache.host_bytes == 2 * layout.block_bytes()


def test_memory_report(worker: Worker) -> None:
    block_bytes = 2 * 2 * 2 * 16 * 16 * 4  # K and V, layers, kv heads, head_dim, page, float32
    report = worker.memory()
    assert report.kv_pool_bytes == 8 * block_bytes
    assert report.host_pool_bytes == 4 * block_bytes
    assert report.weight_bytes == 4 * worker.config.parameters()
    assert report.rope_bytes == 2 * worker.config.context_limit * 8 * 4


def test_position_tables_end_where_the_context_does(tiny_folder: Path) -> None:
    """A model that can do millions of positions would fill half a gigabyte with them."""
    short = Worker(tiny_folder, dtype="float32", device="cpu", context_limit=48)
    assert short.memory().rope_bytes == 2 * 48 * 8 * 4
    output = LocalEngine(short, context_limit=48).run(ask("r", [5] * 40, max_tokens=20))["r", 0]
    assert len(output.tokens) == 8


def test_warm_up_leaves_nothing_behind(tiny_worker: Worker) -> None:
    engine = LocalEngine(tiny_worker)
    before = engine.run(ask("r", [5, 6, 7]))["r", 0].tokens
    again = LocalEngine(tiny_worker)
    times = tiny_worker.warm_up()
    assert times.prefill_ns_per_token > 0 and times.swap_ns_per_block == 0, "no host pool"
    assert again.run(ask("r", [5, 6, 7]))["r", 0].tokens == before


@pytest.mark.parametrize(("num_blocks", "limit"), [(2, 16), (2, 48), (8, 48), (64, 1000)])
def test_warm_up_fits_into_small_pools(tiny_worker: Worker, num_blocks: int, limit: int) -> None:
    tiny_worker.allocate(
        num_blocks=num_blocks,
        num_host_blocks=3,
        block_size=16,
        max_sequences=1,
        context_limit=limit,
    )
    times = tiny_worker.warm_up()
    assert times.prefill_ns_per_token > 0 and times.swap_ns_per_block > 0


def test_pool_sizes() -> None:
    wish = PoolWish(
        block_size=16, max_sequences=4, context_limit=160, device_bytes=None, host_bytes=8 * MIB
    )

    def sizes(free: int, is_cpu: bool = True, **changes: object) -> tuple[int, int, int]:
        size = size_pools(
            replace(wish, **changes),  # type: ignore[arg-type]
            block_bytes=MIB,
            free_device_bytes=free * MIB,
            free_host_bytes=free * MIB,
            is_cpu=is_cpu,
        )
        return size.num_blocks, size.num_host_blocks, size.context_limit

    assert sizes(10_000) == (40, 8, 160), "never more than 4 sequences of 10 blocks can fill"
    assert sizes(10_000, max_sequences=1000)[0] == 1024, "1 GiB at most on the CPU"
    assert sizes(10_000, max_sequences=1000, is_cpu=False)[0] == 6000, "a share of a GPU"
    assert sizes(20) == (12, 4, 160), "a share of what is free, the host pool out of the rest"
    assert sizes(10) == (6, 2, 96), "the context shrinks to what fits"
    assert sizes(100, device_bytes=30 * MIB) == (30, 8, 160), "what was asked for"
    with pytest.raises(ValueError, match=r"only 100\.0 MiB of memory is free"):
        sizes(100, device_bytes=200 * MIB)
    with pytest.raises(ValueError, match="fewer than two blocks"):
        sizes(100, device_bytes=MIB)


def test_a_container_limits_memory(tmp_path: Path) -> None:
    """cgroup v2, then v1; without a limit neither says anything."""
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("100\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 30\n")
    assert list(_cgroup_free_bytes(tmp_path)) == []
    (tmp_path / "memory.max").write_text("1000\n")
    assert list(_cgroup_free_bytes(tmp_path)) == [1000 - 100 + 30]
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("700\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("200\n")
    (tmp_path / "memory" / "memory.stat").write_text("total_inactive_file 50\n")
    assert list(_cgroup_free_bytes(tmp_path)) == [930, 550]


def test_devices(tiny_folder: Path) -> None:
    assert choose_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        assert choose_device("auto").type == "cpu"
        with pytest.raises(ValueError, match="no CUDA device"):
            choose_device("cuda")
        with pytest.raises(ConfigError, match=r"model\.device: .* CUDA"):
            Worker(tiny_folder, device="cuda")
    pool = allocate_pool(3, 100, torch.device("cpu"))
    assert pool.shape == (3, 100) and not pool.any()


def test_a_host_pool_takes_memory_where_it_is_used() -> None:
    device, before = torch.device("cpu"), _resident_bytes()
    host_XB = allocate_host_pool(64, MIB, device)
    assert _resident_bytes() - before < 8 * MIB
    host_XB[5] = 7
    assert _resident_bytes() - before < 16 * MIB
    assert not host_XB[0].any() and int(host_XB[5].min()) == 7
    pool_XB = allocate_pool(64, MIB, device)
    assert _resident_bytes() - before > 64 * MIB
    assert not pool_XB.any()


def test_a_pool_may_be_used_while_it_gets_its_memory() -> None:
    before = _resident_bytes()
    pool_XB = allocate_pool(160, MIB, torch.device("cpu"), soon=True)
    for block in range(0, 160, 7):
        pool_XB[block] = block
    eventually(lambda: _resident_bytes() - before > 158 * MIB)
    for block in range(160):
        assert bool((pool_XB[block] == (0 if block % 7 else block)).all())


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_missing_cpp_path_fails_where_it_could_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception):
        without_cpp("no compiler")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="must run here"):
        without_cpp("no compiler")


def test_weights_that_do_not_fit_are_refused_with_both_numbers(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "free_bytes", lambda _device: 100_000)
    with pytest.raises(
        ConfigError, match=r"weights need [\d,]+ bytes .* 100,000 bytes .* are free"
    ):
        Worker(tiny_folder, device="cpu")
