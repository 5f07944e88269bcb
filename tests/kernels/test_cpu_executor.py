"""The C++ executor, every instruction set of this machine: against torch in float32 and itself."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kit.paged import PagedRun, Piece
from kit.programs import widened
from torch import Tensor

from fabric.kernels.cpu.build import supported_instruction_sets
from fabric.kernels.cpu.executor import CpuExecutor
from fabric.kernels.cpu.support import unsupported_reason
from fabric.kernels.program import Embed, KvPool, Linear, Program, StepBatch
from fabric.kernels.random_program import ProgramShape, random_program
from fabric.kernels.torch_executor import TorchExecutor

ISAS = [isa.name for isa in supported_instruction_sets()]
pytestmark = pytest.mark.skipif(not ISAS, reason="this CPU has none of the instruction sets")

# Odd in every way that a model could be: inputs and outputs off 32, heads off 16 and off 32, groups
# beyond a tile's 16 rows, bias, head norms, windows shorter than a page and across pages.
SHAPES = {
    "llama": ProgramShape(),
    "tiny": ProgramShape(hidden=32, heads=4, kv_heads=4, head_dim=8, intermediate=40, vocab=77),
    "smollm": ProgramShape(hidden=576, heads=9, kv_heads=3, head_dim=64, intermediate=1536),
    "qwen2": ProgramShape(hidden=96, heads=6, kv_heads=1, head_dim=32, bias=True, tied=True),
    "qwen3": ProgramShape(heads=4, kv_heads=2, head_dim=128, head_norms=True),
    "mistral": ProgramShape(heads=4, kv_heads=1, head_dim=96, window=24),
    "window below a page": ProgramShape(heads=2, kv_heads=2, head_dim=24, window=5, bias=True),
    "head 80": ProgramShape(hidden=88, heads=3, kv_heads=3, head_dim=80, intermediate=72),
    "head 256": ProgramShape(heads=2, kv_heads=1, head_dim=256, head_norms=True, window=40),
    "one kv head for 20": ProgramShape(heads=20, kv_heads=1, head_dim=16, vocab=101, tied=True),
}


@pytest.fixture(scope="module", params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def tokens(shape: ProgramShape, count: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, shape.vocab, (count,), generator=generator).tolist()


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_as_near_to_float32_as_torch_in_bfloat16(name: str, isa: str) -> None:
    """Both round activations to bfloat16 between ops; C++ does so less often (a Linear with gate or
    residual rounds once). So its error against float32 on the same weights is of the same size: 1.5
    times torch's leaves room for chance in one maximum of a few thousand."""
    shape = SHAPES[name]
    program = random_program(shape)
    pieces = [
        Piece(row=0, first=0, tokens=tokens(shape, 75)),
        Piece(row=1, first=0, tokens=tokens(shape, 1, seed=2)),
        Piece(row=2, first=0, tokens=tokens(shape, 38, seed=3)),
    ]
    exact = torch.cat(PagedRun(TorchExecutor(widened(program))).step(*pieces))
    rounded = torch.cat(PagedRun(TorchExecutor(program)).step(*pieces))
    allowed = 1.5 * (rounded - exact).abs().max()
    for page, threads in ((16, 2), (32, 1), (48, 3)):
        executor = CpuExecutor(program, threads=threads, isa=isa)
        executor.poison()
        got = torch.cat(PagedRun(executor, page=page).step(*pieces))
        assert got.isfinite().all()
        assert (got - exact).abs().max() <= allowed


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 24), (40, 33), (96, 256), (576, 1000)])
@pytest.mark.parametrize("rows", [1, 2, 5, 13, 16, 17, 32, 33, 47, 300])
def test_a_product_is_exact_but_for_its_order(
    inputs: int, outputs: int, rows: int, isa: str
) -> None:
    """Embedding, then one matrix. Products of bfloat16 are exact in float32, so the error against
    float64 is that of adding K terms, at most K * 2^-24 times the sum of their magnitudes."""
    program = product_program(inputs, outputs)
    embed, linear = program.ops
    assert isinstance(embed, Embed)
    assert isinstance(linear, Linear)
    ids = tokens(ProgramShape(vocab=outputs), rows)
    executor = CpuExecutor(program, threads=2, isa=isa)
    executor.poison()
    (got,) = PagedRun(executor, blocks_a_row=32).step(Piece(row=0, first=0, tokens=ids))
    x, weight = embed.table_VD[ids].double(), linear.weight_NK.double()
    bound = inputs * 2.0**-24 * (x.abs() @ weight.abs().T)
    assert ((got - x @ weight.T).abs() <= bound).all()


