"""A decoder as a program: five fused ops a layer, the same for every architecture and device.

    HIDDEN   = embed(tokens)
    per layer
      QKV      = norm(HIDDEN) @ qkv            (+ bias)
      ATTENDED = attention(rope(QKV), pages)   (q and k normed first in Qwen3; windowed in Mistral)
      HIDDEN  += ATTENDED @ o                  (+ bias)
      GATED    = silu(norm(HIDDEN) @ gate) * (norm(HIDDEN) @ up)
      HIDDEN  += GATED @ down                (or, for both, a mixture of experts)
    LOGITS   = norm(HIDDEN) @ lm_head          (the embedding again, if tied)

A worker of a group gets the program of its `Share`: the same ops over slices of the weights.

The pre-norm decoder of Llama (Touvron et al. 2023): RMSNorm, rotary positions, grouped queries
(Ainslie et al. 2023), SwiGLU (Shazeer 2020).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import overload

import torch
from torch import Tensor

from fabric.core.errors import ModelError
from fabric.core.shard import Place
from fabric.kernels.collective import Collective
from fabric.kernels.program import (
    Attend,
    Buffer,
    Embed,
    Enter,
    Leave,
    Linear,
    Mixture,
    Op,
    Program,
)
from fabric.kernels.quantized import (
    QuantizedWeight,
    Weight,
    WeightFormat,
    expand,
    quantize_weight,
    stack_weights,
)
from fabric.kernels.quantized_program import HEAD_SCHEMES, SCHEMES
from fabric.model.config import DecoderConfig
from fabric.model.parallel import Share, share_of
from fabric.model.quantized_weights import read_quantized
from fabric.model.rope import rope_tables
from fabric.model.weights import Weights


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Member:
    """One of several workers of a model. `group`: those of its pipeline stage, `place` among them
    included; None: it has the stage to itself."""

    place: Place
    group: Collective | None = None


def build_program(
    config: DecoderConfig,
    weights: Weights,
    dtype: torch.dtype,
    *,
    context_limit: int | None = None,
    member: Member | None = None,
    rounding: str | None = None,
) -> Program:
    """The decoder in `dtype` (bfloat16 or float32), position tables for `context_limit` tokens
    (None: all that the model can do). `rounding`: a key of `SCHEMES`, the format that the matrices
    of `Linear`s are rounded to, as a checkpoint of it would hold them.

    `member`: that worker's share only (None: it is alone). Raises `ModelError` if the model can't
    be spread that far, or is to be rounded again.
    """
    share = share_of(config, member.place if member else None)
    if config.quantization is not None and rounding is not None:
        raise ModelError("the model's weights are quantised already")
    positions = min(context_limit or config.context_limit, config.context_limit)
    rope_cos_PE2, rope_sin_PE2 = rope_tables(config.rope, config.head_dim, positions)
    return Program(
        ops=DecoderOps(config, weights, dtype, share, rounding),
        layers=len(share.layers),
        hidden=config.hidden,
        heads=len(share.heads),
        kv_heads=len(share.kv_heads),
        head_dim=config.head_dim,
        intermediate=len(share.mlp_columns),
        vocab=config.vocab,
        norm_eps=config.norm_eps,
        attention_scale=config.head_dim**-0.5,
        rope_cos_PE2=rope_cos_PE2,
        rope_sin_PE2=rope_sin_PE2,
        vocab_runs=share.vocab_runs,
        group=member.group if member else None,
    )


def matrix_modules(config: DecoderConfig) -> Iterator[list[str]]:
    """For each `Linear` of the whole program, in order, the modules whose matrices it stacks."""
    for layer in range(config.layers):
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        yield [attention + name for name in ("q_proj", "k_proj", "v_proj")]
        yield [attention + "o_proj"]
        if not config.is_mixture(layer):
            yield [mlp + name for name in ("gate_proj", "up_proj")]
            yield [mlp + "down_proj"]
    yield ["lm_head"]


class DecoderOps(Sequence[Op]):
    """The ops of a share. A walk through them reads the weights one op at a time and, when it goes
    on, lets the pages of the last one's file go: who copies what it needs (the C++ path packs it)
    never has more than one op in memory twice."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: Weights,
        dtype: torch.dtype,
        share: Share,
        rounding: str | None = None,
    ) -> None:
        self._config = config
        self._weights = weights
        self._dtype = dtype
        self._share = share
        self._rounding = rounding

    def __len__(self) -> int:
        config = self._config
        return 2 + sum(4 if config.is_mixture(layer) else 5 for layer in self._share.layers)

    @overload
    def __getitem__(self, index: int) -> Op: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Op]: ...
    def __getitem__(self, index: int | slice) -> Op | Sequence[Op]:
        if isinstance(index, slice):
            return tuple(self)[index]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        return next(islice(iter(self), index, None))

    def __iter__(self) -> Iterator[Op]:
        load = Loader(self._config, self._weights, self._dtype, self._rounding)
        for op in self._walk(load):
            yield op
            load.release()

    def _walk(self, load: Loader) -> Iterator[Op]:
        config, share = self._config, self._share
        vocabulary = share.vocab_runs[share.rank] if share.vocab_runs else range(config.vocab)
        embedding = "model.embed_tokens.weight"
        tied_VD: Weight | None = None
        if share.is_first_stage:
            table_VD = load.rows(embedding, vocabulary)
            if config.tied_embeddings and share.is_last_stage and self._rounding is None:
                tied_VD = table_VD
            yield Embed(table_VD=table_VD, tied=tied_VD is not None)
            del table_VD
        else:
            yield Enter()
        for layer in share.layers:
            yield from _layer(config, load, share, layer)
        if not share.is_last_stage:
            yield Leave()
            return
        if tied_VD is None:
            name = "model.embed_tokens" if config.tied_embeddings else "lm_head"
            tied_VD = load.head(name, vocabulary)
        else:
            load.mark(embedding)
        yield Linear(
            source=Buffer.HIDDEN,
            target=Buffer.LOGITS,
            norm_K=load("model.norm.weight"),
            weight_NK=tied_VD,
        )


