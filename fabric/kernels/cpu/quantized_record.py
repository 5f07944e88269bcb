"""A quantised weight on its way into C++."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from fabric.kernels.collective import Collective
from fabric.kernels.quantized import INT8_LEVELS, Activations, QuantizedWeight, WeightFormat

# A weight-only product rounds its inputs to 16 bits, a scale a token and group: the error is below
# that of the bfloat16 they come from, and the sums are exact.
WIDE_LEVELS = 32_767


class QuantizedRecord(ctypes.Structure):
    """`QuantizedSource` of quantized_matrix.h."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bits", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("levels", ctypes.c_int32),
        ("by_token", ctypes.c_int32),
        ("input_scale", ctypes.c_float),
    )


def quantized_record(weight: QuantizedWeight, scales_NC: Tensor) -> Any:
    """A reference for `fabric_cpu_add_linear`. `scales_NC`: its `row_scales`, contiguous, which the
    caller keeps alive."""
    kept = weight.activations is Activations.KEPT
    record = QuantizedRecord(
        values=weight.values.data_ptr(),
        scales=scales_NC.data_ptr(),
        bits=4 if weight.format is WeightFormat.INT4 else 8,
        group=min(weight.block[1], weight.shape[1]),
        levels=WIDE_LEVELS if kept else INT8_LEVELS,
        by_token=int(not kept),
        input_scale=weight.input_scale or 0.0,
    )
    return ctypes.byref(record)


def unsupported_quantized(
    weight: QuantizedWeight, shape: tuple[int, ...], group: Collective | None
) -> str | None:
    """Why C++ can't multiply by it, or None if it can. `shape`: what the program asks for."""
    if group is not None:
        return "a group of workers can't share out quantised weights yet"
    columns = weight.shape[1]
    if weight.format is WeightFormat.FP8 or weight.activations is Activations.GROUP:
        return f"a weight is {weight.format} with activations by {weight.activations}"
    if weight.block[1] < columns and weight.block[1] % 32:
        return f"groups of {weight.block[1]} inputs are not a multiple of 32"
    if weight.shape != shape or not weight.values.is_contiguous():
        return f"a weight is {weight.shape}, not contiguous {shape}"
    if weight.values.device.type != "cpu":
        return f"a weight is on {weight.values.device}"
    return None
