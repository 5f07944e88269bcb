"""`PagedCase`: random sequences in a poisoned pool, and their attention in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kit.guarded import Guarded
from torch import Tensor

from fabric.kernels.kv_write import kv_write_reference
from fabric.kernels.paged_attention import PagedKv

NO_BLOCK = 1 << 24  # in table entries that no kernel may follow: far outside of the pool


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedShape:
    """What varies between cases. `fp8`: of the pages; everything else has `dtype`."""

    lengths: tuple[int, ...]
    kv_heads: int = 2
    group: int = 3
    head_dim: int = 64
    page: int = 16
    window: int | None = None
    fp8: bool = False
    dtype: torch.dtype = torch.bfloat16


class PagedCase:
    """A pool of three layers of which the middle one is used; slots without a key stay NaN."""

    def __init__(self, shape: PagedShape, seed: int = 0) -> None:
        self.shape, self.memory = shape, Guarded()
        self._generator = torch.Generator().manual_seed(seed)
        page, heads, head_dim = shape.page, shape.kv_heads, shape.head_dim
        needs = [-(-length // page) for length in shape.lengths]
        blocks = sum(needs) + 1
        dtype = torch.float8_e4m3fn if shape.fp8 else shape.dtype
        pool = self.memory.empty((blocks, 3, 2, heads, page, head_dim), dtype)
        order = torch.randperm(blocks, generator=self._generator).tolist()
        # A table wider than needed; sequence s has the row of another number.
        tables = torch.full((len(needs) + 2, max(needs) + 3), NO_BLOCK, dtype=torch.int32)
        self.rows = [len(needs) + 1 - index for index in range(len(needs))]
        scales = torch.rand(2, heads, generator=self._generator) + 0.5 if shape.fp8 else None
        for index, length in enumerate(shape.lengths):
            owned = torch.tensor([order.pop() for _ in range(needs[index])], dtype=torch.int32)
            tables[self.rows[index], : len(owned)] = owned
            at = torch.arange(length)
            slots = owned.long()[at // page] * page + at % page
            for which in range(2):
                scale = scales[which] if scales is not None else None
                kv_write_reference(pool[:, 1, which], self.normal(length, heads), slots, scale)
        self.kv = PagedKv(
            pages_XKGPE=pool[:, 1],
            tables_XB=self.memory.copy(tables),
            scale=head_dim**-0.5,
            window=shape.window,
            scales_KG=None if scales is None else self.memory.copy(scales),
        )

    def normal(self, tokens: int, heads: int) -> Tensor:
        """[tokens, heads, E] of the case's dtype, large enough that attention is not flat."""
        size = (tokens, heads, self.shape.head_dim)
        return (torch.randn(size, generator=self._generator) * 1.5).to(self.shape.dtype)

    def queries(self, tokens: int) -> Tensor:
        """[tokens, H, E] inside wider rows, as q lies beside k and v."""
        heads = self.shape.kv_heads * self.shape.group
        wide = self.memory.empty((tokens, heads + 2, self.shape.head_dim), self.shape.dtype)
        wide[:, :heads] = self.normal(tokens, heads)
        return wide[:, :heads]

    def exact(self, q_QHE: Tensor, sequence: int, first: int) -> tuple[Tensor, Tensor]:
        """float64 [Q, H, E]: the result, and the sum of its terms' magnitudes."""
        shape, page = self.shape, self.shape.page
        length = first + len(q_QHE)
        blocks = self.kv.tables_XB[self.rows[sequence], : -(-length // page)].long()
        k, v = (
            self.kv.pages_XKGPE.float()[blocks, which].transpose(0, 1).flatten(1, 2)[:, :length]
            for which in range(2)
        )
        if self.kv.scales_KG is not None:
            k, v = k * self.kv.scales_KG[0, :, None, None], v * self.kv.scales_KG[1, :, None, None]
        k, v = (x.double().repeat_interleave(shape.group, dim=0) for x in (k, v))
        scores = q_QHE.double().transpose(0, 1) @ k.transpose(1, 2) * self.kv.scale
        position = torch.arange(first, length)[:, None]
        key = torch.arange(length)
        hidden = key > position
        if shape.window is not None:
            hidden |= key <= position - shape.window
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return (weights @ v).transpose(0, 1), (weights @ v.abs()).transpose(0, 1)


def require_near(got: Tensor, exact: Tensor, terms: Tensor) -> None:
    """In bfloat16 each weight is rounded before it multiplies its value, and so is the result; in
    float32 scores of magnitude 20 carry 20 * 2^-24 into the weights' exponents."""
    assert got.isfinite().all()
    allowed = 2e-5 * terms
    if got.dtype == torch.bfloat16:
        allowed = allowed + 2.0**-8 * (terms + exact.abs())
    worst = ((got.double() - exact).abs() - allowed).max()
    assert worst <= 1e-7, f"{worst:.2e} more than allowed"
