"""Programs whose weights change format as a whole, op by op while they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch

from fabric.kernels.program import Buffer, Embed, Linear, Op, Program
from fabric.kernels.quantized import (
    Activations,
    QuantizedWeight,
    Scheme,
    WeightFormat,
    expand,
    quantize_weight,
)

# What needs no calibration: rounding to the nearest. By name, as config and benchmark say it.
SCHEMES: Mapping[str, Scheme] = {
    "fp8": Scheme(format=WeightFormat.FP8, activations=Activations.TOKEN),
    "int8": Scheme(format=WeightFormat.INT8, activations=Activations.KEPT),
    "int8_activations": Scheme(format=WeightFormat.INT8, activations=Activations.TOKEN),
    "int4": Scheme(
        format=WeightFormat.INT4, activations=Activations.GROUP, columns=32, minimum=True
    ),
}
# The head's own, where it has one: 4 bits in it cost the demo model nine tenths of the loss that
# they cost in all, for a fifth of the weights (fabric/DESIGN.md, Q4).
HEAD_SCHEMES: Mapping[str, Scheme] = {"int4": SCHEMES["int8"]}


def quantize_program(program: Program, name: str) -> Program:
    """Every matrix of a `Linear` that is a plain tensor, rounded by the scheme of that name. The
    embedding's table stays, a tied one too, and so do a mixture's experts."""
    scheme = SCHEMES[name]
    head = HEAD_SCHEMES.get(name, scheme)

    def quantized(op: Op) -> Op:
        if isinstance(op, Embed):
            return replace(op, tied=False)
        if not isinstance(op, Linear) or isinstance(op.weight_NK, QuantizedWeight):
            return op
        chosen = head if op.target is Buffer.LOGITS else scheme
        return replace(op, weight_NK=quantize_weight(op.weight_NK, chosen))

    return replace(program, ops=MappedOps(program.ops, quantized))


def expand_program(
    program: Program, weight_format: WeightFormat, dtype: torch.dtype, say: Callable[[str], None]
) -> Program:
    """Weights of this format as plain tensors; activations stay too. `say` is told if there are
    any, once."""
    said: list[str] = []

    def expanded(op: Op) -> Op:
        if not isinstance(op, Linear) or not isinstance(op.weight_NK, QuantizedWeight):
            return op
        if op.weight_NK.format is not weight_format:
            return op
        if not said:
            said.append(f"{weight_format} weights are expanded to {dtype}".replace("torch.", ""))
            say(said[0])
        return replace(op, weight_NK=expand(op.weight_NK, dtype))

    return replace(program, ops=MappedOps(program.ops, expanded))


@dataclass(frozen=True, slots=True)
class MappedOps(Sequence[Op]):
    """Ops that are changed when they are looked at, so that one at a time is in memory."""

    ops: Sequence[Op]
    change: Callable[[Op], Op]

    def __len__(self) -> int:
        return len(self.ops)

    @overload
    def __getitem__(self, index: int) -> Op: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Op]: ...
    def __getitem__(self, index: int | slice) -> Op | Sequence[Op]:
        """The changed op, or a lazy slice."""
        if isinstance(index, slice):
            return MappedOps(self.ops[index], self.change)
        return self.change(self.ops[index])

    def __iter__(self) -> Iterator[Op]:
        """In one pass: the ops behind it may load anew from the first one for each index."""
        return map(self.change, self.ops)
