"""Quantised weights: what the reference means, and the C++ path bit for bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from kit.paged import PagedRun, Piece
from kit.programs import widened

from fabric.kernels.cpu.build import supported_instruction_sets
from fabric.kernels.cpu.executor import CpuExecutor
from fabric.kernels.cpu.quantized_record import WIDE_LEVELS
from fabric.kernels.cpu.support import unsupported_reason
from fabric.kernels.executor import create_executor
from fabric.kernels.program import Embed, Linear, Program
from fabric.kernels.quantized import (
    FP8_MAX,
    Activations,
    QuantizedWeight,
    Scheme,
    WeightFormat,
    dequantize,
    expand,
    pack_int4,
    quantize_weight,
    stack_weights,
    unpack_int4,
)
from fabric.kernels.quantized_linear import (
    INT8_LEVELS,
    fake_fp8,
    group_width,
    integer_product_reference,
    quantized_linear_reference,
)
from fabric.kernels.quantized_program import SCHEMES, expand_program, quantize_program
from fabric.kernels.random_program import ProgramShape, random_program
from fabric.kernels.summation import ChunkedSum
from fabric.kernels.torch_executor import TorchExecutor

ISAS = [isa.name for isa in supported_instruction_sets()]
needs_cpp = pytest.mark.skipif(not ISAS, reason="this CPU has none of the instruction sets")

INTEGER_SCHEMES = {
    "int8 by int8": SCHEMES["int8_activations"],
    "int8": SCHEMES["int8"],
    "int8 in 64s": Scheme(format=WeightFormat.INT8, activations=Activations.KEPT, columns=64),
    "int4 by int8 in 32s, minimums": SCHEMES["int4"],
    "int4 in 64s, minimums": replace(SCHEMES["int4"], activations=Activations.KEPT, columns=64),
    "int4 by row, int8": Scheme(format=WeightFormat.INT4, activations=Activations.TOKEN),
    "int8 by int8 in 32s": Scheme(
        format=WeightFormat.INT8, activations=Activations.GROUP, columns=32
    ),
    "int4 in 128s": Scheme(format=WeightFormat.INT4, activations=Activations.KEPT, columns=128),
    "int4 by row": Scheme(format=WeightFormat.INT4, activations=Activations.KEPT),
    "int4 by int8": Scheme(format=WeightFormat.INT4, activations=Activations.TOKEN, columns=64),
}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", [*INTEGER_SCHEMES, "fp8", "fp8 blocks"])
def test_rounding_a_weight_errs_by_half_a_step_at_most(name: str) -> None:
    """An integer is off by half its scale; e4m3 (3 bits behind the point) by 1/16 of itself, or
    half its smallest step, 2^-9, near zero."""
    blocks = Scheme(format=WeightFormat.FP8, activations=Activations.GROUP, rows=128, columns=128)
    scheme = {**INTEGER_SCHEMES, "fp8": SCHEMES["fp8"], "fp8 blocks": blocks}[name]
    weight = noise(200, 264)
    quantized = quantize_weight(weight, scheme)
    quantized.check()
    scale = quantized.row_scales().repeat_interleave(quantized.block[1], dim=1)[:, :264]
    error = (dequantize(quantized) - weight).abs()
    bound = torch.maximum(weight.abs() / 16, scale * 2.0**-10)
    if scheme.format is not WeightFormat.FP8:
        bound = scale / 2
    if (
        scheme.minimum
    ):  # float16 minimum and scale may cut the ends: 2^-11 of 4, of a scale 15 times
        bound = bound * 1.02 + 2.0**-9
    assert (error <= bound * 1.0001).all()
    assert torch.equal(expand(quantized, torch.float32), dequantize(quantized))


def test_int4_bytes_hold_the_even_input_low() -> None:
    levels = torch.tensor([[0, 15, 8, 9, 7, 10, 11, 5]], dtype=torch.uint8)
    packed = pack_int4(levels)
    assert packed.tolist() == [[0xF0, 0x98, 0xA7, 0x5B]]
    assert torch.equal(unpack_int4(packed), levels)


def test_minimums_and_scales_of_half_precision_lie_on_any_grid_of_16_levels() -> None:
    """What Q4_1 and its like hold is found again, but for float16's step (2^-11 of a number)."""
    generator = torch.Generator().manual_seed(5)
    levels = torch.randint(0, 16, (64, 8, 32), generator=generator)
    levels[..., 0], levels[..., 1] = 0, 15  # a grid shows its ends
    scale, minimum = noise(64, 8, 1).abs() + 0.1, noise(64, 8, 1, seed=1)
    weight = (levels * scale + minimum).flatten(1)
    quantized = quantize_weight(weight, SCHEMES["int4"])
    quantized.check()
    assert quantized.scales_AC.dtype == torch.float16
    assert torch.equal(unpack_int4(quantized.values).view(64, 8, 32), levels.byte())
    bound = (scale * 15 + minimum.abs()) * 2.0**-11
    assert ((dequantize(quantized) - weight).abs().view(64, 8, 32) <= bound).all()
    assert quantized.nbytes == 64 * 256 * 5 // 8
    constant = quantize_weight(torch.full((8, 64), 0.5), SCHEMES["int4"])
    assert torch.equal(dequantize(constant), torch.full((8, 64), 0.5))


