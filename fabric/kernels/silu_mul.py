"""SwiGLU's gate: y = silu(gate) * up (Shazeer 2020)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu


def silu_mul_reference(gate_up_TN: Tensor) -> Tensor:
    """[T, N / 2] from the gate (first half of the columns) and up (second half); rounded once."""
    gate, up = gate_up_TN.float().chunk(2, dim=-1)
    return (silu(gate) * up).to(gate_up_TN.dtype)
