"""Paged attention in the interpreter: odd shapes, page edges, windows, fp8, splits; float64 beside.

`make test` runs a selection in which every value of the grid occurs; the nightly run the grid.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from kit.paged_attention import PagedCase, PagedShape, require_near

from fabric.kernels.launch import Launch
from fabric.kernels.paged_attention import (
    Decoding,
    Partials,
    paged_attention,
    paged_attention_reference,
    split_count,
)
from fabric.kernels.prefill_attention import (
    Prefill,
    prefill_attention,
    prefill_attention_reference,
    tiles,
)

F32, BF16 = torch.float32, torch.bfloat16
DECODE = Launch(sizes=(("SPLIT_KEYS", 128), ("BLOCK", 64)))
PREFILL = Launch(sizes=(("ROWS", 64), ("BLOCK", 64)))


def lengths(batch: int, longest: int) -> tuple[int, ...]:
    """`batch` lengths up to `longest`, around page and split edges where they fit."""
    edges = [longest, 1, 16, 17, 127, 128, 129, 33, 15, 64, 256, 31]
    return tuple(min(edges[index % len(edges)], longest) for index in range(batch))


def decode(shape: PagedShape, launch: Launch = DECODE, pad: bool = False) -> None:
    case = PagedCase(shape)
    q = case.queries(len(shape.lengths) + 1)
    heads = q.shape[1]
    seen = list(shape.lengths)
    if pad:
        seen[0] = 0
    tokens = list(range(len(seen), 0, -1))  # the first row of q decodes nothing
    decoding = Decoding(
        tokens_S=case.memory.copy(torch.tensor(tokens, dtype=torch.int32)),
        rows_S=case.memory.copy(torch.tensor(case.rows, dtype=torch.int32)),
        lengths_S=case.memory.copy(torch.tensor(seen, dtype=torch.int32)),
        longest=max(shape.lengths),
    )
    splits = split_count(decoding.longest, launch) + 1  # scratch for a longer step than this
    scratch = Partials(
        attended_SHNE=case.memory.empty((len(seen), heads, splits, shape.head_dim), F32),
        sums_SHN=case.memory.empty((len(seen), heads, splits), F32),
    )
    out = case.memory.empty((len(seen) + 1, heads, shape.head_dim), shape.dtype)
    paged_attention(q, case.kv, decoding, out=out, scratch=scratch, launch=launch)
    case.memory.check()
    reference = paged_attention_reference(q, case.kv, decoding)
    assert out[0].isnan().all()
    for index, (token, length) in enumerate(zip(tokens, seen, strict=True)):
        row = slice(token, token + 1)
        if length == 0:
            assert (out[row] == 0).all()  # padding
            continue
        exact, terms = case.exact(q[row], index, length - 1)
        require_near(out[row], exact, terms)
        require_near(reference[row], exact, terms)


DECODE_SHAPES = {
    "one key": PagedShape(lengths=(1,), dtype=F32),
    "float32, splits": PagedShape(lengths=lengths(7, 700), kv_heads=1, group=2, dtype=F32),
    "batch 33": PagedShape(lengths=lengths(33, 40), kv_heads=1, group=1),
    "long": PagedShape(lengths=(2000, 1, 1999), kv_heads=1, group=4),
    "head 96, page 32": PagedShape(lengths=(129, 31), head_dim=96, page=32, group=5),
    "head 128": PagedShape(lengths=(257,), head_dim=128, group=8, page=32),
    "head 256": PagedShape(lengths=(40, 300), head_dim=256, group=7, kv_heads=1),
    "group 6": PagedShape(lengths=(65, 16, 17), group=6, kv_heads=1),
    "window below a page": PagedShape(lengths=(1, 5, 16, 300), window=7, dtype=F32),
    "window over splits": PagedShape(lengths=(500, 128, 129), window=200, kv_heads=1, dtype=F32),
    "window past the start": PagedShape(lengths=(100, 260), window=150, kv_heads=1, dtype=F32),
    "fp8": PagedShape(lengths=(17, 200), fp8=True),
    "fp8, head 128, window": PagedShape(lengths=(300,), head_dim=128, window=140, fp8=True),
}


@pytest.mark.parametrize("name", DECODE_SHAPES)
def test_decode(name: str) -> None:
    decode(DECODE_SHAPES[name])


def test_decode_without_splits_and_with_padding() -> None:
    shape = PagedShape(lengths=(90, 130, 16), dtype=F32)
    decode(shape, Launch(sizes=(("SPLIT_KEYS", 256), ("BLOCK", 32))), pad=True)
    decode(shape, pad=True)


def test_a_row_of_decode_does_not_depend_on_its_batch() -> None:
    """Bit for bit: splits are counted from position 0, and joined in order."""
    case = PagedCase(PagedShape(lengths=(300, 700, 40), kv_heads=1))
    q = case.queries(3)

    def run(picked: list[int], longest: int) -> torch.Tensor:
        rows, lengths_ = [case.rows[i] for i in picked], [case.shape.lengths[i] for i in picked]
        decoding = Decoding(
            tokens_S=torch.arange(len(picked), dtype=torch.int32),
            rows_S=torch.tensor(rows, dtype=torch.int32),
            lengths_S=torch.tensor(lengths_, dtype=torch.int32),
            longest=longest,
        )
        splits = split_count(longest, DECODE)
        scratch = Partials(
            attended_SHNE=torch.full((len(picked), 3, splits, 64), torch.nan),
            sums_SHN=torch.full((len(picked), 3, splits), torch.nan),
        )
        out = torch.empty(len(picked), 3, 64, dtype=BF16)
        wide = q[picked].contiguous()
        paged_attention(wide, case.kv, decoding, out=out, scratch=scratch, launch=DECODE)
        return out

    together = run([0, 1, 2], 700)
    for index, length in enumerate(case.shape.lengths):
        assert torch.equal(run([index], length)[0], together[index])


def prefill(shape: PagedShape, counts: tuple[int, ...], launch: Launch = PREFILL) -> None:
    """`shape.lengths` are the lengths after the step; the last `counts` of each are new."""
    case = PagedCase(shape)
    q = case.queries(sum(counts))
    sequences, rows = tiles(counts, shape.group, launch.size("ROWS"))
    starts = [0, *itertools.accumulate(counts)]
    firsts = [length - count for length, count in zip(shape.lengths, counts, strict=True)]
    ints = (
        case.memory.copy(torch.tensor(values, dtype=torch.int32))
        for values in (starts[:-1], counts, firsts, case.rows, sequences, rows)
    )
    step = Prefill(
        starts_S=next(ints),
        counts_S=next(ints),
        first_S=next(ints),
        rows_S=next(ints),
        tile_sequences_N=next(ints),
        tile_rows_N=next(ints),
    )
    out = case.memory.empty(tuple(q.shape), shape.dtype)
    prefill_attention(q, case.kv, step, out=out, launch=launch)
    case.memory.check()
    reference = prefill_attention_reference(q, case.kv, step)
    for index, count in enumerate(counts):
        own = slice(starts[index], starts[index] + count)
        exact, terms = case.exact(q[own], index, firsts[index])
        require_near(out[own], exact, terms)
        require_near(reference[own], exact, terms)


PREFILL_SHAPES = {
    "one token": (PagedShape(lengths=(1,), dtype=F32), (1,)),
    "a prompt": (PagedShape(lengths=(75,), dtype=F32), (75,)),
    "chunks, prefix hits, decode": (
        PagedShape(lengths=(75, 80, 33, 200), dtype=F32, kv_heads=1),
        (75, 48, 1, 3),
    ),
    "batch 33": (PagedShape(lengths=lengths(33, 40), kv_heads=1, group=1), (1,) * 33),
    "a long prefix": (PagedShape(lengths=(1000, 17), kv_heads=1, group=4), (9, 17)),
    "head 96, page 32, group 5": (
        PagedShape(lengths=(70, 33), head_dim=96, page=32, group=5, kv_heads=1),
        (40, 33),
    ),
    "head 128, group 8": (PagedShape(lengths=(40,), head_dim=128, group=8, page=32), (25,)),
    "head 256, group 7": (
        PagedShape(lengths=(30, 20), head_dim=256, group=7, kv_heads=1),
        (11, 20),
    ),
    "window below a page": (PagedShape(lengths=(75, 40), window=5, dtype=F32), (75, 9)),
    "window over tiles": (PagedShape(lengths=(200,), window=70, dtype=F32, kv_heads=1), (60,)),
    "fp8": (PagedShape(lengths=(65, 17), fp8=True, group=2), (30, 17)),
}


@pytest.mark.parametrize("name", PREFILL_SHAPES)
def test_prefill(name: str) -> None:
    prefill(*PREFILL_SHAPES[name])


def test_every_row_is_in_one_tile() -> None:
    counts = (1, 75, 22, 3)
    for group, rows in ((1, 64), (3, 64), (5, 16)):
        listed = sorted(zip(*tiles(counts, group, rows), strict=True))
        expected = [(s, r) for s, n in enumerate(counts) for r in range(0, n * group, rows)]
        assert listed == expected


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", [16, 32])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_the_grid(head_dim: int, page: int) -> None:
    """Every group with every length; batch, window and fp8 go round, each with a period of its own,
    so that all of their pairs occur too. About five minutes each."""
    batches = itertools.cycle((1, 2, 3, 7, 33))
    windows, narrow = itertools.cycle((None, 100, None)), itertools.cycle((False, True))
    for group, longest in itertools.product(range(1, 9), (1, 15, 16, 17, 33, 129, 520, 2000)):
        shape = PagedShape(
            lengths=lengths(next(batches), longest)[: max(4000 // longest, 1)],
            kv_heads=1 + group % 2,
            group=group,
            head_dim=head_dim,
            page=page,
            window=next(windows),
            fp8=next(narrow),
        )
        decode(shape)
        prefill(shape, tuple(min(length, 1 + 7 * group) for length in shape.lengths))