def test_fp8_activations_are_rounded_to_e4m3_and_cut_off() -> None:
    x = torch.tensor([[1.0, 1.07, 448.0, 449.0], [0.0, 0.0, 0.0, 0.0]])
    weight = quantize_weight(noise(4, 4), SCHEMES["fp8"])
    static = replace(weight, activations=Activations.STATIC, input_scale=1.0)
    assert fake_fp8(x, static).tolist() == [[1.0, 1.125, 448.0, 448.0], [0.0] * 4]
    by_token = fake_fp8(x * 3, weight)
    assert by_token[0, 3] == pytest.approx(449 * 3)  # the largest of its token is exact
    assert by_token[1].tolist() == [0.0] * 4


def test_w8a8_sums_are_whole_numbers_times_two_scales() -> None:
    x, weight = noise(5, 96, seed=1), quantize_weight(noise(33, 96), SCHEMES["int8_activations"])
    x_scale = x.abs().amax(dim=1, keepdim=True) / 127
    sums = (quantized_linear_reference(x, weight) / (x_scale * weight.scales_AC.T)).double()
    assert (sums - sums.round()).abs().max() < 1e-2  # float32 of numbers up to 10^5
    rounded = (x / x_scale).round().long() @ weight.values.long().T
    assert torch.equal(sums.round().long(), rounded)


def test_stacked_weights_are_their_rows_one_under_the_other() -> None:
    blocks = Scheme(format=WeightFormat.FP8, activations=Activations.GROUP, rows=128, columns=128)
    for scheme in (*INTEGER_SCHEMES.values(), SCHEMES["fp8"], blocks):
        parts = [quantize_weight(noise(rows, 256, seed=rows), scheme) for rows in (128, 40, 72)]
        stacked = stack_weights(parts)
        assert stacked is not None
        stacked.check()
        assert torch.equal(dequantize(stacked), torch.cat([dequantize(part) for part in parts]))
    mixed = [quantize_weight(noise(8, 64), SCHEMES[name]) for name in ("int8", "int4")]
    assert stack_weights(mixed) is None


def test_a_quantised_program_is_near_its_plain_one() -> None:
    """In float32, so that only the formats' own errors are left. On unit noise one product errs by
    about 1 % in int8, 4 % in e4m3 and 9 % in int4; here nine of them follow each other."""
    program = widened(random_program(ProgramShape(hidden=96, vocab=300)))
    piece = Piece(row=0, first=0, tokens=list(range(40)))
    (exact,) = PagedRun(TorchExecutor(program)).step(piece)
    for name, bound in {"int8": 0.04, "int8_activations": 0.06, "fp8": 0.15, "int4": 0.4}.items():
        quantized = quantize_program(program, name)
        (got,) = PagedRun(TorchExecutor(quantized)).step(piece)
        error = ((got - exact).norm() / exact.norm()).item()
        assert bound / 20 < error < bound, name


