"""The records that cross into C++, field by field as the structs there."""

from __future__ import annotations

import ctypes

from torch import Tensor

from fabric.kernels.cpu.executor_group import ChunkRecords, ExecutorGroup
from fabric.kernels.program import Linear, Mixture, Program
from fabric.kernels.quantized import QuantizedWeight


class ShapeRecord(ctypes.Structure):
    """`Shape` of program.h."""

    _fields_ = (
        ("layers", ctypes.c_int32),
        ("hidden", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("intermediate", ctypes.c_int32),
        ("vocab", ctypes.c_int32),
        ("positions", ctypes.c_int32),
        ("norm_eps", ctypes.c_float),
        ("attention_scale", ctypes.c_float),
        ("rope_cos", ctypes.c_void_p),
        ("rope_sin", ctypes.c_void_p),
        ("vocab_starts", ctypes.c_void_p),
    )


class LinearRecord(ctypes.Structure):
    """`LinearRecord` of executor.cpp."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("source", ctypes.c_int32),
        ("target", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
        ("residual", ctypes.c_int32),
        ("gated", ctypes.c_int32),
        ("chunks", ctypes.c_void_p),
        ("pieces", ctypes.c_void_p),
        ("chunk_count", ctypes.c_int32),
        ("piece_count", ctypes.c_int32),
    )


class MixtureRecord(ctypes.Structure):
    """`MixtureRecord` of executor.cpp."""

    _fields_ = (
        ("norm", ctypes.c_void_p),
        ("router", ctypes.c_void_p),
        ("gate_up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
        ("run_starts", ctypes.c_void_p),
        ("loads", ctypes.c_void_p),
        ("parts", ctypes.c_int32),
        ("experts", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("top_k", ctypes.c_int32),
        ("renormalise", ctypes.c_int32),
    )


class MixtureCall:
    """What `fabric_cpu_add_mixture` reads: `record`, and the arrays that it points to. `loads_X`:
    where the rows of each expert are counted; None if another worker of the group counts them."""

    def __init__(self, op: Mixture, loads_X: Tensor | None) -> None:
        addresses = ctypes.c_void_p * len(op.down_DN)
        self._gate_up = addresses(*(each.data_ptr() for each in op.gate_up_ND))
        self._down = addresses(*(each.data_ptr() for each in op.down_DN))
        starts = [*(run.start for run in op.runs), op.runs[-1].stop]
        self._run_starts = (ctypes.c_int32 * len(starts))(*starts)
        self.record = MixtureRecord(
            norm=op.norm_D.data_ptr(),
            router=op.router_XD.data_ptr(),
            gate_up=ctypes.addressof(self._gate_up),
            down=ctypes.addressof(self._down),
            run_starts=ctypes.addressof(self._run_starts),
            loads=pointer(loads_X),
            parts=len(op.runs),
            experts=op.runs[-1].stop,
            columns=op.down_DN[0].shape[1],
            top_k=op.top_k,
            renormalise=int(op.renormalise),
        )


class StepRecord(ctypes.Structure):
    """`StepInput` of step.h."""

    _fields_ = (
        ("token_ids", ctypes.c_void_p),
        ("query_starts", ctypes.c_void_p),
        ("first_positions", ctypes.c_void_p),
        ("table_rows", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("logit_rows", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("block_bytes", ctypes.c_int64),
        ("block_count", ctypes.c_int64),
        ("logits_stride", ctypes.c_int64),
        ("entering", ctypes.c_void_p),
        ("leaving", ctypes.c_void_p),
        ("tokens", ctypes.c_int32),
        ("sequences", ctypes.c_int32),
        ("logit_row_count", ctypes.c_int32),
        ("table_height", ctypes.c_int32),
        ("table_width", ctypes.c_int32),
        ("page", ctypes.c_int32),
    )


def shape_record(program: Program, group: ExecutorGroup) -> ShapeRecord:
    """For `fabric_cpu_create`."""
    return ShapeRecord(
        layers=program.layers,
        hidden=program.hidden,
        heads=program.heads,
        kv_heads=program.kv_heads,
        head_dim=program.head_dim,
        intermediate=program.intermediate,
        vocab=program.vocab,
        positions=program.rope_cos_PE2.shape[0],
        norm_eps=program.norm_eps,
        attention_scale=program.attention_scale,
        rope_cos=program.rope_cos_PE2.data_ptr(),
        rope_sin=program.rope_sin_PE2.data_ptr(),
        vocab_starts=group.vocab_starts.data_ptr(),
    )


def linear_record(op: Linear, chunks: ChunkRecords) -> LinearRecord:
    """For `fabric_cpu_add_linear`; the weight is null where a `QuantizedRecord` goes beside it."""
    weight = op.weight_NK
    return LinearRecord(
        weight=None if isinstance(weight, QuantizedWeight) else weight.data_ptr(),
        bias=pointer(op.bias_N),
        norm=pointer(op.norm_K),
        source=int(op.source),
        target=int(op.target),
        outputs=weight.shape[0],
        inputs=weight.shape[1],
        residual=int(op.residual),
        gated=int(op.gated),
        chunks=chunks.chunks.data_ptr(),
        pieces=chunks.pieces.data_ptr(),
        chunk_count=len(chunks.chunks),
        piece_count=len(chunks.pieces),
    )


def pointer(tensor: Tensor | None) -> int | None:
    """Its address, null for None."""
    return None if tensor is None else tensor.data_ptr()
