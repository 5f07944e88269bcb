"""Embedding rows, of a whole vocabulary or of one shard of it.

A shard holds the rows [first, first + rows): it gives zeros for other tokens, and the shards' sum
is the embedding (Shoeybi et al. 2019, Megatron-LM).

Shape legend: T tokens, V rows of the (shard of the) table, D hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fabric.kernels.launch import Launch


def embedding_reference(token_ids_T: Tensor, table_VD: Tensor, first: int = 0) -> Tensor:
    """[T, D]: the token's row, or zeros if the shard does not hold it."""
    row_T = token_ids_T.long() - first
    held_T = (row_T >= 0) & (row_T < len(table_VD))
    return torch.where(held_T[:, None], table_VD[row_T.clamp(0, len(table_VD) - 1)], 0)


@triton.jit
def embedding_kernel(
    token_ptr: tl.tensor,
    table_ptr: tl.tensor,
    out_ptr: tl.tensor,
    first: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """BLOCK columns of one token a program."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(token_ptr + token).to(tl.int64) - first
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = (row >= 0) & (row < rows)
    content = tl.load(table_ptr + row * width + col, mask=(col < width) & held, other=0.0)
    tl.store(out_ptr + token * width + col, content, mask=col < width)


def embedding(
    token_ids_T: Tensor, table_VD: Tensor, *, out: Tensor, first: int = 0, launch: Launch
) -> None:
    """out [T, D] from int32 ids and a contiguous table whose first row is token `first`."""
    tokens, width = out.shape
    if not table_VD.is_contiguous() or table_VD.shape[1] != width:
        raise ValueError("the table is contiguous and as wide as the output")
    block = launch.size("BLOCK")
    embedding_kernel[(tokens, triton.cdiv(width, block))](
        token_ids_T, table_VD, out, first, len(table_VD), width, BLOCK=block, **launch.options()
    )
