"""`TorchExecutor`: runs a program op by op in plain torch. The reference, and the fallback.

It promises the right values, not the same last bits in every batch: torch picks its matrix product
by the number of rows. On the demo model, what else was in the step moved a logit by less than 1e-4
in float32 and by up to 0.8 in bfloat16 (136 of 144 likeliest tokens stayed), so greedy output that
does not depend on the batch needs the C++ executor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fabric.kernels.attention import PageScales, attention_reference
from fabric.kernels.collective import Collective
from fabric.kernels.linear import linear_reference, logits_reference, sum_of_pieces
from fabric.kernels.mixture import expert_parallel_mixture, mixture_reference
from fabric.kernels.program import (
    Attend,
    Buffer,
    Embed,
    Enter,
    KvLayout,
    KvPool,
    Leave,
    Linear,
    Mixture,
    Op,
    Program,
    StepBatch,
    tensors_of,
)
from fabric.kernels.quantized import QuantizedWeight
from fabric.kernels.rms_norm import rms_norm_reference
from fabric.kernels.rope import rope_reference
from fabric.kernels.silu_mul import silu_mul_reference


class TorchExecutor:
    """Implements `Executor` on any torch device. KV pages are "plain", of the weights' dtype, or
    fp8 if the program says so.

    `observe` is shown every matrix's op and its input [T, K], normed, before the product; what it
    gives back, [T, N] with the bias, takes the product's place.
    """

    def __init__(
        self,
        program: Program,
        device: torch.device | str = "cpu",
        *,
        observe: Callable[[Linear, Tensor], Tensor | None] | None = None,
    ) -> None:
        self._device = torch.device(device)
        self._program = _to_device(program, self._device)
        self._observe = observe
        self._dtype = self._program.dtype()
        self._group = program.group
        mixtures = [op for op in self._program.ops if isinstance(op, Mixture)]
        self._loads_LX = (
            torch.zeros((program.layers, mixtures[0].runs[-1].stop), dtype=torch.int64)
            if mixtures
            else None
        )

    @property
    def description(self) -> str:
        """For the log."""
        return f"torch {_name(self._dtype)} on {self._device.type}, op by op"

    def kv_layout(self, page: int) -> KvLayout:
        """Plain pages of `page` positions."""
        return KvLayout(
            dtype="float8_e4m3fn" if self._program.fp8_pages else _name(self._dtype),
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
            for tensor in tensors_of(op).values()
        }
        return sum(tensors.values())

    @property
    def hidden_dtype(self) -> torch.dtype:
        """That of the weights."""
        return self._dtype

    def expert_loads(self) -> Tensor | None:
        """As `Executor` says."""
        return None if self._loads_LX is None else self._loads_LX.clone()

    @torch.inference_mode()
    def run(self, batch: StepBatch, pool: KvPool, entering_TD: Tensor | None = None) -> Tensor:
        """As `Executor` says, on the executor's device."""
        step = _Step.of(batch, pool, self._program, self._device)
        buffers: dict[Buffer, Tensor] = {}
        for op in self._program.ops:
            match op:
                case Embed():
                    buffers[Buffer.HIDDEN] = self._embed(op, step.token_ids_T)
                case Enter():
                    assert entering_TD is not None, "this stage does not embed"
                    buffers[Buffer.HIDDEN] = entering_TD.to(self._device)
                case Linear():
                    self._linear(op, buffers, step)
                case Attend():
                    buffers[Buffer.ATTENDED] = self._attend(op, buffers[Buffer.QKV], step)
                case Mixture():
                    self._mixture(op, buffers)
                case Leave():
                    return buffers[Buffer.HIDDEN]
        return buffers[Buffer.LOGITS]

    def _embed(self, op: Embed, token_ids_T: Tensor) -> Tensor:
        if self._group is None:
            return op.table_VD[token_ids_T]
        run = self._program.vocab_runs[self._group.rank]
        mine_T = (token_ids_T >= run.start) & (token_ids_T < run.stop)
        rows_TD = op.table_VD[torch.where(mine_T, token_ids_T - run.start, 0)]
        # One summand of each element is the row, the others are zero.
        return self._group.all_reduce(torch.where(mine_T[:, None], rows_TD, 0))

    def _linear(self, op: Linear, buffers: dict[Buffer, Tensor], step: _Step) -> None:
        x_TK = buffers[op.source]
        if op.target is Buffer.LOGITS:
            x_TK = x_TK[step.logit_rows_R]
        if op.norm_K is not None:
            x_TK = rms_norm_reference(x_TK, op.norm_K, self._program.norm_eps)
        product_TN = self._observe(op, x_TK) if self._observe is not None else None
        if product_TN is not None:
            y_TN = product_TN
        elif self._group is not None and op.chunked is not None:
            y_TN = self._spread_sum(op, x_TK, self._group)
        elif op.target is Buffer.LOGITS:
            y_TN = self._logits(op, x_TK)
        else:
            y_TN = linear_reference(x_TK, op.weight_NK, op.bias_N, chunked=op.chunked)
        if op.gated:
            y_TN = silu_mul_reference(y_TN)
        buffers[op.target] = buffers[op.target] + y_TN if op.residual else y_TN

    def _spread_sum(self, op: Linear, x_TK: Tensor, group: Collective) -> Tensor:
        """Each worker's product is of the weights' dtype, but in float32 of quantised ones; their
        sum is float32, rounded once."""
        assert op.chunked is not None
        if isinstance(op.weight_NK, QuantizedWeight):
            part_TN = sum_of_pieces(x_TK, op.weight_NK, op.chunked, group.rank)
        else:
            part_TN = linear_reference(x_TK, op.weight_NK).float()
        total_TN = group.all_reduce(part_TN)
        if op.bias_N is not None:
            total_TN += op.bias_N
        return total_TN.to(self._dtype)

    def _logits(self, op: Linear, x_RK: Tensor) -> Tensor:
        logits_RV = logits_reference(x_RK, op.weight_NK, op.bias_N)
        if self._group is None:
            return logits_RV
        runs = self._program.vocab_runs
        padded_RV = logits_RV.new_zeros((len(logits_RV), max(len(run) for run in runs)))
        padded_RV[:, : logits_RV.shape[1]] = logits_RV
        parts = self._group.all_gather(padded_RV)
        return torch.cat([part[:, : len(run)] for part, run in zip(parts, runs, strict=True)], 1)

    def _mixture(self, op: Mixture, buffers: dict[Buffer, Tensor]) -> None:
        assert self._loads_LX is not None
        hidden_TD, loads_X = buffers[Buffer.HIDDEN], self._loads_LX[op.layer]
        x_TD = rms_norm_reference(hidden_TD, op.norm_D, self._program.norm_eps)
        if self._group is not None and len(op.runs) > 1:
            sum_TD = expert_parallel_mixture(op, x_TD, self._group, loads_X)
        elif self._group is not None:
            counted_X = loads_X if self._group.rank == 0 else torch.zeros_like(loads_X)
            sum_TD = self._group.all_reduce(mixture_reference(op, x_TD, counted_X))
        else:
            sum_TD = mixture_reference(op, x_TD, loads_X)
        buffers[Buffer.HIDDEN] = hidden_TD + sum_TD.to(self._dtype)

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
        keys, values = PageScales.both(op.kv_scales_KG)
        keys.write(keys_XGPE, k_TGE, step.block_T, step.slot_T)
        values.write(values_XGPE, v_TGE, step.block_T, step.slot_T)
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
                    keys.read(keys_XGPE, blocks_B)[:, : end - begin],
                    values.read(values_XGPE, blocks_B)[:, : end - begin],
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


def _to_device(program: Program, device: torch.device) -> Program:
    if device.type == "cpu":
        return replace(program, ops=tuple(program.ops))
    moved: dict[int, Tensor] = {}

    def move(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:  # a tied embedding is moved once
            moved[id(tensor)] = tensor.to(device)
        return moved[id(tensor)]

    return replace(
        program,
        ops=tuple(_moved(op, move, device) for op in program.ops),
        rope_cos_PE2=move(program.rope_cos_PE2),
        rope_sin_PE2=move(program.rope_sin_PE2),
    )


def _moved(op: Op, move: Callable[[Tensor], Tensor], device: torch.device) -> Op:
    changes: dict[str, Any] = {}
    for name in dict.fromkeys(name.partition(".")[0] for name in tensors_of(op)):
        value = getattr(op, name)
        if isinstance(value, QuantizedWeight):
            changes[name] = value.to(device)
        else:
            changes[name] = move(value) if isinstance(value, Tensor) else tuple(map(move, value))
    return replace(op, **changes)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