def product_program(inputs: int, outputs: int) -> Program:
    shape = ProgramShape(hidden=inputs, vocab=outputs)
    program = random_program(shape)
    head = program.ops[-1]
    assert isinstance(head, Linear)
    return replace(program, ops=(program.ops[0], replace(head, norm_K=None)))


class TestBatchInvariance:
    """A token's logits are the same bits however its step came about."""

    LENGTH = 70

    @pytest.fixture(params=["llama", "mistral", "head 80", "smollm", "one kv head for 20"])
    def executor(self, request: pytest.FixtureRequest, isa: str) -> CpuExecutor:
        self.shape = SHAPES[request.param]
        executor = CpuExecutor(random_program(self.shape), threads=2, isa=isa)
        executor.poison()
        self.prompt = tokens(self.shape, self.LENGTH)
        (self.alone,) = PagedRun(executor).step(Piece(row=0, first=0, tokens=self.prompt))
        return executor

    @pytest.mark.parametrize("chunk", [1, 3, 7, 16, 33, 69])
    def test_in_chunks(self, executor: CpuExecutor, chunk: int) -> None:
        run = PagedRun(executor)
        parts: list[Tensor] = []
        for first in range(0, self.LENGTH, chunk):
            part = self.prompt[first : first + chunk]
            parts += run.step(Piece(row=0, first=first, tokens=part))
        assert torch.equal(torch.cat(parts), self.alone)

    @pytest.mark.parametrize("others", [6, 31])
    def test_in_a_batch(self, executor: CpuExecutor, others: int) -> None:
        """Decode steps of one sequence among others that prefill and decode at other positions."""
        run = PagedRun(executor, rows=others + 1)
        start = self.LENGTH - 8
        run.step(Piece(row=0, first=0, tokens=self.prompt[:start]))
        for at in range(start, self.LENGTH):
            step = at - start
            pieces = [
                Piece(row=row, first=step * 2, tokens=tokens(self.shape, 2, seed=row))
                for row in range(1, others + 1)
            ]
            pieces.insert(others // 2, Piece(row=0, first=at, tokens=[self.prompt[at]]))
            got = run.step(*pieces)[others // 2]
            assert torch.equal(got[0], self.alone[at])

    def test_on_another_number_of_threads(self, executor: CpuExecutor, isa: str) -> None:
        single = CpuExecutor(random_program(self.shape), threads=1, isa=isa)
        (got,) = PagedRun(single).step(Piece(row=0, first=0, tokens=self.prompt))
        assert torch.equal(got, self.alone)

    def test_after_a_copy_of_its_blocks(self, executor: CpuExecutor) -> None:
        """Copy-on-write, swap and hand-over move raw bytes of whole blocks."""
        run = PagedRun(executor)
        run.step(Piece(row=0, first=0, tokens=self.prompt[:50]))
        for source, target in zip(run.tables[0].tolist(), run.tables[1].tolist(), strict=True):
            run.pool.blocks_XB[target] = run.pool.blocks_XB[source]
        (got,) = run.step(Piece(row=1, first=50, tokens=self.prompt[50:]))
        assert torch.equal(got, self.alone[50:])


def test_blocks_of_others_and_what_lies_around_the_pool_stay_as_they_are(isa: str) -> None:
    shape = SHAPES["tiny"]  # the last block's values end in a tile row that reaches past them
    executor = CpuExecutor(random_program(shape), threads=2, isa=isa)
    run = PagedRun(executor, rows=2, blocks_a_row=4)
    blocks, size = run.pool.blocks_XB.shape
    guarded = torch.full((blocks + 2, size), 0x5A, dtype=torch.uint8)
    run.pool = KvPool(layout=run.pool.layout, blocks_XB=guarded[1:-1])
    run.tables = torch.tensor([[7, 0, 3, 5], [1, 2, 4, 6]], dtype=torch.int32)
    run.step(Piece(row=0, first=0, tokens=tokens(shape, 20)))
    run.step(Piece(row=0, first=20, tokens=tokens(shape, 9)))
    written = torch.zeros(blocks + 2, dtype=torch.bool)
    written[[8, 1]] = True  # blocks 7 and 0: positions 0 to 28
    assert (guarded[~written] == 0x5A).all()


def test_a_reused_block_does_not_leak(isa: str) -> None:
    """What an earlier owner left, NaN included, must not reach a later one."""
    shape = SHAPES["llama"]
    executor = CpuExecutor(random_program(shape), threads=2, isa=isa)
    piece = Piece(row=0, first=0, tokens=tokens(shape, 21))
    (expected,) = PagedRun(executor).step(piece)
    run = PagedRun(executor)
    run.step(Piece(row=0, first=0, tokens=tokens(shape, 60, seed=9)))
    (again,) = run.step(piece)
    assert torch.equal(again, expected)


def test_a_tied_embedding_is_kept_once(isa: str) -> None:
    shape = SHAPES["qwen2"]
    tied = CpuExecutor(random_program(shape), threads=1, isa=isa)
    untied = CpuExecutor(random_program(replace(shape, tied=False)), threads=1, isa=isa)
    assert untied.weight_bytes() - tied.weight_bytes() == shape.vocab * shape.hidden * 2


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"token_ids_T": [3, 77]}, "token id"),
        ({"token_ids_T": [-1, 3]}, "token id"),
        ({"first_positions_S": [511]}, "position"),
        ({"first_positions_S": [63]}, "longer than its block table"),
        ({"table_rows_S": [4]}, "table row"),
        ({"logit_rows_R": [2]}, "logit row"),
        ({"query_starts_S1": [0, 3]}, "query_starts"),
        ({"block_tables_XB": [[64, 0, 1, 2]] * 4}, "block is outside"),
    ],
)
def test_a_step_out_of_range_is_refused(changes: dict[str, list[int]], problem: str) -> None:
    executor = CpuExecutor(random_program(SHAPES["tiny"]), threads=1)
    run = PagedRun(executor, rows=4, blocks_a_row=4)
    fields = {
        "token_ids_T": [3, 4],
        "query_starts_S1": [0, 2],
        "first_positions_S": [0],
        "table_rows_S": [0],
        "block_tables_XB": run.tables.tolist(),
        "logit_rows_R": [1],
    } | changes
    batch = StepBatch(**{name: torch.tensor(v, dtype=torch.int32) for name, v in fields.items()})
    with pytest.raises(ValueError, match=problem):
        executor.run(batch, run.pool)


