"""Linear layers: y = x @ weight^T + bias. Weights are [N, K], as checkpoints store them.

On a GPU the layers inside are torch's (cuBLAS is the best bfloat16 product there is for them); the
head is a kernel of our own, because it reads only the rows that want logits, and gives float32.

Shape legend: T tokens, R rows whose logits are wanted, V vocab (or one shard of it), N out, K in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from fabric.kernels.launch import Launch
from fabric.kernels.quantized import QuantizedWeight, Weight, WeightFormat
from fabric.kernels.quantized_linear import (
    quantized_linear_reference,
    spread_linear_reference,
)
from fabric.kernels.summation import ChunkedSum

# Rows of the vocabulary widened to float32 at a time: bounds the copy to 16,384 * K * 4 bytes.
VOCAB_ROWS = 16_384


def linear_reference(
    x_TK: Tensor,
    weight_NK: Weight,
    bias_N: Tensor | None = None,
    *,
    chunked: ChunkedSum | None = None,
) -> Tensor:
    """[T, N] in the dtype of `x_TK`. `chunked`: of one worker that has all inputs; it makes a
    difference for weights of integers only."""
    if not isinstance(weight_NK, QuantizedWeight):
        return linear(x_TK, weight_NK, bias_N)
    if chunked is None or weight_NK.format is WeightFormat.FP8:
        y_TN = quantized_linear_reference(x_TK, weight_NK)
    else:
        y_TN = sum_of_pieces(x_TK, weight_NK, chunked)
    return (y_TN if bias_N is None else y_TN + bias_N.float()).to(x_TK.dtype)


def sum_of_pieces(
    x_TK: Tensor, weight_NK: QuantizedWeight, chunked: ChunkedSum, rank: int = 0
) -> Tensor:
    """float32 [T, N]: a rank's part of a product whose inputs are spread."""
    return torch.stack(spread_linear_reference(x_TK, weight_NK, chunked, rank)).sum(dim=0)


def logits_reference(x_RK: Tensor, weight_VK: Weight, bias_V: Tensor | None = None) -> Tensor:
    """float32 [R, V]. Products of narrow inputs, but sums and results are float32: logits near 16
    in bfloat16 are 0.06 to 0.125 apart, so rounding them would make ties between tokens."""
    if isinstance(weight_VK, QuantizedWeight):
        logits_RV = quantized_linear_reference(x_RK, weight_VK)
        return logits_RV if bias_V is None else logits_RV + bias_V.float()
    wide = x_RK.float()
    parts = [linear(wide, rows.float()) for rows in weight_VK.split(VOCAB_ROWS)]
    logits_RV = torch.cat(parts, dim=-1)
    return logits_RV if bias_V is None else logits_RV + bias_V.float()


@triton.jit
def logits_kernel(
    x_ptr: tl.tensor,
    row_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    out_row: tl.tensor,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """BLOCK_M rows by BLOCK_N tokens of the vocabulary a program. Row blocks are the fast axis of
    the grid, so that programs that share weights run together."""
    row_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    at_K = tl.arange(0, BLOCK_K)
    token_M = tl.load(row_ptr + row_M, mask=row_M < rows, other=0).to(tl.int64)
    x_at = x_ptr + token_M[:, None] * inputs + at_K[None, :]
    weight_at = weight_ptr + col_N.to(tl.int64)[None, :] * inputs + at_K[:, None]
    sum_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, inputs, BLOCK_K):
        inside = start + at_K < inputs
        x = tl.load(x_at + start, mask=(row_M < rows)[:, None] & inside[None, :], other=0.0)
        weight_mask = inside[:, None] & (col_N < outputs)[None, :]
        weight = tl.load(weight_at + start, mask=weight_mask, other=0.0)
        sum_MN = tl.dot(x, weight, sum_MN, input_precision="ieee")
    if HAS_BIAS:
        bias = tl.load(bias_ptr + col_N, mask=col_N < outputs, other=0.0).to(tl.float32)
        sum_MN += bias[None, :]
    mask = (row_M < rows)[:, None] & (col_N < outputs)[None, :]
    tl.store(out_ptr + row_M.to(tl.int64)[:, None] * out_row + col_N[None, :], sum_MN, mask=mask)


def logits(
    x_TK: Tensor,
    rows_R: Tensor,
    weight_VK: Tensor,
    *,
    bias_V: Tensor | None = None,
    out: Tensor,
    launch: Launch,
) -> None:
    """out = x[rows] @ weight^T + bias in float32 sums; `rows_R` int32, `out` float32 [R, V], rows
    any stride apart: a shard of the vocabulary writes its columns of the whole."""
    rows, outputs = out.shape
    if not x_TK.is_contiguous() or not weight_VK.is_contiguous() or out.stride(1) != 1:
        raise ValueError("logits needs inputs, weights and output rows without gaps")
    block_m, block_n = launch.size("BLOCK_M"), launch.size("BLOCK_N")
    logits_kernel[(triton.cdiv(rows, block_m), triton.cdiv(outputs, block_n))](
        x_TK,
        rows_R,
        weight_VK,
        weight_VK if bias_V is None else bias_V,
        out,
        rows,
        outputs,
        x_TK.shape[1],
        out.stride(0),
        HAS_BIAS=bias_V is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=launch.size("BLOCK_K"),
        **launch.options(),
    )
