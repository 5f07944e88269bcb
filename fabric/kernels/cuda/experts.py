"""A mixture of experts on a GPU: the router in torch, two grouped products, no look at a value, so
that a step with experts can be captured.

Shape legend: T tokens, C experts chosen by each, A pairs of both, W experts here, D hidden, N
columns of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fabric.kernels.launch_table import LaunchTable, row_bucket
from fabric.kernels.moe_gemm import moe_gemm, schedule_experts
from fabric.kernels.program import Mixture
from fabric.kernels.silu_mul import silu_mul


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Experts:
    """Those of one layer that are here, side by side: `gate_up` [W, 2 * N, D], `down` [W, D, N]."""

    gate_up: Tensor
    down: Tensor

    @staticmethod
    def of(op: Mixture, device: torch.device) -> Experts:
        """On `device`. Raises `ValueError` where there are none, or not in bfloat16."""
        if not op.gate_up_ND:
            raise ValueError("a worker without experts")
        if any(each.dtype != torch.bfloat16 for each in (*op.gate_up_ND, *op.down_DN)):
            raise ValueError("experts are not bfloat16")
        return Experts(
            gate_up=torch.stack(op.gate_up_ND).to(device), down=torch.stack(op.down_DN).to(device)
        )

    def products(
        self, x_TD: Tensor, experts_TC: Tensor, table: LaunchTable, weights_TC: Tensor | None = None
    ) -> Tensor:
        """float32 [T, C, D]: each token through its experts, numbered as they are here, times its
        weights."""
        tokens, chosen = experts_TC.shape
        pairs, width = tokens * chosen, x_TD.shape[1]
        launch = table.pick("moe_gemm", "bf16", row_bucket(-(-pairs // len(self.down))))
        schedule = schedule_experts(experts_TC, len(self.down), launch.size("BLOCK_M"))
        both = x_TD.new_empty((pairs, self.gate_up.shape[1]))
        moe_gemm(x_TD, self.gate_up, schedule, out_AN=both, launch=launch)
        gated = x_TD.new_empty((pairs, self.down.shape[2]))
        silu_mul(both, out=gated, launch=table.pick("silu_mul", "bf16", "any"))
        out_AD = torch.empty((pairs, width), dtype=torch.float32, device=x_TD.device)
        routing_A = None if weights_TC is None else weights_TC.flatten().contiguous()
        moe_gemm(gated, self.down, schedule, out_AN=out_AD, routing_A=routing_A, launch=launch)
        return out_AD.view(tokens, chosen, width)