def _layer(config: DecoderConfig, load: Loader, share: Share, layer: int) -> Iterator[Op]:
    at = f"model.layers.{layer}."
    attention, head_dim = at + "self_attn.", config.head_dim
    queries = range(share.heads.start * head_dim, share.heads.stop * head_dim)
    keys = range(share.kv_heads.start * head_dim, share.kv_heads.stop * head_dim)
    qkv = [(attention + "q_proj", queries), (attention + "k_proj", keys)]
    qkv.append((attention + "v_proj", keys))
    yield Linear(
        source=Buffer.HIDDEN,
        target=Buffer.QKV,
        norm_K=load(at + "input_layernorm.weight"),
        weight_NK=load.matrix(qkv),
        bias_N=load.stacked(qkv, "bias") if config.qkv_bias else None,
    )
    yield Attend(
        layer=layer - share.layers.start,
        q_norm_E=load(attention + "q_norm.weight") if config.qk_norm else None,
        k_norm_E=load(attention + "k_norm.weight") if config.qk_norm else None,
        window=config.windows[layer],
    )
    yield Linear(
        source=Buffer.ATTENDED,
        target=Buffer.HIDDEN,
        weight_NK=load.spread(attention + "o_proj", queries),
        bias_N=load(attention + "o_proj.bias") if config.output_bias else None,
        residual=True,
        chunked=share.attention,
    )
    if config.is_mixture(layer):
        yield _mixture(config, load, share, layer)
    else:
        yield from _mlp(config, load, share, layer)


def _mlp(config: DecoderConfig, load: Loader, share: Share, layer: int) -> Iterator[Op]:
    at = f"model.layers.{layer}."
    gate_up = [(f"{at}mlp.{name}", share.mlp_columns) for name in ("gate_proj", "up_proj")]
    yield Linear(
        source=Buffer.HIDDEN,
        target=Buffer.GATED,
        norm_K=load(at + "post_attention_layernorm.weight"),
        weight_NK=load.matrix(gate_up),
        bias_N=load.stacked(gate_up, "bias") if config.mlp_bias else None,
        gated=True,
    )
    yield Linear(
        source=Buffer.GATED,
        target=Buffer.HIDDEN,
        weight_NK=load.spread(at + "mlp.down_proj", share.mlp_columns),
        bias_N=load(at + "mlp.down_proj.bias") if config.mlp_bias else None,
        residual=True,
        chunked=share.mlp,
    )


