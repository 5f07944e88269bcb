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

from fabric.kernels.cpu.support import unsupported_reason
from fabric.kernels.cuda.decode_graphs import SIZES, DecodeGraphs
from fabric.kernels.cuda.executor import CudaExecutor
from fabric.kernels.cuda.step_inputs import StepInputs, StepPacker
from fabric.kernels.executor import create_gpu_executor
from fabric.kernels.launch_table import tuned_path
from fabric.kernels.program import Attend, Buffer, Executor, KvPool, Linear, Program, StepBatch
from fabric.kernels.quantized import (
    Activations,
    QuantizedWeight,
    Scheme,
    WeightFormat,
    expand,
    quantize_weight,
)
from fabric.kernels.quantized_program import SCHEMES, quantize_program
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


def test_fp8_pages_with_scales_by_head() -> None:
    """The yardstick is torch in bfloat16 from torch in float32, both with the same pages: what fp8
    costs is in all three. Without the scales, or with another head's, keys would be off by 4."""
    program = random_program(replace(SHAPES["llama"], layers=1))
    scales = torch.tensor([[0.01, 0.04], [0.02, 0.005]])
    narrow = replace(
        program,
        fp8_pages=True,
        ops=tuple(
            replace(op, kv_scales_KG=scales) if isinstance(op, Attend) else op for op in program.ops
        ),
    )
    executor = cuda_executor(narrow)
    plain = cuda_executor(program).kv_layout(16)
    assert executor.kv_layout(16).block_bytes() * 2 == plain.block_bytes()
    wide = TorchExecutor(widened(narrow))
    assert wide.kv_layout(16).dtype == "float8_e4m3fn"
    exact, rounded, got = (run(each, 16) for each in (wide, TorchExecutor(narrow), executor))
    unrounded = run(TorchExecutor(widened(program)), 16)
    off = _apart(exact, unrounded)
    assert 0 < off < 0.2 * max(each.abs().max().item() for each in exact)
    # A key that bfloat16 moved over a border of e4m3 is off by 1/16: as much as fp8 costs itself.
    assert _apart(got, exact) <= 1.5 * max(_apart(rounded, exact), off)
    with pytest.raises(ValueError, match="no fp8 pages on sm_80"):
        CudaExecutor(narrow, CPU, target="sm_80")
    assert "fp8" in (unsupported_reason(narrow) or "")


def _apart(some: list[Tensor], others: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))


BLOCKS = Scheme(format=WeightFormat.FP8, activations=Activations.GROUP, rows=128, columns=128)


@pytest.mark.parametrize(
    "name", [pytest.param("fp8", marks=pytest.mark.nightly), "fp8 blocks", "int8_activations"]
)
def test_quantised_weights_are_multiplied_as_they_are(name: str) -> None:
    """The yardstick is again torch in bfloat16 from torch in float32, both of the same quantised
    weights and with the same rounding of activations. The head is plain in all of them."""
    scheme = {**SCHEMES, "fp8 blocks": BLOCKS}[name]
    shape = ProgramShape(layers=1, hidden=128, head_dim=32, intermediate=128, bias=True)
    program = with_weights(random_program(shape), scheme)
    executor = cuda_executor(program)
    form = "fp8" if name.startswith("fp8") else "int8"
    assert f"bfloat16 and {form} for sm_90" in executor.description
    plain = cuda_executor(random_program(shape))
    assert executor.weight_bytes() < 0.75 * plain.weight_bytes()
    exact, rounded = (
        torch.cat(run(TorchExecutor(each), 16)) for each in (widened(program), program)
    )
    got = torch.cat(run(executor, 16))
    assert got.isfinite().all()
    assert (got - exact).abs().max() <= 1.5 * (rounded - exact).abs().max()


def with_weights(program: Program, scheme: Scheme) -> Program:
    """All matrices but the head's."""

    def quantised(op: Linear) -> Linear:
        assert isinstance(op.weight_NK, Tensor)
        return replace(op, weight_NK=quantize_weight(op.weight_NK, scheme))

    ops = [
        quantised(op) if isinstance(op, Linear) and op.target is not Buffer.LOGITS else op
        for op in program.ops
    ]
    return replace(program, ops=tuple(ops))


def test_what_has_no_kernel_is_expanded_when_it_is_loaded() -> None:
    """int4 everywhere, fp8 in the head and on an Ampere: the plain program of the same numbers."""
    program = random_program(ProgramShape(layers=1))
    piece = Piece(row=0, first=0, tokens=tokens(5, 1))
    for name, target in (("int4", "sm_90"), ("int8", "sm_90"), ("fp8", "sm_80")):
        quantised = quantize_program(program, name)
        ops = [
            replace(op, weight_NK=expand(op.weight_NK, torch.bfloat16))
            if isinstance(op, Linear) and isinstance(op.weight_NK, QuantizedWeight)
            else op
            for op in quantised.ops
        ]
        logits = []
        for each in (quantised, replace(quantised, ops=tuple(ops))):
            executor = CudaExecutor(each, CPU, target=target, capture=Replays())
            assert executor.description.startswith("Triton bfloat16 for")
            logits += PagedRun(executor).step(piece)
        assert torch.equal(*logits)
    head = cuda_executor(quantize_program(program, "fp8"))
    (got,) = PagedRun(head).step(piece)
    assert got.isfinite().all()


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
        (replace(program, ops=(replace(op, weight_NK=narrow),)), "no plain tensor"),
    ):
        with pytest.raises(ValueError, match=reason):
            CudaExecutor(strange, CPU, target="sm_90")
