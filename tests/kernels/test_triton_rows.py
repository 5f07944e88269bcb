"""Kernels that work row by row, in the interpreter: against float64, between poisoned bands."""

from __future__ import annotations

import itertools

import pytest
import torch
from kit.guarded import Guarded
from torch import Tensor

from fabric.kernels.copier import runs
from fabric.kernels.copy_blocks import copy_blocks, copy_blocks_at_once, waves
from fabric.kernels.embedding import embedding, embedding_reference
from fabric.kernels.kv_write import kv_write, kv_write_reference
from fabric.kernels.launch import Launch
from fabric.kernels.linear import logits
from fabric.kernels.rms_norm import rms_norm, rms_norm_reference
from fabric.kernels.rope import rope, rope_reference
from fabric.kernels.silu_mul import silu_mul

# Rounding to nearest is wrong by half a unit in the last place; bfloat16 has 8 significant bits.
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
# What float32 adds before that: a few operations, and a sum of up to 2,048 terms done in a tree.
FLOAT32 = 16 * 2.0**-24


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(got: Tensor, exact: Tensor, roundings: int = 1) -> None:
    """Within `roundings` roundings to the result's dtype of the float64 value."""
    assert got.isfinite().all()
    allowed = roundings * ROUNDOFF[got.dtype] * 1.01 + FLOAT32
    assert ((got.double() - exact).abs() <= allowed * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "width", "rows"), [(1, 576, 1), (7, 96, 4), (33, 2000, 2)])
def test_rms_norm(tokens: int, width: int, rows: int, dtype: torch.dtype) -> None:
    memory = Guarded()
    x = memory.copy(normal(tokens, width, dtype=dtype))
    weight = memory.copy(normal(width, dtype=dtype, seed=1))
    out = memory.empty((tokens, width), dtype)
    rms_norm(x, weight, 1e-5, out=out, launch=Launch(sizes=(("ROWS", rows),)))
    memory.check()
    wide = x.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    near(out, exact, roundings=2)  # the normed value and its product with the weight
    # The same order of roundings as the reference: equal but where the sum's order tips one over.
    assert (out == rms_norm_reference(x, weight, 1e-5)).double().mean() > 0.99 or dtype.itemsize > 2


@pytest.mark.parametrize(("tokens", "width"), [(1, 96), (7, 576)])
def test_rms_norm_adds_the_residual_first(tokens: int, width: int) -> None:
    memory = Guarded()
    before, delta = normal(tokens, width), memory.copy(normal(tokens, width, seed=2))
    x, weight = memory.copy(before), memory.copy(normal(width, seed=1))
    out = memory.empty((tokens, width), torch.bfloat16)
    launch = Launch(sizes=(("ROWS", 2),))
    rms_norm(x, weight, 1e-5, out=out, delta_TK=delta, launch=launch)
    memory.check()
    assert torch.equal(x, before + delta)
    wide = x.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    near(out, exact, roundings=2)


def test_rms_norm_of_heads_in_place_leaves_their_neighbours() -> None:
    """As q and k are normed inside a row that holds q, k and v."""
    memory = Guarded()
    heads, head_dim = 3, 96
    before = normal(5, 2 * heads * head_dim)
    qkv, weight = memory.copy(before), memory.copy(normal(head_dim, seed=1))
    q = qkv[:, : heads * head_dim].view(5, heads, head_dim)
    rms_norm(q, weight, 1e-6, out=q, launch=Launch(sizes=(("ROWS", 4),)))
    memory.check()
    expected = rms_norm_reference(before[:, : heads * head_dim].view(5, heads, -1), weight, 1e-6)
    near(q, expected.double())
    assert torch.equal(qkv[:, heads * head_dim :], before[:, heads * head_dim :])


@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim"), [(1, 3, 64), (2, 5, 96), (7, 1, 128), (33, 2, 256)]
)
def test_rope(tokens: int, heads: int, head_dim: int) -> None:
    memory = Guarded()
    before = normal(tokens, (heads + 1) * head_dim)
    angles = torch.rand(50, head_dim // 2, generator=torch.Generator().manual_seed(3)) * 6.3
    # As yarn has it, the tables carry an attention factor.
    cos, sin = memory.copy(angles.cos() * 1.2), memory.copy(angles.sin() * 1.2)
    positions = memory.copy((torch.arange(tokens) * 7 % 50).to(torch.int32))
    row = memory.copy(before)
    x = row[:, : heads * head_dim].view(tokens, heads, head_dim)
    rope(x, cos, sin, positions, launch=Launch(sizes=(("HEADS", 4),)))
    memory.check()
    picked = positions.long()
    turned = before[:, : heads * head_dim].view(x.shape)
    first, second = turned.double().chunk(2, dim=-1)
    c, s = cos[picked].double()[:, None], sin[picked].double()[:, None]
    exact = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
    # A difference of products: float32's error is relative to the terms, not to what is left.
    allowed = ROUNDOFF[torch.bfloat16] * exact.abs() + FLOAT32 * (first.abs().max() * 2)
    assert ((x.double() - exact).abs() <= allowed * 1.01).all()
    same = x == rope_reference(turned, cos[picked], sin[picked])
    assert same.double().mean() > 0.99
    assert torch.equal(row[:, heads * head_dim :], before[:, heads * head_dim :])


@pytest.mark.parametrize(("tokens", "width"), [(1, 96), (3, 1536), (33, 40)])
def test_silu_mul(tokens: int, width: int) -> None:
    memory = Guarded()
    x = memory.copy(normal(tokens, 2 * width) * 4)
    out = memory.empty((tokens, width), torch.bfloat16)
    silu_mul(x, out=out, launch=Launch(sizes=(("BLOCK", 512),)))
    memory.check()
    gate, up = x.double().chunk(2, dim=-1)
    near(out, gate / (1 + (-gate).exp()) * up)


@pytest.mark.parametrize("page", [16, 32])
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim"), [(1, 1, 64), (7, 3, 96), (33, 2, 128), (2, 5, 256)]
)
@pytest.mark.parametrize("fp8", [False, True])
def test_kv_write(tokens: int, heads: int, head_dim: int, page: int, fp8: bool) -> None:
    memory = Guarded()
    qkv = memory.copy(normal(tokens, (3 + 2 * heads) * head_dim) * 3)
    kv = qkv[:, 3 * head_dim :].view(tokens, 2, heads, head_dim)
    kv[0, 0, 0, 0] = 2000.0  # beyond fp8: it saturates
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    layers, blocks = 3, 6
    pool = memory.empty((blocks, layers, 2, heads, page, head_dim), dtype)
    expected = pool.clone()
    slots = torch.randperm(blocks * page, generator=torch.Generator().manual_seed(5))[:tokens]
    if tokens > 2:
        slots[2] = -1
    slots = memory.copy(slots.to(torch.int32))
    scales = memory.copy(torch.rand(2, heads) + 0.5) if fp8 else None
    kv_write(kv, pool[:, 1], slots, scales_KG=scales, launch=Launch(sizes=(("HEADS", 2),)))
    memory.check()
    for which in range(2):
        scale = scales[which] if scales is not None else None
        kv_write_reference(expected[:, 1, which], kv[:, which], slots, scale)
    # Every byte, so the poison too: nothing else of the pool was written.
    assert torch.equal(pool.view(torch.uint8), expected.view(torch.uint8))