def product_program(inputs: int, outputs: int, scheme: Scheme) -> Program:
    program = random_program(ProgramShape(hidden=inputs, vocab=outputs))
    head = program.ops[-1]
    assert isinstance(head, Linear)
    assert isinstance(head.weight_NK, torch.Tensor)
    quantized = quantize_weight(head.weight_NK, scheme)
    return replace(program, ops=(program.ops[0], replace(head, norm_K=None, weight_NK=quantized)))


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", INTEGER_SCHEMES)
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 24), (40, 33), (576, 1000), (1544, 70)])
def test_a_product_is_the_references_bit_for_bit(
    inputs: int, outputs: int, name: str, isa: str
) -> None:
    """Sums of integers are exact, scales are applied in one order: nothing is left to tolerate.
    Weight-only products round their inputs to 16 bits, which costs less than float32's own sums
    do: 2^-16 of an input's group maximum, K times at worst, once each for x and for order."""
    program = product_program(inputs, outputs, INTEGER_SCHEMES[name])
    embed, linear = program.ops
    assert isinstance(embed, Embed)
    assert isinstance(linear, Linear)
    weight = linear.weight_NK
    assert isinstance(weight, QuantizedWeight)
    kept = weight.activations is Activations.KEPT
    executor = CpuExecutor(program, threads=2, isa=isa)
    executor.poison()
    for rows in (1, 2, 5, 7, 13, 33, 200):
        ids = torch.randint(0, outputs, (rows,), generator=torch.Generator().manual_seed(rows))
        piece = Piece(row=0, first=0, tokens=ids.tolist())
        (got,) = PagedRun(executor, blocks_a_row=32).step(piece)
        x_TK = embed.table_VD[ids]
        expected = integer_product_reference(
            x_TK,
            weight,
            levels=WIDE_LEVELS if kept else INT8_LEVELS,
            width=min(weight.block[1], 256) if kept else None,
        )
        assert torch.equal(got, expected)
        if kept:
            largest = x_TK.float().abs().amax(dim=1, keepdim=True)
            bound = largest * dequantize(weight).abs().sum(dim=1) * 2.0**-15
            assert ((got - quantized_linear_reference(x_TK, weight)).abs() <= bound).all()


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", INTEGER_SCHEMES)
def test_every_chunk_is_a_product_of_its_own(name: str, isa: str) -> None:
    """With scales of its own for the inputs. Borders lie inside groups of 64 and 128."""
    chunked = ChunkedSum(sizes=(96, 64, 96, 154), runs=(range(4),))
    program = product_program(410, 70, INTEGER_SCHEMES[name])
    embed, linear = program.ops
    assert isinstance(embed, Embed)
    assert isinstance(linear, Linear)
    weight = linear.weight_NK
    assert isinstance(weight, QuantizedWeight)
    executor = CpuExecutor(
        replace(program, ops=(embed, replace(linear, chunked=chunked))), threads=2, isa=isa
    )
    executor.poison()
    kept = weight.activations is Activations.KEPT
    width = group_width(weight, chunked)
    for rows in (1, 7, 33):
        piece = Piece(row=0, first=0, tokens=list(range(rows)))
        (got,) = PagedRun(executor).step(piece)
        x_TK = embed.table_VD[:rows]
        parts = [
            integer_product_reference(
                x_TK[:, first:last],
                weight.columns(first, last),
                levels=WIDE_LEVELS if kept else INT8_LEVELS,
                width=min(width or 256, 256) if kept else width,
            )
            for first, last in pairwise((0, 96, 160, 256, 410))
        ]
        assert torch.equal(got, (parts[0] + parts[1]) + (parts[2] + parts[3]))


def test_columns_of_a_weight_are_those_of_its_numbers() -> None:
    blocks = Scheme(format=WeightFormat.FP8, activations=Activations.GROUP, rows=128, columns=128)
    for scheme in (*INTEGER_SCHEMES.values(), SCHEMES["fp8"], blocks):
        weight = quantize_weight(noise(40, 264), scheme)
        for first, last in ((0, 264), (0, 128), (96, 264), (104, 200), (256, 264)):
            part = weight.columns(first, last)
            part.check()
            assert torch.equal(dequantize(part), dequantize(weight)[:, first:last])
    with pytest.raises(ValueError, match="multiples of 8"):
        quantize_weight(noise(8, 64), SCHEMES["int4"]).columns(0, 12)


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", sorted(SCHEMES.keys() - {"fp8"}))
def test_batch_invariance(name: str, isa: str) -> None:
    shape = ProgramShape(hidden=96, heads=6, kv_heads=2, head_dim=24, bias=True, tied=True)
    executor = CpuExecutor(quantize_program(random_program(shape), name), threads=2, isa=isa)
    executor.poison()
    prompt = torch.randint(0, shape.vocab, (70,), generator=torch.Generator().manual_seed(3))
    (alone,) = PagedRun(executor).step(Piece(row=0, first=0, tokens=prompt.tolist()))
    for chunk in (1, 3, 16, 69):
        run, parts = PagedRun(executor), []
        for first in range(0, 70, chunk):
            tokens = prompt[first : first + chunk].tolist()
            others = [Piece(row=row, first=first, tokens=tokens[:1]) for row in (1, 2)]
            parts.append(
                run.step(others[0], Piece(row=0, first=first, tokens=tokens), others[1])[1]
            )
        assert torch.equal(torch.cat(parts), alone)


