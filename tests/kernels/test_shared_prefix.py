"""Sequences that begin with the same blocks share attention tiles in C++: same bits as alone."""

from __future__ import annotations

import pytest
import torch
from kit.paged import PagedRun, Piece
from torch import Tensor

from fabric.kernels.cpu.build import supported_instruction_sets
from fabric.kernels.cpu.executor import CpuExecutor
from fabric.kernels.random_program import ProgramShape, random_program

ISAS = [isa.name for isa in supported_instruction_sets()]
pytestmark = pytest.mark.skipif(not ISAS, reason="this CPU has none of the instruction sets")

SHAPES = {
    "group of 3": ProgramShape(hidden=96, heads=9, kv_heads=3, head_dim=32),
    "group of 1": ProgramShape(hidden=64, heads=2, kv_heads=2, head_dim=24),
    "group of 8": ProgramShape(hidden=64, heads=8, kv_heads=1, head_dim=16),
    "window": ProgramShape(hidden=64, heads=4, kv_heads=2, head_dim=32, window=40),
}
PAGE = 16
BLOCKS = 12  # a sequence
# Leading blocks that each sequence shares with sequence 0, and tokens that it has by then. A chunk
# of keys is four blocks: some share none, some end in or right behind what is shared.
SHARED = [12, 12, 8, 8, 9, 4, 4, 5, 3, 1, 0, 0, 10, 11, 4, 8, 12, 12]
LENGTHS = [170, 183, 150, 129, 146, 70, 190, 81, 64, 40, 180, 33, 161, 177, 64, 128, 190, 189]


def text(row: int) -> list[int]:
    """Sequence `row`: sequence 0's tokens in the blocks that it shares, then its own."""
    generator = torch.Generator().manual_seed(100)
    common = torch.randint(0, 77, (BLOCKS * PAGE,), generator=generator).tolist()
    own = torch.randint(0, 77, (BLOCKS * PAGE,), generator=generator.manual_seed(row)).tolist()
    shared = SHARED[row] * PAGE
    return common[:shared] + own[shared:]


@pytest.fixture(scope="module", params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("count", [1, 2])
def test_decodes_that_share_blocks_get_what_each_gets_alone(
    name: str, count: int, isa: str
) -> None:
    executor = CpuExecutor(random_program(SHAPES[name]), threads=2, isa=isa)
    executor.poison()
    run = PagedRun(executor, page=PAGE, rows=len(SHARED), blocks_a_row=BLOCKS)
    alone: list[Tensor] = []
    last: list[Piece] = []
    for row, length in enumerate(LENGTHS):
        tokens = text(row)
        run.share_prefix(0, row, SHARED[row])
        # The first one computes the shared blocks whole; nobody writes them again.
        first = min(SHARED[row] * PAGE, length - count) if row else 0
        run.step(Piece(row=row, first=first, tokens=tokens[first : BLOCKS * PAGE]))
        piece = Piece(row=row, first=length - count, tokens=tokens[length - count : length])
        last.append(piece)
        alone.append(run.step(piece)[0])
    orders = [range(len(SHARED)), [7, 3, 16, 0, 12, 1, 9, 5, 14, 10], [0, 1], [2, 15, 3], [5, 0]]
    for order in orders:
        together = run.step(*(last[row] for row in order))
        for row, logits in zip(order, together, strict=True):
            assert torch.equal(logits, alone[row]), (list(order), row)
    # A prompt's chunk in the same step, which shares them too, does not take part.
    chunk = Piece(row=1, first=96, tokens=text(1)[96:128])
    together = run.step(chunk, *(last[row] for row in (0, 2, 5)))[1:]
    assert all(torch.equal(a, alone[row]) for a, row in zip(together, (0, 2, 5), strict=True))
