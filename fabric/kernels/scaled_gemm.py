"""Products of fp8 or int8 matrices with scales: y = (a * a_scale) @ (b * b_scale)^T + bias.

Scales are per token (of a) times per channel (of b), or per 128 columns of a token times per 128 x
128 block of b (DeepSeek-V3, 2024). Sums are float32 (int8: int32, exact), the result bfloat16.

Two kernels: the plain one for every device, and one for sm_90 that reads through TMA descriptors
and keeps each program busy with tile after tile. `fabric.kernels.launch_table` says which is used.

Shape legend: M rows (tokens), N out, K in, J groups of 128 in K, I groups of 128 in N.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fabric.kernels.launch import Launch

GROUP = 128  # columns, and rows of b, that share a block scale


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scaled:
    """A quantized matrix [rows, K], contiguous, and its float32 scales: [rows, 1], [rows, J], or
    for weights with block scales [I, J]."""

    values: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        if not self.values.is_contiguous() or not self.scales.is_contiguous():
            raise ValueError("quantized matrices and their scales have no gaps")


def scaled_gemm_reference(a: Scaled, b: Scaled, bias_N: Tensor | None = None) -> Tensor:
    """bfloat16 [M, N]: both operands expanded to float32, one product, rounded once."""
    y_MN = expanded(a) @ expanded(b).T
    return (y_MN if bias_N is None else y_MN + bias_N.float()).to(torch.bfloat16)


def expanded(matrix: Scaled) -> Tensor:
    """float32 [rows, K]: the numbers that a quantized matrix stands for."""
    rows, columns = matrix.values.shape
    scales = matrix.scales
    if scales.shape[0] != rows:
        scales = scales.repeat_interleave(GROUP, dim=0)[:rows]
    if scales.shape[1] > 1:
        scales = scales.repeat_interleave(GROUP, dim=1)[:, :columns]
    return matrix.values.float() * scales


@triton.jit
def scaled_gemm_kernel(
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    a_scale_ptr: tl.tensor,
    b_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    groups: tl.tensor,
    BLOCKED: tl.constexpr,
    INTEGER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One tile of the result a program; row blocks are the fast axis, so that programs that share
    weights run together. SWAP computes the transposed tile: weights then fill the 64 or 128 rows
    that Hopper's wgmma wants, and as few as 16 tokens its columns."""
    row_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    at_K = tl.arange(0, BLOCK_K)
    a_at = a_ptr + row_M.to(tl.int64)[:, None] * inputs + at_K[None, :]
    b_at = b_ptr + col_N.to(tl.int64)[:, None] * inputs + at_K[None, :]
    row_mask = row_M < rows
    col_mask = col_N < outputs
    if SWAP:
        sums = tl.zeros([BLOCK_N, BLOCK_M], tl.int32 if INTEGER else tl.float32)
    else:
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if INTEGER else tl.float32)
    for start in range(0, inputs, BLOCK_K):
        inside = start + at_K < inputs
        a = tl.load(a_at + start, mask=row_mask[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_at + start, mask=col_mask[:, None] & inside[None, :], other=0.0)
        if BLOCKED:
            group = start // 128
            a_scale = tl.load(a_scale_ptr + row_M * groups + group, mask=row_mask, other=0.0)
            b_scale = tl.load(b_scale_ptr + col_N // 128 * groups + group, mask=col_mask, other=0.0)
            if SWAP:
                sums += tl.dot(b, a.T) * b_scale[:, None] * a_scale[None, :]
            else:
                sums += tl.dot(a, b.T) * a_scale[:, None] * b_scale[None, :]
        elif INTEGER:
            sums = (
                tl.dot(b, a.T, sums, out_dtype=tl.int32)
                if SWAP
                else tl.dot(a, b.T, sums, out_dtype=tl.int32)
            )
        elif SWAP:
            # Hopper's fp8 tensor cores keep 14 bits of a sum: after 128 products it is added to a
            # float32 one outside.
            sums = tl.dot(b, a.T, sums, max_num_imprecise_acc=128)
        else:
            sums = tl.dot(a, b.T, sums, max_num_imprecise_acc=128)
    result = sums.to(tl.float32)
    if SWAP:
        result = tl.trans(result)
    if not BLOCKED:
        a_scale = tl.load(a_scale_ptr + row_M, mask=row_mask, other=0.0)
        b_scale = tl.load(b_scale_ptr + col_N, mask=col_mask, other=0.0)
        result = result * a_scale[:, None] * b_scale[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + col_N, mask=col_mask, other=0.0).to(tl.float32)
        result += bias[None, :]
    out_at = out_ptr + row_M.to(tl.int64)[:, None] * outputs + col_N[None, :]
    mask = row_mask[:, None] & col_mask[None, :]
    tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def scaled_gemm_tma_kernel(
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    a_scale_ptr: tl.tensor,
    b_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    groups: tl.tensor,
    BLOCKED: tl.constexpr,
    INTEGER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """As many programs as the GPU runs at once, each with every PROGRAMS-th tile. Needs K and N in
    multiples of 16 (a descriptor's rows are 16-byte aligned)."""
    a_tiles = tl.make_tensor_descriptor(
        a_ptr, shape=[rows, inputs], strides=[inputs, 1], block_shape=[BLOCK_M, BLOCK_K]
    )
    b_tiles = tl.make_tensor_descriptor(
        b_ptr, shape=[outputs, inputs], strides=[inputs, 1], block_shape=[BLOCK_N, BLOCK_K]
    )
    out_tiles = tl.make_tensor_descriptor(
        out_ptr, shape=[rows, outputs], strides=[outputs, 1], block_shape=[BLOCK_M, BLOCK_N]
    )
    row_blocks = tl.cdiv(rows, BLOCK_M)
    for tile in tl.range(
        tl.program_id(0), row_blocks * tl.cdiv(outputs, BLOCK_N), PROGRAMS, flatten=not BLOCKED
    ):
        first_row = tile % row_blocks * BLOCK_M
        first_col = tile // row_blocks * BLOCK_N
        row_M = first_row + tl.arange(0, BLOCK_M)
        col_N = first_col + tl.arange(0, BLOCK_N)
        row_mask = row_M < rows
        col_mask = col_N < outputs
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if INTEGER else tl.float32)
        for start in range(0, inputs, BLOCK_K):
            a = a_tiles.load([first_row, start])
            b = b_tiles.load([first_col, start])
            if BLOCKED:
                group = start // 128
                a_scale = tl.load(a_scale_ptr + row_M * groups + group, mask=row_mask, other=0.0)
                b_at = b_scale_ptr + col_N // 128 * groups + group
                b_scale = tl.load(b_at, mask=col_mask, other=0.0)
                sums += tl.dot(a, b.T) * a_scale[:, None] * b_scale[None, :]
            elif INTEGER:
                sums = tl.dot(a, b.T, sums, out_dtype=tl.int32)
            else:
                sums = tl.dot(a, b.T, sums, max_num_imprecise_acc=128)
        result = sums.to(tl.float32)
        if not BLOCKED:
            a_scale = tl.load(a_scale_ptr + row_M, mask=row_mask, other=0.0)
            b_scale = tl.load(b_scale_ptr + col_N, mask=col_mask, other=0.0)
            result = result * a_scale[:, None] * b_scale[None, :]
        if HAS_BIAS:
            bias = tl.load(bias_ptr + col_N, mask=col_mask, other=0.0).to(tl.float32)
            result += bias[None, :]
        out_tiles.store([first_row, first_col], result.to(out_ptr.dtype.element_ty))


def scaled_gemm(
    a: Scaled, b: Scaled, *, bias_N: Tensor | None = None, out: Tensor, launch: Launch
) -> None:
    """out = a @ b^T + bias, scaled; `out` contiguous, bfloat16 [M, N].

    A launch with PROGRAMS takes the TMA kernel, but for shapes that a descriptor cannot hold.
    """
    rows, inputs = a.values.shape
    outputs = b.values.shape[0]
    block_m, block_n = launch.size("BLOCK_M"), launch.size("BLOCK_N")
    blocked = b.scales.shape[0] != outputs or b.scales.shape[1] > 1
    groups = -(-inputs // GROUP) if blocked else 1
    expected = ((rows, groups), (-(-outputs // GROUP) if blocked else outputs, groups))
    if (
        tuple(a.scales.shape),
        tuple(b.scales.shape),
    ) != expected or a.values.dtype != b.values.dtype:
        raise ValueError("operands are of one format, with scales of one granularity")
    if blocked and launch.size("BLOCK_K") != GROUP:
        raise ValueError("block scales need steps of 128 columns")
    arguments = (
        a.values,
        b.values,
        a.scales,
        b.scales,
        out if bias_N is None else bias_N,
        out,
        rows,
        outputs,
        inputs,
        groups,
    )
    constants = {
        "BLOCKED": blocked,
        "INTEGER": a.values.dtype == torch.int8,
        "HAS_BIAS": bias_N is not None,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": launch.size("BLOCK_K"),
        **launch.options(),
    }
    tiles = (triton.cdiv(rows, block_m), triton.cdiv(outputs, block_n))
    programs = dict(launch.sizes).get("PROGRAMS")
    if programs is not None and inputs % 16 == 0 and outputs % 8 == 0:
        count = min(programs, tiles[0] * tiles[1])
        scaled_gemm_tma_kernel[(count,)](*arguments, PROGRAMS=count, **constants)
        return
    swap = bool(dict(launch.sizes).get("SWAP", 0))
    scaled_gemm_kernel[tiles](*arguments, SWAP=swap, **constants)
