"""What the C++ executor can run, and why not what it can't."""

from __future__ import annotations

import torch

from fabric.kernels.cpu.executor_group import unsupported_chunks
from fabric.kernels.cpu.quantized_record import unsupported_quantized
from fabric.kernels.program import Attend, Buffer, Embed, Enter, Leave, Linear, Mixture, Op, Program
from fabric.kernels.quantized import QuantizedWeight, Weight

MAX_HEAD_DIM = 256


def unsupported_reason(program: Program) -> str | None:
    """Why the C++ executor cannot run `program`, or None if it can. Walks through all weights."""
    reason = unsupported_shape(program)
    for index, op in enumerate(program.ops):
        if reason is None and (what := unsupported_op(program, op)) is not None:
            reason = f"op {index} ({type(op).__name__}): {what}"
    return reason


def unsupported_shape(program: Program) -> str | None:
    """The same as far as sizes tell, without the weights."""
    if program.heads % program.kv_heads != 0:
        return f"{program.heads} heads are not a multiple of {program.kv_heads} kv heads"
    if program.head_dim % 8 != 0 or program.head_dim > MAX_HEAD_DIM:
        return f"head_dim {program.head_dim} is not a multiple of 8 up to {MAX_HEAD_DIM}"
    for table in (program.rope_cos_PE2, program.rope_sin_PE2):
        if table.dtype != torch.float32 or not table.is_contiguous() or table.device.type != "cpu":
            return "the rope tables are not contiguous float32 on the CPU"
    return None


def unsupported_op(program: Program, op: Op) -> str | None:
    """Of one op, with its weights."""
    if isinstance(op, Enter | Leave):
        return None
    vocab = program.vocab
    if program.group is not None:
        vocab = len(program.vocab_runs[program.group.rank])
    columns = {
        Buffer.HIDDEN: program.hidden,
        Buffer.QKV: (program.heads + 2 * program.kv_heads) * program.head_dim,
        Buffer.ATTENDED: program.heads * program.head_dim,
        Buffer.GATED: program.intermediate,
        Buffer.LOGITS: vocab,
    }
    expected: list[tuple[Weight | None, tuple[int, ...]]]
    if isinstance(op, Embed):
        expected = [(op.table_VD, (vocab, program.hidden))]
    elif isinstance(op, Mixture):
        columns_N = op.down_DN[0].shape[1] if op.down_DN else 0
        if not columns_N:
            return "a worker without experts"
        expected = [
            (op.norm_D, (program.hidden,)),
            (op.router_XD, (op.runs[-1].stop, program.hidden)),
            *((each, (2 * columns_N, program.hidden)) for each in op.gate_up_ND),
            *((each, (program.hidden, columns_N)) for each in op.down_DN),
        ]
    elif isinstance(op, Attend):
        expected = [(op.q_norm_E, (program.head_dim,)), (op.k_norm_E, (program.head_dim,))]
        if op.window is not None and op.window < 1:
            return "a window below 1"
        if op.kv_scales_KG is not None:
            return "its pages are fp8"
    else:
        outputs = columns[op.target] * (2 if op.gated else 1)
        inputs = columns[op.source]
        expected = [
            (op.weight_NK, (outputs, inputs)),
            (op.bias_N, (outputs,)),
            (op.norm_K, (inputs,)),
        ]
        if op.source == Buffer.LOGITS or op.source == op.target:
            return "it may not read the logits, or the buffer that it writes"
        if op.residual != (op.target == Buffer.HIDDEN) or (op.residual and op.gated):
            return "HIDDEN, and nothing else, is changed by adding to it"
        if op.gated and op.target == Buffer.LOGITS:
            return "logits cannot be gated"
        if op.norm_K is not None and op.source != Buffer.HIDDEN:
            return "only HIDDEN is normed"
        if op.chunked is not None:
            reason = unsupported_chunks(op.chunked, program.group)
            if reason is not None:
                return reason
    for tensor, shape in expected:
        if tensor is None:
            continue
        if isinstance(tensor, QuantizedWeight):
            chunked = op.chunked if isinstance(op, Linear) else None
            if reason := unsupported_quantized(tensor, shape, chunked):
                return reason
        elif tensor.dtype != torch.bfloat16 or tensor.device.type != "cpu":
            return f"a weight is {tensor.dtype} on {tensor.device}, not bfloat16 on the CPU"
        elif tuple(tensor.shape) != shape or not tensor.is_contiguous():
            return f"a weight is {tuple(tensor.shape)}, not contiguous {shape}"
    return None
