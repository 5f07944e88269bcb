"""Quantization and products of quantized matrices, in the interpreter: against float64."""

from __future__ import annotations

import pytest
import torch
from kit.guarded import Guarded
from torch import Tensor

from fabric.kernels.launch import Launch
from fabric.kernels.quantize import largest, quantize, quantize_reference, to_e4m3fnuz
from fabric.kernels.scaled_gemm import Scaled, expanded, scaled_gemm, scaled_gemm_reference

FP8, INT8 = torch.float8_e4m3fn, torch.int8
ROWS = Launch(sizes=())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [FP8, INT8, torch.float8_e4m3fnuz])
@pytest.mark.parametrize(
    ("tokens", "columns", "group"), [(1, 96, None), (7, 384, 128), (33, 576, None)]
)
def test_quantize(tokens: int, columns: int, group: int | None, dtype: torch.dtype) -> None:
    memory = Guarded()
    wide = memory.copy((normal(tokens, columns + 32) * 5).to(torch.bfloat16))
    x = wide[:, :columns]
    x[0] = 0.0  # a row of zeros keeps a scale that divides
    groups = columns // (group or columns)
    out = memory.empty((tokens, columns), dtype)
    scales = memory.empty((tokens, groups), torch.float32)
    quantize(x, out=out, scales_TJ=scales, launch=ROWS)
    memory.check()
    expected, expected_scales = quantize_reference(x, dtype, group)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))
    # Each group's largest becomes the format's largest: nothing is clipped, no bit lost.
    peaks = out.float().view(tokens, groups, -1).abs().amax(-1)
    assert (peaks[1:] == largest(dtype)).all() and (peaks[0] == 0).all()


def test_groups_must_be_whole() -> None:
    x = torch.zeros(2, 100, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="whole groups"):
        quantize(x, out=x.to(FP8), scales_TJ=torch.zeros(2, 3), launch=ROWS)
    with pytest.raises(ValueError, match="no format"):
        largest(torch.bfloat16)


def test_weights_become_e4m3fnuz_without_a_change() -> None:
    """All 254 numbers of e4m3fn, -0 among them, under a scale."""
    bits = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8)
    weight = bits.view(FP8)
    scale = torch.tensor(0.37)
    converted, converted_scale = to_e4m3fnuz(weight, scale)
    assert converted.dtype == torch.float8_e4m3fnuz
    assert torch.equal(converted.float() * converted_scale, weight.float() * scale)
    with pytest.raises(ValueError, match="not a number"):
        to_e4m3fnuz(torch.tensor([0x7F], dtype=torch.uint8).view(FP8), scale)
    with pytest.raises(ValueError, match="not float8_e4m3fn"):
        to_e4m3fnuz(converted, scale)


def operand(rows: int, columns: int, dtype: torch.dtype, group: int | None, seed: int) -> Scaled:
    x = normal(rows, columns, seed=seed) * torch.rand(rows, 1) * 3
    if group is None:
        values, scales = quantize_reference(x, dtype)
        return Scaled(values=values, scales=scales)
    padded = torch.nn.functional.pad(x, (0, -columns % group))
    values, scales = quantize_reference(padded, dtype, group)
    return Scaled(values=values[:, :columns].contiguous(), scales=scales)


def weight(outputs: int, inputs: int, dtype: torch.dtype, blocked: bool) -> Scaled:
    matrix = operand(outputs, inputs, dtype, 128 if blocked else None, seed=1)
    if not blocked:
        return matrix
    scales = torch.rand(-(-outputs // 128), -(-inputs // 128)) * 0.01 + 0.001
    return Scaled(values=matrix.values, scales=scales)


def multiply(a: Scaled, b: Scaled, bias: Tensor | None, launch: Launch) -> None:
    memory = Guarded()
    guarded = [
        Scaled(values=memory.copy(each.values), scales=memory.copy(each.scales)) for each in (a, b)
    ]
    out = memory.empty((len(a.values), len(b.values)), torch.bfloat16)
    bias_N = None if bias is None else memory.copy(bias)
    scaled_gemm(guarded[0], guarded[1], bias_N=bias_N, out=out, launch=launch)
    memory.check()
    wide_a, wide_b = expanded(a).double(), expanded(b).double()
    exact = wide_a @ wide_b.T + (0 if bias is None else bias.double())
    terms = wide_a.abs() @ wide_b.abs().T + 1
    # K float32 sums (int8 sums are exact), a few scalings, and one rounding to bfloat16.
    inputs = a.values.shape[1]
    allowed = (inputs + 4) * 2.0**-24 * terms + 2.0**-8 * exact.abs()
    assert ((out.double() - exact).abs() <= allowed).all()
    assert ((scaled_gemm_reference(a, b, bias).double() - exact).abs() <= allowed).all()


def tile(block_m: int, block_n: int, **sizes: int) -> Launch:
    named = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 128, **sizes}
    return Launch(sizes=tuple(named.items()))


SHAPES = [(1, 96, 64), (7, 130, 200), (33, 256, 384), (3, 40, 576)]


@pytest.mark.parametrize("dtype", [FP8, INT8])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("swap", [0, 1])
def test_per_token_times_per_channel(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype, swap: int
) -> None:
    a, b = operand(rows, inputs, dtype, None, seed=0), weight(outputs, inputs, dtype, blocked=False)
    bias = normal(outputs).to(torch.bfloat16) if rows % 2 else None
    multiply(a, b, bias, tile(16, 64, SWAP=swap))


@pytest.mark.parametrize(("rows", "outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("swap", [0, 1])
def test_block_scales(rows: int, outputs: int, inputs: int, swap: int) -> None:
    if inputs <= 128:
        inputs += 128
    a, b = operand(rows, inputs, FP8, 128, seed=0), weight(outputs, inputs, FP8, blocked=True)
    multiply(a, b, None, tile(16, 64, SWAP=swap))


@pytest.mark.parametrize("dtype", [FP8, INT8])
@pytest.mark.parametrize("blocked", [False, True])
def test_through_descriptors_and_tile_after_tile(dtype: torch.dtype, blocked: bool) -> None:
    """Three programs for nine tiles, the last ones cut by the edges."""
    a = operand(70, 272, dtype, 128 if blocked else None, seed=0)
    b = weight(136, 272, dtype, blocked)
    multiply(a, b, normal(136).to(torch.bfloat16), tile(32, 64, PROGRAMS=3))


def test_what_a_descriptor_cannot_hold_takes_the_plain_kernel() -> None:
    a, b = operand(5, 200, FP8, None, seed=0), weight(33, 200, FP8, blocked=False)
    multiply(a, b, None, tile(16, 64, PROGRAMS=3))


def test_operands_must_fit() -> None:
    a, b = operand(5, 256, FP8, None, seed=0), weight(33, 256, FP8, blocked=True)
    out = torch.empty(5, 33, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="granularity"):
        scaled_gemm(a, b, out=out, launch=tile(16, 64))
    with pytest.raises(ValueError, match="format"):
        scaled_gemm(a, weight(33, 256, INT8, blocked=False), out=out, launch=tile(16, 64))
    blocks = operand(5, 256, FP8, 128, seed=0)
    with pytest.raises(ValueError, match="128 columns"):
        scaled_gemm(blocks, b, out=out, launch=tile(16, 64, BLOCK_K=64))
