"""Rotary position embedding (Su et al. 2021), half-split pairing: element i turns with i + E/2.

Every scaling (linear, dynamic, llama3, yarn, longrope) is folded into the tables of angles.

Shape legend: T tokens, H heads, E head_dim, P positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fabric.kernels.launch import Launch


def rope_reference(x_THE: Tensor, cos_TE2: Tensor, sin_TE2: Tensor) -> Tensor:
    """Every head of every token turned by its position's angles (float32); rounded once."""
    first, second = x_THE.float().chunk(2, dim=-1)
    cos, sin = cos_TE2[:, None], sin_TE2[:, None]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x_THE.dtype)


@triton.jit
def rope_kernel(
    x_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    position_ptr: tl.tensor,
    heads: tl.tensor,
    half: tl.tensor,
    x_token: tl.tensor,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """HEADS heads of one token a program, in place."""
    token = tl.program_id(0)
    head_H = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    col = tl.arange(0, BLOCK)
    position = tl.load(position_ptr + token).to(tl.int64)
    cos = tl.load(cos_ptr + position * half + col, mask=col < half, other=0.0)[None, :]
    sin = tl.load(sin_ptr + position * half + col, mask=col < half, other=0.0)[None, :]
    mask = (head_H < heads)[:, None] & (col < half)[None, :]
    at = x_ptr + token.to(tl.int64) * x_token + head_H[:, None] * (2 * half) + col[None, :]
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, (first * cos - second * sin).to(x_ptr.dtype.element_ty), mask=mask)
    tl.store(at + half, (second * cos + first * sin).to(x_ptr.dtype.element_ty), mask=mask)


def rope(
    x_THE: Tensor, cos_PE2: Tensor, sin_PE2: Tensor, positions_T: Tensor, *, launch: Launch
) -> None:
    """Turn every head in place; heads of a token are neighbours, tokens any stride apart.

    `positions_T` (int32) picks the rows of the float32 tables.
    """
    tokens, heads, head_dim = x_THE.shape
    if x_THE.stride(2) != 1 or x_THE.stride(1) != head_dim or head_dim % 2:
        raise ValueError("rope needs heads side by side, of an even size")
    step = launch.size("HEADS")
    rope_kernel[(tokens, triton.cdiv(heads, step))](
        x_THE,
        cos_PE2,
        sin_PE2,
        positions_T,
        heads,
        head_dim // 2,
        x_THE.stride(0),
        HEADS=step,
        BLOCK=triton.next_power_of_2(head_dim // 2),
        **launch.options(),
    )
