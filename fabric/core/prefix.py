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


class Hasher:
    """How the core comes by hashes of blocks: this one computes them.

    It is the only place where a decision looks at what tokens say, beside stop tokens. So whoever
    writes decisions down may note the hashes and needs no tokens (`core.journal`).
    """

    __slots__ = ()

    def chain(self, parent: bytes, tokens: Sequence[int]) -> bytes:
        """As `chain`."""
        return chain(parent, tokens)


class NotedHasher(Hasher):
    """Computes, and keeps what was computed until it is asked for."""

    __slots__ = ("_noted",)

    def __init__(self) -> None:
        self._noted: list[bytes] = []

    def chain(self, parent: bytes, tokens: Sequence[int]) -> bytes:
        """As `chain`."""
        digest = chain(parent, tokens)
        self._noted.append(digest)
        return digest

    def take(self) -> tuple[bytes, ...]:
        """All since the last time, in order."""
        if not self._noted:
            return ()
        noted, self._noted = tuple(self._noted), []
        return noted


class ToldHasher(Hasher):
    """Says what was noted, in the same order: a replay, which has no tokens."""

    __slots__ = ("_told",)

    def __init__(self) -> None:
        self._told: list[bytes] = []

    def tell(self, digests: Sequence[bytes]) -> None:
        """What will be asked for next. What is left of before is forgotten."""
        self._told = list(reversed(digests))

    def chain(self, parent: bytes, tokens: Sequence[int]) -> bytes:  # noqa: ARG002
        """`LookupError`: whoever was noted did not ask for so many."""
        if not self._told:
            raise LookupError("a hash is asked for that was not asked for when this was recorded")
        return self._told.pop()

    def left(self) -> int:
        """How many have not been asked for."""
        return len(self._told)


def chain_all(
    salt: bytes, tokens: Sequence[int], block_size: int, hasher: Hasher
) -> tuple[bytes, ...]:
    """The hash up to the end of each block behind `salt`, the last one perhaps not full."""
    digests = [salt]
    for begin in range(0, len(tokens), block_size):
        digests.append(hasher.chain(digests[-1], tokens[begin : begin + block_size]))
    return tuple(digests[1:])


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
