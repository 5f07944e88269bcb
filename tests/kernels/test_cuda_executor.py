"""The CUDA executor's whole program in triton's interpreter, against torch in float32.

What is left for a GPU to show is speed, streams and the capture itself: here a captured step is one
that is simply run again, from the same buffers, filled up to the same sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.paged import PagedRun, Piece
from kit.programs import widened
from torch import Tensor

from fabric.kernels.cuda.decode_graphs import SIZES, DecodeGraphs
from fabric.kernels.cuda.executor import CudaExecutor
from fabric.kernels.cuda.step_inputs import StepInputs, StepPacker
from fabric.kernels.executor import create_gpu_executor
from fabric.kernels.launch_table import tuned_path
from fabric.kernels.program import Enter, Executor, KvPool, Linear, Program, StepBatch
from fabric.kernels.random_program import ProgramShape, random_program
from fabric.kernels.torch_executor import TorchExecutor

CPU = torch.device("cpu")
SHAPES = {
    "llama": ProgramShape(layers=2, intermediate=64),
    "qwen2": ProgramShape(layers=1, heads=6, kv_heads=1, head_dim=32, bias=True, tied=True),
    "qwen3, window": ProgramShape(
        layers=1, heads=3, kv_heads=3, head_dim=96, head_norms=True, window=24
    ),
}


class Replays:
    """Takes the place of graph capture: remembers the work, and counts captures and replays."""

    def __init__(self) -> None:
        self.captured = 0
        self.replayed = 0

    def __call__(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.captured += 1

        def replay() -> Tensor:
            self.replayed += 1
            return work()

        return replay


def cuda_executor(program: Program, replays: Replays | None = None) -> CudaExecutor:
    return CudaExecutor(program, CPU, target="sm_90", capture=replays or Replays())


def tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 160, (count,), generator=generator).tolist()


STEPS = (
    # Prompts, one of a single token; a chunk beside a prefix hit and a decoding sequence; then
    # decoding only, of three sequences and of two.
    (Piece(row=0, first=0, tokens=tokens(37, 1)), Piece(row=1, first=0, tokens=tokens(1, 2))),
    (
        Piece(row=1, first=1, tokens=tokens(1, 3)),
        Piece(row=2, first=32, tokens=tokens(5, 4)),
        Piece(row=0, first=37, tokens=tokens(3, 5)),
    ),
    tuple(Piece(row=r, first=f, tokens=[r + 7]) for r, f in ((2, 37), (0, 40), (1, 2))),
    tuple(Piece(row=r, first=f, tokens=[r + 9]) for r, f in ((0, 41), (2, 38))),
)


def run(executor: CudaExecutor | TorchExecutor, page: int) -> list[Tensor]:
    paged = PagedRun(executor, page=page)
    paged.share_prefix(0, 2, 32 // page)
    return [torch.cat(paged.step(*pieces)) for pieces in STEPS]


@pytest.mark.parametrize(("name", "page"), [("llama", 16), ("qwen2", 32), ("qwen3, window", 16)])
def test_logits_are_as_near_to_float32_as_torch_in_bfloat16(name: str, page: int) -> None:
    """Both round the same values, but torch also rounds the sums of a softmax's weights elsewhere:
    1.5 times its error leaves room for chance in one maximum of a few thousand."""
    program = random_program(SHAPES[name])
    replays = Replays()
    exact = run(TorchExecutor(widened(program)), page)
    rounded = run(TorchExecutor(program), page)
    got = run(cuda_executor(program, replays), page)
    allowed = 1.5 * max((a - b).abs().max() for a, b in zip(rounded, exact, strict=True))
    for mine, theirs in zip(got, exact, strict=True):
        assert mine.isfinite().all()
        assert (mine - theirs).abs().max() <= allowed
    # Three sequences are filled up to four; two have a size of their own.
    assert (replays.captured, replays.replayed) == (2, 2)


def test_a_replay_reads_new_tokens_and_the_same_buffers() -> None:
    """A sequence decoded token by token through one captured step gets the logits of its prompt."""
    program = random_program(ProgramShape(layers=1))
    replays = Replays()
    text = tokens(6, 8)
    prompt = Piece(row=0, first=0, tokens=text)
    whole = torch.cat(PagedRun(TorchExecutor(widened(program))).step(prompt))
    paged = PagedRun(cuda_executor(program, replays))
    single = [
        paged.step(Piece(row=0, first=position, tokens=[token]))[0]
        for position, token in enumerate(text)
    ]
    # bfloat16 activations through one layer: 2^-8 of logits of magnitude 4, a few times over.
    assert (torch.cat(single) - whole).abs().max() < 0.1
    assert (replays.captured, replays.replayed) == (1, len(text))


def test_padding_writes_no_page() -> None:
    program = random_program(ProgramShape(layers=1))
    paged = PagedRun(cuda_executor(program))
    before = paged.pool.blocks_XB.clone()
    pieces = [Piece(row=row, first=0, tokens=[row]) for row in range(3)]
    paged.step(*pieces)
    touched = (paged.pool.blocks_XB != before).any(dim=1).nonzero().flatten().tolist()
    assert sorted(touched) == sorted(paged.tables[:3, 0].tolist())


def test_logits_of_some_rows_only() -> None:
    program = random_program(ProgramShape(layers=1))
    executor, reference = cuda_executor(program), TorchExecutor(program)
    ints = {
        "token_ids_T": tokens(9, 3),
        "query_starts_S1": [0, 5, 9],
        "first_positions_S": [0, 0],
        "table_rows_S": [1, 0],
        "logit_rows_R": [4, 8],
    }
    results = []
    for each in (executor, reference):
        paged = PagedRun(each)
        columns = {name: torch.tensor(v, dtype=torch.int32) for name, v in ints.items()}
        batch = StepBatch(block_tables_XB=paged.tables, **columns)
        results.append(each.run(batch, paged.pool))
    assert results[0].shape == results[1].shape == (2, 160)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0.1)


def test_what_is_no_graph() -> None:
    """More sequences than the largest size, a chunk, or fewer logits than sequences."""
    layout = cuda_executor(random_program(ProgramShape())).kv_layout(16)
    pool = KvPool(layout=layout, blocks_XB=torch.zeros(4, layout.block_bytes(), dtype=torch.uint8))
    packer = StepPacker(page=16, group=2, tile_rows=64)
    shapes: list[int] = []

    def forward(inputs: StepInputs, _: KvPool) -> Tensor:
        shapes.append(len(inputs.token_ids_T))
        return torch.zeros(len(inputs.logit_rows_R), 7)

    graphs = DecodeGraphs(forward, packer, pool, capture=lambda work: work, longest_min=64)

    def step(counts: list[int], rows: int) -> Tensor | None:
        starts = torch.tensor([0, *counts]).cumsum(0)
        columns = {
            "token_ids_T": torch.zeros(int(starts[-1])),
            "query_starts_S1": starts,
            "first_positions_S": torch.zeros(len(counts)),
            "table_rows_S": torch.zeros(len(counts)),
            "logit_rows_R": torch.arange(rows),
            "block_tables_XB": torch.zeros(1, 8),
        }
        return graphs.run(StepBatch(**{k: v.to(torch.int32) for k, v in columns.items()}))

    assert step([1, 3], 2) is None
    assert step([1, 1], 1) is None
    assert step([1] * (SIZES[-1] + 1), SIZES[-1] + 1) is None
    assert not shapes
    for count, size in ((1, 1), (3, 4), (SIZES[-1], SIZES[-1])):
        logits = step([1] * count, count)
        assert logits is not None and len(logits) == count and shapes[-1] == size


def test_torch_takes_over_where_triton_cannot_and_says_so(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def created(program: Program, target: str = "sm_90") -> Executor:
        return create_gpu_executor(program, CPU, tmp_path, target=target)

    program = random_program(ProgramShape())
    assert isinstance(created(program), CudaExecutor)
    assert not caplog.records
    path = tuned_path(tmp_path, "sm_80")
    path.write_text("not what fabric tune writes")
    for target in ("sm_80", "sm_61"):
        assert isinstance(created(program, target), TorchExecutor)
    assert "is no table of launches" in caplog.text and "known to run on sm_61" in caplog.text


def test_what_it_cannot_run_is_named() -> None:
    program = random_program(ProgramShape())
    op = next(op for op in program.ops if isinstance(op, Linear))
    narrow: Any = "int4"
    for strange, reason in (
        (widened(program), "not contiguous bfloat16"),
        (replace(program, kv_heads=3), "multiple"),
        (replace(program, head_dim=512), "up to 256"),
        (replace(program, ops=(Enter(), *program.ops)), "op 0 is Enter"),
        (replace(program, ops=(replace(op, weight_NK=narrow),)), "no plain tensor"),
    ):
        with pytest.raises(ValueError, match=reason):
            CudaExecutor(strange, CPU, target="sm_90")
