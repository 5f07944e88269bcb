"""A decoder program with random weights of any shape: what benchmarks and kernel tests run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fabric.kernels.program import Attend, Buffer, Embed, Linear, Op, Program


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramShape:
    """Sizes and options of a decoder. The defaults are tiny."""

    layers: int = 2
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    intermediate: int = 96
    vocab: int = 160
    positions: int = 512
    tied: bool = False
    bias: bool = False
    head_norms: bool = False
    window: int | None = None


SMOLLM2_135M = ProgramShape(
    layers=30,
    hidden=576,
    heads=9,
    kv_heads=3,
    head_dim=64,
    intermediate=1536,
    vocab=49152,
    positions=2048,
    tied=True,
)


def random_program(
    shape: ProgramShape, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Program:
    """Weights are scaled so that activations stay near 1: attention is neither flat nor one-hot."""
    draw = _Draw(dtype, seed)
    queries = shape.heads * shape.head_dim
    projected = queries + 2 * shape.kv_heads * shape.head_dim
    table_VD = draw.matrix(shape.vocab, shape.hidden)
    ops: list[Op] = [Embed(table_VD=table_VD, tied=shape.tied)]
    for layer in range(shape.layers):
        ops += [
            Linear(
                source=Buffer.HIDDEN,
                target=Buffer.QKV,
                weight_NK=draw.matrix(projected, shape.hidden),
                bias_N=draw.vector(projected, 0.5) if shape.bias else None,
                norm_K=draw.norm(shape.hidden),
            ),
            Attend(
                layer=layer,
                q_norm_E=draw.norm(shape.head_dim) if shape.head_norms else None,
                k_norm_E=draw.norm(shape.head_dim) if shape.head_norms else None,
                window=shape.window,
            ),
            Linear(
                source=Buffer.ATTENDED,
                target=Buffer.HIDDEN,
                weight_NK=draw.matrix(shape.hidden, queries),
                bias_N=draw.vector(shape.hidden, 0.5) if shape.bias else None,
                residual=True,
            ),
            Linear(
                source=Buffer.HIDDEN,
                target=Buffer.GATED,
                weight_NK=draw.matrix(2 * shape.intermediate, shape.hidden),
                bias_N=draw.vector(2 * shape.intermediate, 0.5) if shape.bias else None,
                norm_K=draw.norm(shape.hidden),
                gated=True,
            ),
            Linear(
                source=Buffer.GATED,
                target=Buffer.HIDDEN,
                weight_NK=draw.matrix(shape.hidden, shape.intermediate),
                residual=True,
            ),
        ]
    ops.append(
        Linear(
            source=Buffer.HIDDEN,
            target=Buffer.LOGITS,
            weight_NK=table_VD if shape.tied else draw.matrix(shape.vocab, shape.hidden),
            norm_K=draw.norm(shape.hidden),
        )
    )
    angles_PE2 = torch.arange(shape.positions)[:, None] * 10000.0 ** -(
        torch.arange(shape.head_dim // 2) / (shape.head_dim // 2)
    )
    return Program(
        ops=tuple(ops),
        layers=shape.layers,
        hidden=shape.hidden,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate=shape.intermediate,
        vocab=shape.vocab,
        norm_eps=1e-5,
        attention_scale=shape.head_dim**-0.5,
        rope_cos_PE2=angles_PE2.cos(),
        rope_sin_PE2=angles_PE2.sin(),
    )


class _Draw:
    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self._dtype = dtype
        self._generator = torch.Generator().manual_seed(seed)

    def vector(self, size: int, scale: float) -> Tensor:
        return (torch.randn(size, generator=self._generator) * scale).to(self._dtype)

    def norm(self, size: int) -> Tensor:
        return (1.0 + torch.randn(size, generator=self._generator) * 0.1).to(self._dtype)

    def matrix(self, outputs: int, inputs: int) -> Tensor:
        noise = torch.randn(outputs, inputs, generator=self._generator)
        return (noise * inputs**-0.5).to(self._dtype)
