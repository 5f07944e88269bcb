"""Quantised matrices as they lie in a checkpoint -> `QuantizedWeight`, mapped where bytes agree."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fabric.core.errors import ModelError
from fabric.kernels.quantized import Activations, QuantizedWeight, WeightFormat
from fabric.model.quantization import Storage


def read_quantized(
    tensor: Callable[[str], Tensor], module: str, shape: tuple[int, int], storage: Storage
) -> QuantizedWeight:
    """`tensor` finds one by name; `module` is the matrix's name without ".weight". The headers have
    been checked. Raises `ModelError` for scales that are no positive numbers."""
    scheme, rows = storage.scheme, shape[0]
    scales = tensor(f"{module}.{storage.scale_name}").float()
    scales_AC = scales.reshape(1, 1).expand(rows, 1) if storage.by_tensor else scales
    if not bool((scales.isfinite() & (scales != 0)).all()):
        raise ModelError(f"{module}: a scale of its weight is zero or not a number")
    input_scale = None
    if scheme.activations is Activations.STATIC:
        input_scale = float(tensor(f"{module}.input_scale").float().reshape(()))
        if not 0 < input_scale < float("inf"):
            raise ModelError(f"{module}: input_scale is {input_scale}")
    weight = QuantizedWeight(
        format=scheme.format,
        values=_values(tensor, module, shape, storage),
        scales_AC=scales_AC.contiguous(),
        block=(scheme.rows, scheme.columns or shape[1]),
        activations=scheme.activations,
        input_scale=input_scale,
    )
    try:
        weight.check()
    except ValueError as error:
        raise ModelError(f"{module}: {error}") from None
    return weight


def _values(
    tensor: Callable[[str], Tensor], module: str, shape: tuple[int, int], storage: Storage
) -> Tensor:
    if not storage.packed:
        return tensor(f"{module}.weight")
    said = tuple(int(size) for size in tensor(f"{module}.weight_shape"))
    if said != shape:
        raise ModelError(f"{module}.weight_shape is {said}, but the config says {shape}")
    packed = tensor(f"{module}.weight_packed").view(torch.uint8)
    if storage.scheme.format is WeightFormat.INT4:
        return packed[:, : shape[1] // 2]
    return (packed[:, : shape[1]] ^ 0x80).view(torch.int8)  # 128 is added to each
