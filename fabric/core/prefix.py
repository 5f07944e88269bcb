"""Chained hashes of token blocks: two equal hashes mean equal tokens from position 0 on, under the same salt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from struct import Struct

DIGEST_BYTES = 16


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The 16-byte hash of one full block: blake2b over its parent's hash and its tokens (uint32, little endian)."""
    data = _packer(len(tokens)).pack(*tokens)
    return blake2b(parent + data, digest_size=DIGEST_BYTES).digest()


def root(model_version: str, adapter: str | None, tenant: str) -> bytes:
    """The parent of block 0. KV is only ever shared inside one model version, adapter and tenant."""
    # Every field carries its length, so that ("ab", "c") and ("a", "bc") differ; None differs from "".
    hasher = blake2b(digest_size=DIGEST_BYTES)
    for field in (model_version, adapter, tenant):
        data = b"" if field is None else field.encode()
        hasher.update(b"%d:" % (-1 if field is None else len(data)))
        hasher.update(data)
    return hasher.digest()


@lru_cache(maxsize=64)
def _packer(count: int) -> Struct:
    return Struct(f"<{count}I")
