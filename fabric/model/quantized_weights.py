"""Quantised matrices as they lie in a checkpoint -> `QuantizedWeight`, mapped where bytes agree."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fabric.core.errors import ModelError
from fabric.kernels.quantized import Activations, QuantizedWeight, WeightFormat, unpack_int4
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
    minimums_AC = None
    if storage.zero_points:
        packed = tensor(f"{module}.weight_zero_point")
        minimums_AC = zero_points(packed, rows).float() * -scales_AC
    elif scheme.minimum:
        minimums = tensor(f"{module}.weight_minimum")
        both = {tensor(f"{module}.{storage.scale_name}").dtype, minimums.dtype}
        minimums_AC = minimums.float()
        if both == {torch.float16}:
            scales_AC, minimums_AC = scales_AC.half(), minimums
        if not bool(minimums_AC.isfinite().all()):
            raise ModelError(f"{module}: a minimum of its weight is not a number")
    input_scale = None
    if scheme.activations is Activations.STATIC:
        input_scale = float(tensor(f"{module}.input_scale").float().reshape(()))
        if not 0 < input_scale < float("inf"):
            raise ModelError(f"{module}: input_scale is {input_scale}")
    weight = QuantizedWeight(
        format=scheme.format,
        values=_values(tensor, module, shape, storage),
        scales_AC=scales_AC.contiguous(),
        minimums_AC=minimums_AC,
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


def zero_points(packed: Tensor, rows: int) -> Tensor:
    """compressed-tensors packs levels that stand for zero as it does values, but down a column:
    int32 [N / 8, C] -> uint8 [N, C]."""
    words_CW = packed.T.contiguous().view(torch.uint8)
    return unpack_int4(words_CW).T[:rows]
