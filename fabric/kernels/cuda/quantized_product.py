"""A product with a quantised weight: its inputs are rounded to the weight's format, one launch, and
multiplied by `scaled_gemm`, another.

What there is no kernel for is expanded to bfloat16 when it is loaded: weights whose activations are
kept or have a static scale, formats that the GPU lacks, and the head, whose logits are float32.

Shape legend: T tokens, N out, K in, J groups of 128 in K.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fabric.kernels.launch_table import LaunchTable, row_bucket, width_bucket
from fabric.kernels.quantize import GROUP_COLUMNS, quantize, to_e4m3fnuz
from fabric.kernels.quantized import Activations, QuantizedWeight, Weight, WeightFormat, expand
from fabric.kernels.scaled_gemm import GROUP, Scaled, scaled_gemm


def loadable(weight: QuantizedWeight, table: LaunchTable, *, head: bool) -> Weight:
    """The weight as this GPU multiplies by it: quantised, or [N, K] in bfloat16."""
    if head or not _has_kernel(weight, table):
        return expand(weight, torch.bfloat16)
    values, scales_AC = weight.values, weight.scales_AC
    if weight.format is WeightFormat.FP8 and table.target.startswith("gfx9"):
        values, scales_AC = to_e4m3fnuz(values, scales_AC)
    return replace(weight, values=values.contiguous(), scales_AC=scales_AC.contiguous())


def quantized_product(
    x_TK: Tensor, weight: QuantizedWeight, bias_N: Tensor | None, table: LaunchTable
) -> Tensor:
    """bfloat16 [T, N] of a bfloat16 `x_TK`. The weight is one that `loadable` gave back."""
    tokens, columns = x_TK.shape
    groups = columns // GROUP_COLUMNS if _blocked(weight) else 1
    values_TK = torch.empty_like(x_TK, dtype=weight.values.dtype)
    scales_TJ = torch.empty((tokens, groups), dtype=torch.float32, device=x_TK.device)
    bucket = width_bucket(columns // groups)
    launch = table.pick("quantize", str(weight.format), bucket)
    quantize(x_TK, out=values_TK, scales_TJ=scales_TJ, launch=launch)
    out = x_TK.new_empty((tokens, weight.shape[0]))
    scaled_gemm(
        Scaled(values=values_TK, scales=scales_TJ),
        Scaled(values=weight.values, scales=weight.scales_AC),
        bias_N=bias_N,
        out=out,
        launch=table.pick("scaled_gemm", _form(weight), row_bucket(tokens)),
    )
    return out


def _blocked(weight: QuantizedWeight) -> bool:
    return weight.activations is Activations.GROUP


def _form(weight: QuantizedWeight) -> str:
    return f"{weight.format} blocks" if _blocked(weight) else str(weight.format)


def _has_kernel(weight: QuantizedWeight, table: LaunchTable) -> bool:
    columns = weight.shape[1]
    if weight.activations is Activations.TOKEN:
        fits = weight.block == (1, columns)
    else:
        fits = _blocked(weight) and weight.block == (GROUP, GROUP) and columns % GROUP == 0
    forms = {key.form for key in table.entries() if key.operation == "scaled_gemm"}
    return fits and _form(weight) in forms
