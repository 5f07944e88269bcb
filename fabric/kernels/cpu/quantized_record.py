"""A quantised weight on its way into C++."""

from __future__ import annotations

import ctypes

from fabric.kernels.quantized import Activations, QuantizedWeight, WeightFormat
from fabric.kernels.quantized_linear import INT8_LEVELS, group_width
from fabric.kernels.summation import ChunkedSum

# A weight-only product rounds its inputs to 16 bits, a scale a token and group: the error is below
# that of the bfloat16 they come from, and the sums are exact.
WIDE_LEVELS = 32_767


class QuantizedRecord(ctypes.Structure):
    """`QuantizedSource` of quantized_matrix.h."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("minimums", ctypes.c_void_p),
        ("bits", ctypes.c_int32),
        ("number_bytes", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("cut", ctypes.c_int32),
        ("levels", ctypes.c_int32),
        ("by_token", ctypes.c_int32),
        ("input_scale", ctypes.c_float),
    )


class QuantizedCall:
    """A record for `fabric_cpu_add_linear`, and the tensors that it points to."""

    def __init__(self, weight: QuantizedWeight, chunked: ChunkedSum | None) -> None:
        self._numbers = [weight.row_scales().contiguous()]
        if weight.format is WeightFormat.INT4:
            self._numbers.append(weight.row_minimums().contiguous())
        kept = weight.activations is Activations.KEPT
        self.record = QuantizedRecord(
            values=weight.values.data_ptr(),
            scales=self._numbers[0].data_ptr(),
            minimums=self._numbers[-1].data_ptr() if len(self._numbers) > 1 else None,
            bits=4 if weight.format is WeightFormat.INT4 else 8,
            number_bytes=weight.scales_AC.itemsize,
            group=min(weight.block[1], weight.shape[1]),
            cut=group_width(weight, chunked) or 0,
            levels=WIDE_LEVELS if kept else INT8_LEVELS,
            by_token=int(weight.activations in (Activations.TOKEN, Activations.STATIC)),
            input_scale=weight.input_scale or 0.0,
        )


def unsupported_quantized(
    weight: QuantizedWeight, shape: tuple[int, ...], chunked: ChunkedSum | None
) -> str | None:
    """Why C++ can't multiply by it, or None if it can. `shape`: what the program asks for."""
    if weight.format is WeightFormat.FP8:
        return f"a weight is {weight.format} with activations by {weight.activations}"
    width = group_width(weight, chunked)
    if width is not None and width % 32:
        return f"groups of {width} inputs are not a multiple of 32"
    if weight.shape != shape or not weight.values.is_contiguous():
        return f"a weight is {weight.shape}, not contiguous {shape}"
    if weight.values.device.type != "cpu":
        return f"a weight is on {weight.values.device}"
    return None
