"""A decoder as a program: five fused ops a layer, the same for every architecture and device.

    HIDDEN   = embed(tokens)
    per layer
      QKV      = norm(HIDDEN) @ qkv            (+ bias)
      ATTENDED = attention(rope(QKV), pages)   (q and k normed first in Qwen3; windowed in Mistral)
      HIDDEN  += ATTENDED @ o                  (+ bias)
      GATED    = silu(norm(HIDDEN) @ gate) * (norm(HIDDEN) @ up)
      HIDDEN  += GATED @ down
    LOGITS   = norm(HIDDEN) @ lm_head          (the embedding again, if tied)

The pre-norm decoder of Llama (Touvron et al. 2023): RMSNorm, rotary positions, grouped queries
(Ainslie et al. 2023), SwiGLU (Shazeer 2020).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fabric.kernels.program import Attend, Buffer, Embed, Linear, Op, Program
from fabric.model.config import DecoderConfig
from fabric.model.rope import rope_tables
from fabric.model.weights import Weights


def build_program(
    config: DecoderConfig,
    weights: Weights,
    dtype: torch.dtype,
    *,
    context_limit: int | None = None,
) -> Program:
    """The whole decoder in `dtype` (bfloat16 or float32), position tables for `context_limit`
    tokens (None: all that the model can do)."""
    load = Loader(weights, dtype)
    positions = min(context_limit or config.context_limit, config.context_limit)
    rope_cos_PE2, rope_sin_PE2 = rope_tables(config.rope, config.head_dim, positions)
    return Program(
        ops=tuple(_ops(config, load)),
        layers=config.layers,
        hidden=config.hidden,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        intermediate=config.intermediate,
        vocab=config.vocab,
        norm_eps=config.norm_eps,
        attention_scale=config.head_dim**-0.5,
        rope_cos_PE2=rope_cos_PE2,
        rope_sin_PE2=rope_sin_PE2,
    )


def _ops(config: DecoderConfig, load: Loader) -> Iterator[Op]:
    embedding_VD = load("model.embed_tokens.weight")
    yield Embed(table_VD=embedding_VD)
    for layer in range(config.layers):
        yield from _layer(config, load, layer)
    yield Linear(
        source=Buffer.HIDDEN,
        target=Buffer.LOGITS,
        norm_K=load("model.norm.weight"),
        weight_NK=embedding_VD if config.tied_embeddings else load("lm_head.weight"),
    )


def _layer(config: DecoderConfig, load: Loader, layer: int) -> Iterator[Op]:
    at = f"model.layers.{layer}."
    attention, mlp = at + "self_attn.", at + "mlp."
    qkv = [attention + name for name in ("q_proj", "k_proj", "v_proj")]
    gate_up = [mlp + name for name in ("gate_proj", "up_proj")]
    yield Linear(
        source=Buffer.HIDDEN,
        target=Buffer.QKV,
        norm_K=load(at + "input_layernorm.weight"),
        weight_NK=load.stacked(qkv, "weight"),
        bias_N=load.stacked(qkv, "bias") if config.qkv_bias else None,
    )
    yield Attend(
        layer=layer,
        q_norm_E=load(attention + "q_norm.weight") if config.qk_norm else None,
        k_norm_E=load(attention + "k_norm.weight") if config.qk_norm else None,
        window=config.windows[layer],
    )
    yield Linear(
        source=Buffer.ATTENDED,
        target=Buffer.HIDDEN,
        weight_NK=load(attention + "o_proj.weight"),
        bias_N=load(attention + "o_proj.bias") if config.output_bias else None,
        residual=True,
    )
    yield Linear(
        source=Buffer.HIDDEN,
        target=Buffer.GATED,
        norm_K=load(at + "post_attention_layernorm.weight"),
        weight_NK=load.stacked(gate_up, "weight"),
        bias_N=load.stacked(gate_up, "bias") if config.mlp_bias else None,
        gated=True,
    )
    yield Linear(
        source=Buffer.GATED,
        target=Buffer.HIDDEN,
        weight_NK=load(mlp + "down_proj.weight"),
        bias_N=load(mlp + "down_proj.bias") if config.mlp_bias else None,
        residual=True,
    )


class Loader:
    """Weights by name, in one dtype. A tensor already in that dtype stays a view of its file."""

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        self._weights = weights
        self._dtype = dtype

    def __call__(self, name: str) -> Tensor:
        return self._weights[name].to(self._dtype)

    def stacked(self, names: list[str], kind: str) -> Tensor:
        """Projections of the same input, one under the other: one product instead of three."""
        return torch.cat([self(f"{name}.{kind}") for name in names])
