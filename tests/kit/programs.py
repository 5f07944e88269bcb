"""Programs in other dtypes."""

from __future__ import annotations

from dataclasses import fields, replace

from torch import Tensor

from fabric.kernels.program import Op, Program


def widened(program: Program) -> Program:
    """The same weights, in float32: what a bfloat16 run is compared with."""
    return replace(program, ops=tuple(_widened(op) for op in program.ops))


def _widened(op: Op) -> Op:
    tensors = {field.name: getattr(op, field.name) for field in fields(op)}
    return replace(
        op, **{name: value.float() for name, value in tensors.items() if isinstance(value, Tensor)}
    )
