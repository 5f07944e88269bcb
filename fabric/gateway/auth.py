"""API keys: compared in constant time, never stored in clear, never logged."""

from __future__ import annotations

import hashlib
import hmac

from fabric.gateway.errors import Unauthorized

# Probes and scrapers carry no key; none of these shows text or takes work.
OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/openapi.json"})


class KeyRing:
    """The keys that open the door. Empty: the door is open."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = tuple(_digest(key.encode()) for key in keys)

    def check(self, path: str, authorization: bytes | None) -> None:
        """Raises `Unauthorized` unless the path is open or the header holds `Bearer <a key>`."""
        if not self._digests or path in OPEN_PATHS:
            return
        if authorization is None:
            raise Unauthorized("No API key was sent. Send it as `Authorization: Bearer <key>`.")
        scheme, _, key = authorization.partition(b" ")
        given = _digest(key.strip())
        found = False
        for digest in self._digests:  # no early exit: the time must not say which key was near
            found |= hmac.compare_digest(digest, given)
        if not found or scheme.lower() != b"bearer":
            raise Unauthorized("The API key is not valid here.")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