def _mixture(config: DecoderConfig, load: Loader, share: Share, layer: int) -> Mixture:
    mixture = config.mixture
    assert mixture is not None
    at, names, columns = f"model.layers.{layer}.", mixture.names, share.expert_columns
    experts = [at + names.expert.format(expert) for expert in share.experts]
    return Mixture(
        layer=layer - share.layers.start,
        norm_D=load(at + "post_attention_layernorm.weight"),
        router_XD=load(f"{at}{names.router}.weight"),
        gate_up_ND=tuple(
            load.stacked([(each + names.gate, columns), (each + names.up, columns)], "weight")
            for each in experts
        ),
        down_DN=tuple(load.columns(f"{each}{names.down}.weight", columns) for each in experts),
        top_k=mixture.chosen,
        renormalise=mixture.renormalise,
        runs=share.expert_runs,
    )


class Loader:
    """Weights by name, in one dtype. A tensor already in that dtype stays a view of its file, where
    its slice is contiguous. Matrices of `Linear`s are rounded if the decoder is."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: Weights,
        dtype: torch.dtype,
        rounding: str | None = None,
    ) -> None:
        self._config = config
        self._weights = weights
        self._dtype = dtype
        self._scheme = None if rounding is None else SCHEMES[rounding]
        self._head_scheme = self._scheme and HEAD_SCHEMES.get(rounding or "", self._scheme)
        self._used: list[str] = []

    def __call__(self, name: str) -> Tensor:
        self._used.append(name)
        return self._weights[name].to(self._dtype)

    def rows(self, name: str, rows: range) -> Tensor:
        """Some outputs of a projection: one run of the file."""
        self._used.append(name)
        return self._weights[name][rows.start : rows.stop].to(self._dtype)

    def columns(self, name: str, columns: range) -> Tensor:
        """Some inputs of a projection."""
        self._used.append(name)
        part = self._weights[name][:, columns.start : columns.stop]
        return part.to(self._dtype).contiguous()

    def stacked(self, parts: Sequence[tuple[str, range]], kind: str) -> Tensor:
        """Rows of projections of the same input, one under the other: one product, not three."""
        return torch.cat([self.rows(f"{name}.{kind}", rows) for name, rows in parts])

    def matrix(self, parts: Sequence[tuple[str, range]]) -> Weight:
        """Rows of the matrices of these modules, one under the other, quantised as they are stored.
        Where they differ in format, they all become plain tensors."""
        if self._scheme is not None:
            return quantize_weight(self.stacked(parts, "weight"), self._scheme)
        found = [self._part(name, rows) for name, rows in parts]
        quantized = [part for part in found if isinstance(part, QuantizedWeight)]
        if len(quantized) == len(found):
            stacked = stack_weights(quantized)
            if stacked is not None:
                return stacked
        plain = [expand(p, self._dtype) if isinstance(p, QuantizedWeight) else p for p in found]
        return plain[0] if len(plain) == 1 else torch.cat(plain)

    def head(self, name: str, vocabulary: range) -> Weight:
        """Rows of the matrix that makes the logits."""
        if self._head_scheme is not None:
            return quantize_weight(self.rows(f"{name}.weight", vocabulary), self._head_scheme)
        return self.matrix([(name, vocabulary)])

    def spread(self, name: str, columns: range) -> Weight:
        """The inputs `columns` of one matrix. It is rounded before it is cut: the same numbers for
        any number of workers."""
        rows, inputs = self._config.matrix_shape(name)
        if self._config.storage_of(name) is None and self._scheme is None:
            return self.columns(f"{name}.weight", columns)
        if self._scheme is not None:
            whole: Weight = quantize_weight(self.rows(f"{name}.weight", range(rows)), self._scheme)
        else:
            whole = self._part(name, range(rows))
        assert isinstance(whole, QuantizedWeight)
        if columns == range(inputs):
            return whole
        if whole.format is WeightFormat.INT4 and (columns.start % 8 or len(columns) % 8):
            plain = expand(whole, self._dtype)
            return plain[:, columns.start : columns.stop].contiguous()
        return whole.columns(columns.start, columns.stop)

    def _part(self, name: str, rows: range) -> Weight:
        storage = self._config.storage_of(name)
        if storage is None:
            return self.rows(f"{name}.weight", rows)
        whole = read_quantized(self._stored, name, self._config.matrix_shape(name), storage)
        return whole.rows(rows.start, rows.stop)

    def _stored(self, name: str) -> Tensor:
        self._used.append(name)
        return self._weights[name]

    def mark(self, name: str) -> None:
        """This tensor is read again by the op that comes now."""
        self._used.append(name)

    def release(self) -> None:
        """The file pages of what was loaded since the last time are not needed for now."""
        for name in self._used:
            self._weights.release(name)
        self._used.clear()