@needs_cpp
@pytest.mark.parametrize("name", sorted(SCHEMES.keys() - {"fp8"}))
def test_the_whole_program_follows_the_torch_reference(name: str) -> None:
    """The reference rounds activations to bfloat16 at the same places but for fused residuals and
    gates, so it may be off by as much as two bfloat16 runs are from each other."""
    shape = ProgramShape(hidden=576, heads=9, kv_heads=3, head_dim=64, intermediate=1536)
    program = quantize_program(random_program(shape), name)
    piece = Piece(row=0, first=0, tokens=list(range(60)))
    (exact,) = PagedRun(TorchExecutor(widened(program))).step(piece)
    (rounded,) = PagedRun(TorchExecutor(program)).step(piece)
    (got,) = PagedRun(CpuExecutor(program, threads=2)).step(piece)
    assert (got - exact).abs().max() <= 1.5 * (rounded - exact).abs().max()


@needs_cpp
def test_nan_activations_reach_the_logits() -> None:
    program = product_program(96, 64, SCHEMES["int8"])
    embed = program.ops[0]
    assert isinstance(embed, Embed)
    table = embed.table_VD.clone()
    table[3, 5] = torch.nan
    broken = replace(program, ops=(Embed(table_VD=table), program.ops[1]))
    executor = CpuExecutor(broken, threads=1)
    (got,) = PagedRun(executor).step(Piece(row=0, first=0, tokens=[2, 3, 4]))
    assert got[1].isnan().all()
    assert got[[0, 2]].isfinite().all()


@needs_cpp
def test_integer_weights_take_less_memory() -> None:
    program = random_program(ProgramShape(hidden=576, intermediate=1536, vocab=1024))
    table = 1024 * 576 * 2  # the embedding stays bfloat16
    plain = CpuExecutor(program, threads=1).weight_bytes() - table
    # int4: 5 bits each, but 8 in the head, a tenth of this model: (0.9 * 5 + 0.1 * 8) / 16
    for name, share in {"int8": 0.51, "int4": 0.34}.items():
        executor = CpuExecutor(quantize_program(program, name), threads=1)
        assert executor.weight_bytes() - table < share * plain
        assert name in executor.description


def test_fp8_weights_are_expanded_on_a_cpu() -> None:
    program = quantize_program(random_program(ProgramShape()), "fp8")
    assert "fp8" in (unsupported_reason(program) or "")
    said: list[str] = []
    executor = create_executor(program, device="cpu", threads=1, progress=said.append)
    assert any("fp8 weights are expanded to bfloat16" in line for line in said)
    piece = Piece(row=0, first=0, tokens=[1, 2, 3])
    plain = expand_program(program, WeightFormat.FP8, torch.bfloat16, said.append)
    expanded = create_executor(plain, device="cpu", threads=1)
    assert torch.equal(PagedRun(executor).step(piece)[0], PagedRun(expanded).step(piece)[0])


def test_parts_that_do_not_fit_are_refused() -> None:
    weight = quantize_weight(noise(8, 64), SCHEMES["int4"])
    for changes in (
        {"values": weight.values.view(torch.int8)},
        {"scales_AC": weight.scales_AC[:, :1]},
        {"scales_AC": weight.scales_AC.bfloat16()},
        {"input_scale": 1.0},
        {"values": weight.values[:, :30], "block": (1, 64)},
    ):
        with pytest.raises(ValueError, match=r"values|scale|eights"):
            replace(weight, **changes).check()


def test_the_largest_fp8_value() -> None:
    assert torch.finfo(torch.float8_e4m3fn).max == FP8_MAX
