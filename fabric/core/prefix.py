"""Chained hashes of token blocks: equal hashes mean equal tokens from position 0 on, equal salt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from struct import Struct

DIGEST_BYTES = 16


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of one full block, 16 bytes: blake2b (RFC 7693) of its parent's hash and its tokens.

    Tokens go in as uint32, little endian, so that the hash is the same on every machine.
    """
    data = _packer(len(tokens)).pack(*tokens)
    return blake2b(parent + data, digest_size=DIGEST_BYTES).digest()


def root(model_version: str, adapter: str | None, tenant: str) -> bytes:
    """The parent of block 0. KV is shared only inside one model version, adapter and tenant."""
    # Every field carries its length: ("ab", "c") is not ("a", "bc"), and None is not "".
    hasher = blake2b(digest_size=DIGEST_BYTES)
    for field in (model_version, adapter, tenant):
        data = b"" if field is None else field.encode()
        hasher.update(b"%d:" % (-1 if field is None else len(data)))
        hasher.update(data)
    return hasher.digest()


@lru_cache(maxsize=64)
def _packer(count: int) -> Struct:
    return Struct(f"<{count}I")