@pytest.mark.parametrize(
    ("window", "bad_page", "refused"),
    [
        (None, 0, True),
        (None, 2, True),
        (20, 0, False),
        (20, 1, True),
        (17, 1, False),
        (1, 2, False),
    ],
)
def test_blocks_that_are_read_are_checked(window: int | None, bad_page: int, refused: bool) -> None:
    """One token at position 48, the first of page 3; a window of 17 begins with page 2's first."""
    program = random_program(replace(SHAPES["tiny"], window=window))
    executor = CpuExecutor(program, threads=1)
    run = PagedRun(executor, rows=1, blocks_a_row=4)
    run.step(Piece(row=0, first=0, tokens=tokens(SHAPES["tiny"], 48)))
    run.tables[0, bad_page] = 1 << 24
    if refused:
        with pytest.raises(ValueError, match="block is outside"):
            run.step(Piece(row=0, first=48, tokens=[3]))
    else:
        (logits,) = run.step(Piece(row=0, first=48, tokens=[3]))
        assert logits.isfinite().all()


@contextmanager
def address_space_left(size_bytes: int) -> Iterator[None]:
    """Lets this process map no more than `size_bytes` on top of what it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + size_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_step_without_memory_is_refused_and_the_next_one_runs() -> None:
    """The activations of 64 tokens take more than 8 MB each in two buffers."""
    shape = ProgramShape(hidden=32, heads=2, kv_heads=2, head_dim=16, intermediate=65_536)
    executor = CpuExecutor(random_program(shape), threads=1)
    run = PagedRun(executor)
    piece = Piece(row=0, first=0, tokens=[1, 2, 3])
    with address_space_left(4 << 20), pytest.raises(ValueError, match="out of memory"):
        run.step(piece)
    (logits,) = run.step(piece)
    assert logits.isfinite().all()


def test_weights_without_memory_are_refused() -> None:
    """Packed weights begin with a mapping of 256 MB."""
    program = random_program(SHAPES["tiny"])
    CpuExecutor(program, threads=1)  # the library is loaded by now
    with address_space_left(64 << 20), pytest.raises(RuntimeError, match="out of memory"):
        CpuExecutor(program, threads=1)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (ProgramShape(head_dim=12), "head_dim 12"),
        (ProgramShape(head_dim=264), "head_dim 264"),
        (ProgramShape(heads=4, kv_heads=3), "not a multiple"),
    ],
)
def test_what_it_cannot_run_is_said(shape: ProgramShape, reason: str) -> None:
    program = random_program(shape)
    assert reason in (unsupported_reason(program) or "")
    with pytest.raises(ValueError, match=reason):
        CpuExecutor(program, threads=1)


def test_float32_is_for_torch() -> None:
    reason = unsupported_reason(random_program(ProgramShape(), dtype=torch.float32))
    assert reason is not None
    assert "float32" in reason


@pytest.mark.parametrize("page", [8, 24, 144])
def test_a_page_that_is_no_multiple_of_a_tile_is_refused(page: int) -> None:
    with pytest.raises(ValueError, match="page"):
        CpuExecutor(random_program(ProgramShape()), threads=1).kv_layout(page)
