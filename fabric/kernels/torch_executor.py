"""`TorchExecutor`: runs a program op by op in plain torch. The reference, and the fallback.

It promises the right values, not the same last bits in every batch: torch picks its matrix product
by the number of rows. On the demo model, what else was in the step moved a logit by less than 1e-4
in float32 and by up to 0.8 in bfloat16 (136 of 144 likeliest tokens stayed), so greedy output that
does not depend on the batch needs the C++ executor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fabric.kernels.attention import (
    attention_reference,
    read_pages_reference,
    write_pages_reference,
)
from fabric.kernels.linear import linear_reference, logits_reference
from fabric.kernels.program import (
    Attend,
    Buffer,
    Embed,
    KvLayout,
    KvPool,
    Linear,
    Op,
    Program,
    StepBatch,
)
from fabric.kernels.rms_norm import rms_norm_reference
from fabric.kernels.rope import rope_reference
from fabric.kernels.silu_mul import silu_mul_reference


class TorchExecutor:
    """Implements `Executor` on any torch device. KV pages are "plain", of the weights' dtype."""

    def __init__(self, program: Program, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._program = _to_device(program, self._device)
        self._dtype = next(op.table_VD.dtype for op in program.ops if isinstance(op, Embed))

    @property
    def description(self) -> str:
        """For the log."""
        return f"torch {_name(self._dtype)} on {self._device.type}, op by op"

    def kv_layout(self, page: int) -> KvLayout:
        """Plain pages of `page` positions."""
        return KvLayout(
            dtype=_name(self._dtype),
            packing="plain",
            layers=self._program.layers,
            kv_heads=self._program.kv_heads,
            head_dim=self._program.head_dim,
            page=page,
        )

    def weight_bytes(self) -> int:
        """Bytes of all weights, shared ones (a tied embedding) once."""
        tensors = {
            (tensor.data_ptr(), tensor.numel()): tensor.numel() * tensor.element_size()
            for op in self._program.ops
            for tensor in _tensors(op).values()
        }
        return sum(tensors.values())

    @torch.inference_mode()
    def run(self, batch: StepBatch, pool: KvPool) -> Tensor:
        """Logits, float32 [R, V], on the executor's device."""
        step = _Step.of(batch, pool, self._program, self._device)
        buffers: dict[Buffer, Tensor] = {}
        for op in self._program.ops:
            match op:
                case Embed():
                    buffers[Buffer.HIDDEN] = op.table_VD[step.token_ids_T]
                case Linear():
                    self._linear(op, buffers, step)
                case Attend():
                    buffers[Buffer.ATTENDED] = self._attend(op, buffers[Buffer.QKV], step)
        return buffers[Buffer.LOGITS]

    def _linear(self, op: Linear, buffers: dict[Buffer, Tensor], step: _Step) -> None:
        x_TK = buffers[op.source]
        if op.target is Buffer.LOGITS:
            x_TK = x_TK[step.logit_rows_R]
        if op.norm_K is not None:
            x_TK = rms_norm_reference(x_TK, op.norm_K, self._program.norm_eps)
        product = logits_reference if op.target is Buffer.LOGITS else linear_reference
        y_TN = product(x_TK, op.weight_NK, op.bias_N)
        if op.gated:
            y_TN = silu_mul_reference(y_TN)
        buffers[op.target] = buffers[op.target] + y_TN if op.residual else y_TN

    def _attend(self, op: Attend, qkv_TN: Tensor, step: _Step) -> Tensor:
        p = self._program
        heads = qkv_TN.view(len(qkv_TN), p.heads + 2 * p.kv_heads, p.head_dim)
        q_THE, k_TGE, v_TGE = heads.split([p.heads, p.kv_heads, p.kv_heads], dim=1)
        if op.q_norm_E is not None:
            q_THE = rms_norm_reference(q_THE, op.q_norm_E, p.norm_eps)
        if op.k_norm_E is not None:
            k_TGE = rms_norm_reference(k_TGE, op.k_norm_E, p.norm_eps)
        q_THE = rope_reference(q_THE, step.cos_TE2, step.sin_TE2)
        k_TGE = rope_reference(k_TGE, step.cos_TE2, step.sin_TE2)
        keys_XGPE, values_XGPE = step.pages_XLKGPE[:, op.layer].unbind(dim=1)
        write_pages_reference(keys_XGPE, k_TGE, step.block_T, step.slot_T)
        write_pages_reference(values_XGPE, v_TGE, step.block_T, step.slot_T)
        page = keys_XGPE.shape[2]
        attended = []
        for sequence in step.sequences:
            end = sequence.first + sequence.count
            # Blocks wholly before the first query's window are not read.
            begin = max(sequence.first - op.window + 1, 0) // page * page if op.window else 0
            blocks_B = sequence.blocks_B[begin // page :]
            attended.append(
                attention_reference(
                    q_THE[sequence.row : sequence.row + sequence.count],
                    read_pages_reference(keys_XGPE, blocks_B)[:, : end - begin],
                    read_pages_reference(values_XGPE, blocks_B)[:, : end - begin],
                    offset=sequence.first - begin,
                    scale=p.attention_scale,
                    window=op.window,
                )
            )
        return torch.cat(attended)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sequence:
    """Rows [row, row + count) of the step, at positions first, first + 1, ... of one sequence."""

    row: int
    count: int
    first: int
    blocks_B: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What all layers of one step share, on the executor's device."""

    token_ids_T: Tensor
    logit_rows_R: Tensor
    block_T: Tensor
    slot_T: Tensor
    cos_TE2: Tensor
    sin_TE2: Tensor
    sequences: tuple[_Sequence, ...]
    pages_XLKGPE: Tensor

    @staticmethod
    def of(batch: StepBatch, pool: KvPool, program: Program, device: torch.device) -> _Step:
        layout = pool.layout
        assert layout.packing == "plain", layout
        page = layout.page
        starts = batch.query_starts_S1.tolist()
        sequences, positions, blocks = [], [], []
        for index, (first, table) in enumerate(
            zip(batch.first_positions_S.tolist(), batch.table_rows_S.tolist(), strict=True)
        ):
            count = starts[index + 1] - starts[index]
            blocks_B = batch.block_tables_XB[table, : -(-(first + count) // page)].long()
            position_Q = torch.arange(first, first + count)
            sequences.append(
                _Sequence(row=starts[index], count=count, first=first, blocks_B=blocks_B.to(device))
            )
            positions.append(position_Q)
            blocks.append(blocks_B[position_Q // page])
        position_T = torch.cat(positions)
        dtype = getattr(torch, layout.dtype)
        shape = (-1, layout.layers, 2, layout.kv_heads, page, layout.head_dim)
        return _Step(
            token_ids_T=batch.token_ids_T.long().to(device),
            logit_rows_R=batch.logit_rows_R.long().to(device),
            block_T=torch.cat(blocks).to(device),
            slot_T=(position_T % page).to(device),
            cos_TE2=program.rope_cos_PE2[position_T.to(device)],
            sin_TE2=program.rope_sin_PE2[position_T.to(device)],
            sequences=tuple(sequences),
            pages_XLKGPE=pool.blocks_XB.view(dtype).view(shape),
        )


def _tensors(op: Op) -> dict[str, Tensor]:
    values = {field.name: getattr(op, field.name) for field in fields(op)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _to_device(program: Program, device: torch.device) -> Program:
    if device.type == "cpu":
        return program
    moved: dict[int, Tensor] = {}

    def move(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:  # a tied embedding is moved once
            moved[id(tensor)] = tensor.to(device)
        return moved[id(tensor)]

    return replace(
        program,
        ops=tuple(_moved(op, move) for op in program.ops),
        rope_cos_PE2=move(program.rope_cos_PE2),
        rope_sin_PE2=move(program.rope_sin_PE2),
    )


def _moved(op: Op, move: Callable[[Tensor], Tensor]) -> Op:
    changes: dict[str, Any] = {name: move(tensor) for name, tensor in _tensors(op).items()}
    return replace(op, **changes)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
