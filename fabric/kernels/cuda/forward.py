"""The ops of a program as launches. It allocates and launches, and never looks at a value: so what
it does for a shape can be captured as a graph.

Shape legend: as in `fabric.kernels.program`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from fabric.kernels.cuda.experts import Experts
from fabric.kernels.cuda.quantized_product import quantized_product
from fabric.kernels.cuda.step_inputs import StepInputs
from fabric.kernels.embedding import embedding
from fabric.kernels.kv_write import kv_write
from fabric.kernels.launch_table import LaunchTable, head_bucket, row_bucket, width_bucket
from fabric.kernels.linear import logits
from fabric.kernels.mixture import expert_parallel_mixture, route_reference
from fabric.kernels.paged_attention import PagedKv, Partials, paged_attention, split_count
from fabric.kernels.prefill_attention import prefill_attention
from fabric.kernels.program import (
    Attend,
    Buffer,
    Embed,
    Enter,
    KvPool,
    Leave,
    Linear,
    Mixture,
    Program,
)
from fabric.kernels.quantized import QuantizedWeight, Weight
from fabric.kernels.rms_norm import rms_norm
from fabric.kernels.rope import rope
from fabric.kernels.silu_mul import silu_mul


@dataclass(slots=True, kw_only=True, eq=False)
class _Activations:
    """Of one step. `delta_TD`: what the last layer adds to the residual stream, not added yet: the
    next norm does both in one pass."""

    hidden_TD: Tensor
    delta_TD: Tensor | None = None
    qkv_TN: Tensor | None = None
    attended_TN: Tensor | None = None
    gated_TN: Tensor | None = None


class Forward:
    """`program` lies on the device that it runs on. `experts`: of its mixtures, by layer; what
    each gets is counted in `loads_LX`."""

    def __init__(
        self,
        program: Program,
        table: LaunchTable,
        experts: Mapping[int, Experts],
        loads_LX: Tensor | None,
    ) -> None:
        self._program = program
        self._table = table
        self._experts = experts
        self._loads_LX = loads_LX
        head = head_bucket(program.head_dim)
        self._pages = "fp8" if program.fp8_pages else "bf16"
        self._decode = table.pick("paged_attention", self._pages, head)
        self._prefill = table.pick("prefill_attention", self._pages, head)

    @property
    def tile_rows(self) -> int:
        """Of a prefill tile."""
        return self._prefill.size("ROWS")

    @property
    def split_keys(self) -> int:
        """How many keys one split of a decoding sequence has."""
        return self._decode.size("SPLIT_KEYS")

    def run(self, inputs: StepInputs, pool: KvPool, entering_TD: Tensor | None = None) -> Tensor:
        """Logits, float32 [R, V], or what a stage hands on, bfloat16 [T, D]: a new tensor."""
        activations: _Activations | None = None
        for op in self._program.ops:
            if isinstance(op, Embed):
                activations = _Activations(hidden_TD=self._embed(op, inputs))
                continue
            if isinstance(op, Enter):
                assert entering_TD is not None, "this stage does not embed"
                device = inputs.token_ids_T.device
                # A copy: HIDDEN is added to in place.
                hidden_TD = entering_TD.to(device, torch.bfloat16, copy=True)
                activations = _Activations(hidden_TD=hidden_TD)
                continue
            assert activations is not None
            if isinstance(op, Attend):
                self._attend(op, activations, inputs, pool)
            elif isinstance(op, Mixture):
                self._mixture(op, activations, inputs)
            elif isinstance(op, Leave):
                self._settle(activations)
                return activations.hidden_TD
            elif op.target is Buffer.LOGITS:
                return self._logits(op, activations, inputs)
            else:
                self._linear(op, activations)
        raise ValueError("a program ends with its logits, or with Leave")

    def _embed(self, op: Embed, inputs: StepInputs) -> Tensor:
        out = op.table_VD.new_empty((len(inputs.token_ids_T), self._program.hidden))
        launch = self._table.pick("embedding", "bf16", "any")
        group, runs = self._program.group, self._program.vocab_runs
        first = runs[group.rank].start if group is not None else 0
        embedding(inputs.token_ids_T, op.table_VD, out=out, first=first, launch=launch)
        # One summand of each element is the row, the others are zero.
        return out if group is None else group.all_reduce(out)

    def _linear(self, op: Linear, activations: _Activations) -> None:
        x_TK = self._source(op, activations)
        group = self._program.group
        if group is not None and op.chunked is not None:
            # The parts are bfloat16, their sum is float32, rounded once.
            total_TN = group.all_reduce(self._product(x_TK, op.weight_NK, None).float())
            y_TN = (total_TN if op.bias_N is None else total_TN + op.bias_N).to(x_TK.dtype)
        else:
            y_TN = self._product(x_TK, op.weight_NK, op.bias_N)
        if op.gated:
            gated_TN = y_TN.new_empty((len(y_TN), y_TN.shape[1] // 2))
            silu_mul(y_TN, out=gated_TN, launch=self._table.pick("silu_mul", "bf16", "any"))
            y_TN = gated_TN
        if op.target is Buffer.HIDDEN:
            if not op.residual:
                activations.hidden_TD, activations.delta_TD = y_TN, None
                return
            self._settle(activations)
            activations.delta_TD = y_TN
        elif op.target is Buffer.QKV:
            activations.qkv_TN = y_TN
        elif op.target is Buffer.GATED:
            activations.gated_TN = y_TN
        else:
            activations.attended_TN = y_TN

    def _product(self, x_TK: Tensor, weight_NK: Weight, bias_N: Tensor | None) -> Tensor:
        if isinstance(weight_NK, QuantizedWeight):
            return quantized_product(x_TK, weight_NK, bias_N, self._table)
        # cuBLAS: the best product of bfloat16 matrices that there is.
        return linear(x_TK, weight_NK, bias_N)

    def _mixture(self, op: Mixture, activations: _Activations, inputs: StepInputs) -> None:
        assert self._loads_LX is not None
        group, experts = self._program.group, self._experts[op.layer]
        loads_X = self._loads_LX[op.layer]
        x_TD = self._normed(op.norm_D, activations.hidden_TD, activations.delta_TD)
        if group is not None and len(op.runs) > 1:

            def products(x_MD: Tensor, experts_M: Tensor) -> Tensor:
                if not len(x_MD):
                    return x_MD.float()
                return experts.products(x_MD, experts_M[:, None], self._table)[:, 0]

            sum_TD = expert_parallel_mixture(op, x_TD, group, loads_X, products)
        else:
            routing = route_reference(
                x_TD, op.router_XD, top_k=op.top_k, renormalise=op.renormalise
            )
            if group is None or group.rank == 0:
                # The padding of a captured step goes to experts, but does not count.
                counts_TC = (inputs.slots_T >= 0)[:, None].expand(routing.experts_TK.shape)
                loads_X.scatter_add_(0, routing.experts_TK.flatten(), counts_TC.flatten().long())
            sum_TD = experts.products(
                x_TD, routing.experts_TK, self._table, routing.weights_TK
            ).sum(dim=1)
            if group is not None:
                sum_TD = group.all_reduce(sum_TD)
        activations.delta_TD = sum_TD.to(torch.bfloat16)

    def _source(self, op: Linear, activations: _Activations) -> Tensor:
        if op.source is not Buffer.HIDDEN:
            found = {
                Buffer.QKV: activations.qkv_TN,
                Buffer.ATTENDED: activations.attended_TN,
                Buffer.GATED: activations.gated_TN,
            }[op.source]
            assert found is not None
            return found if op.norm_K is None else self._normed(op.norm_K, found, None)
        if op.norm_K is None:
            self._settle(activations)
            return activations.hidden_TD
        normed = self._normed(op.norm_K, activations.hidden_TD, activations.delta_TD)
        activations.delta_TD = None
        return normed

    def _settle(self, activations: _Activations) -> None:
        if activations.delta_TD is not None:
            activations.hidden_TD += activations.delta_TD
            activations.delta_TD = None

    def _normed(self, weight_K: Tensor, x: Tensor, delta_TK: Tensor | None) -> Tensor:
        out = torch.empty_like(x)
        launch = self._table.pick("rms_norm", "bf16", width_bucket(x.shape[-1]))
        eps = self._program.norm_eps
        rms_norm(x, weight_K, eps, out=out, delta_TK=delta_TK, launch=launch)
        return out

    def _logits(self, op: Linear, activations: _Activations, inputs: StepInputs) -> Tensor:
        assert op.source is Buffer.HIDDEN
        rows_R = inputs.logit_rows_R
        # Only the rows whose logits are wanted are normed.
        picked = _Activations(hidden_TD=activations.hidden_TD[rows_R])
        if activations.delta_TD is not None:
            picked.delta_TD = activations.delta_TD[rows_R]
        x_RK = self._source(op, picked)
        out = torch.empty(
            (len(rows_R), len(_plain(op.weight_NK))), dtype=torch.float32, device=x_RK.device
        )
        every_R = torch.arange(len(rows_R), dtype=torch.int32, device=x_RK.device)
        launch = self._table.pick("logits", "bf16", row_bucket(len(rows_R)))
        logits(x_RK, every_R, _plain(op.weight_NK), bias_V=op.bias_N, out=out, launch=launch)
        return self._gathered(out)

    def _gathered(self, logits_RV: Tensor) -> Tensor:
        """Every rank's logits side by side; they differ in width."""
        group, runs = self._program.group, self._program.vocab_runs
        if group is None:
            return logits_RV
        padded_RV = logits_RV.new_zeros((len(logits_RV), max(len(run) for run in runs)))
        padded_RV[:, : logits_RV.shape[1]] = logits_RV
        parts = group.all_gather(padded_RV)
        return torch.cat([part[:, : len(run)] for part, run in zip(parts, runs, strict=True)], 1)

    def _attend(
        self, op: Attend, activations: _Activations, inputs: StepInputs, pool: KvPool
    ) -> None:
        p, qkv_TN = self._program, activations.qkv_TN
        assert qkv_TN is not None
        tokens, queries = len(qkv_TN), p.heads * p.head_dim
        heads = qkv_TN.view(tokens, p.heads + 2 * p.kv_heads, p.head_dim)
        q_THE, turned = heads[:, : p.heads], heads[:, : p.heads + p.kv_heads]
        if op.q_norm_E is not None or op.k_norm_E is not None:
            launch = self._table.pick("rms_norm", "bf16", width_bucket(p.head_dim))
            k_TGE = heads[:, p.heads : p.heads + p.kv_heads]
            for norm_E, x in ((op.q_norm_E, q_THE), (op.k_norm_E, k_TGE)):
                if norm_E is not None:
                    rms_norm(x, norm_E, p.norm_eps, out=x, launch=launch)
        rope(
            turned,
            p.rope_cos_PE2,
            p.rope_sin_PE2,
            inputs.positions_T,
            launch=self._table.pick("rope", "bf16", "any"),
        )
        kv = PagedKv(
            pages_XKGPE=pages_of(pool)[:, op.layer],
            tables_XB=inputs.tables_XB,
            scale=p.attention_scale,
            window=op.window,
            scales_KG=op.kv_scales_KG,
        )
        kv_write(
            qkv_TN[:, queries:].view(tokens, 2, p.kv_heads, p.head_dim),
            kv.pages_XKGPE,
            inputs.slots_T,
            scales_KG=op.kv_scales_KG,
            launch=self._table.pick("kv_write", self._pages, "any"),
        )
        attended_TN = qkv_TN.new_empty((tokens, queries))
        out_THE = attended_TN.view(tokens, p.heads, p.head_dim)
        if inputs.decoding is not None:
            paged_attention(
                q_THE,
                kv,
                inputs.decoding,
                out=out_THE,
                scratch=self._scratch(inputs),
                launch=self._decode,
            )
        if inputs.prefill is not None:
            prefill_attention(q_THE, kv, inputs.prefill, out=out_THE, launch=self._prefill)
        activations.attended_TN = attended_TN

    def _scratch(self, inputs: StepInputs) -> Partials | None:
        assert inputs.decoding is not None
        splits = split_count(inputs.decoding.longest, self._decode)
        if splits == 1:
            return None
        shape = (len(inputs.decoding.rows_S), self._program.heads, splits)
        device = inputs.token_ids_T.device
        return Partials(
            attended_SHNE=torch.empty((*shape, self._program.head_dim), device=device),
            sums_SHN=torch.empty(shape, device=device),
        )


def _plain(weight: object) -> Tensor:
    assert isinstance(weight, Tensor), "the executor expands a quantised head"
    return weight


def pages_of(pool: KvPool) -> Tensor:
    """[X, L, 2, G, P, E] of a plain pool."""
    layout = pool.layout
    if layout.packing != "plain":
        raise ValueError(f"pages are plain on a GPU, not {layout.packing}")
    shape = (-1, layout.layers, 2, layout.kv_heads, layout.page, layout.head_dim)
    return pool.blocks_XB.view(getattr(torch, layout.dtype)).view(shape)