def test_pages_and_scales_must_go_together() -> None:
    kv, pages = torch.zeros(1, 2, 1, 64), torch.zeros(1, 2, 1, 16, 64)
    slots = torch.zeros(1, dtype=torch.int32)
    launch = Launch(sizes=(("HEADS", 1),))
    with pytest.raises(ValueError, match="scales"):
        kv_write(kv, pages, slots, scales_KG=torch.ones(2, 1), launch=launch)
    with pytest.raises(ValueError, match="scales"):
        kv_write(kv, pages.to(torch.float8_e4m3fn), slots, launch=launch)


def test_copies_keep_their_order_where_it_matters() -> None:
    """Random pairs among few blocks: chains, cycles, targets written twice, a block onto itself."""
    generator = torch.Generator().manual_seed(0)
    for count in (0, 1, 2, 12):
        drawn = torch.randint(0, 6, (count, 2), generator=generator)
        pairs = [(source, target) for source, target in drawn.tolist()]
        content = torch.randint(0, 256, (6, 4104), dtype=torch.uint8, generator=generator)
        memory = Guarded()
        pool, other = memory.copy(content), memory.copy(content.flip(0))
        expected, expected_other = content.clone(), content.flip(0).clone()
        copy_blocks(expected, expected, pairs)
        copy_blocks(expected, expected_other, pairs)
        launch = Launch(sizes=(("BLOCK", 256),))
        copy_blocks_at_once(pool, pool, pairs, launch=launch)
        copy_blocks_at_once(pool, other, pairs, launch=launch)
        memory.check()
        assert torch.equal(pool, expected) and torch.equal(other, expected_other)
        assert list(itertools.chain(*waves(pairs))) == pairs


def test_neighbours_that_go_to_neighbours_are_one_copy() -> None:
    pairs = [(4, 9), (5, 10), (6, 11), (7, 3), (8, 4), (9, 6), (1, 1)]
    assert runs(pairs) == [(4, 7, 5), (7, 9, -4), (9, 10, -3), (1, 2, 0)]
    assert runs([]) == []


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_embedding_shards_add_up_to_the_embedding(shards: int) -> None:
    memory = Guarded()
    table = normal(77, 96)
    ids = memory.copy(torch.tensor([0, 76, 25, 26, 51, 25, 7], dtype=torch.int32))
    total, first = torch.zeros(7, 96, dtype=torch.bfloat16), 0
    for part in table.chunk(shards):
        out = memory.empty((7, 96), torch.bfloat16)
        launch = Launch(sizes=(("BLOCK", 64),))
        embedding(ids, memory.copy(part), out=out, first=first, launch=launch)
        assert torch.equal(out, embedding_reference(ids, part, first))
        total += out
        first += len(part)
    memory.check()
    assert torch.equal(total, table[ids.long()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_head_shards_write_their_columns_of_the_logits(
    shards: int, bias: bool, dtype: torch.dtype
) -> None:
    memory = Guarded()
    x, weight = memory.copy(normal(9, 200, dtype=dtype)), normal(77, 200, dtype=dtype, seed=1)
    bias_V = normal(77, dtype=dtype, seed=2) if bias else None
    rows = memory.copy(torch.tensor([8, 0, 3], dtype=torch.int32))
    out, first = memory.empty((3, 77), torch.float32), 0
    for part in weight.chunk(shards):
        last = first + len(part)
        logits(
            x,
            rows,
            memory.copy(part),
            bias_V=None if bias_V is None else memory.copy(bias_V[first:last]),
            out=out[:, first:last],
            launch=Launch(sizes=(("BLOCK_M", 16), ("BLOCK_N", 32), ("BLOCK_K", 64))),
        )
        first = last
    memory.check()
    picked = x[rows.long()].double()
    exact = picked @ weight.double().T + (0 if bias_V is None else bias_V.double())
    # 200 exact products summed in float32 (float32 inputs: each product rounds once more).
    allowed = 201 * 2**-24 * (picked.abs() @ weight.double().abs().T + 4)
    assert ((out - exact).abs() <= allowed).all()
