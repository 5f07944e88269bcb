"""Sizes of a model as the deciding parts need them: what a block of KV takes, a token costs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder's dimensions. `weight_bytes` stay resident; `kv_bytes_per_element`: 2 for bf16."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context_limit: int
    weight_bytes: int
    kv_bytes_per_element: int = 2

    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V that one token keeps over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_bytes_per_element
