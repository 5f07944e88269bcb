"""API keys: compared in constant time, never stored in clear, never logged."""

from __future__ import annotations

import hashlib
import hmac

from fabric.core.tenants import Tenant
from fabric.gateway.errors import Unauthorized
from fabric.gateway.settings import GatewaySettings

# Probes and scrapers carry no key; none of these shows text or takes work.
OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/openapi.json"})


class KeyRing:
    """The keys that open the door. Empty: the door is open."""

    def __init__(self, settings: GatewaySettings) -> None:
        nameless = [(_digest(key.encode()), Tenant()) for key in settings.api_keys]
        named = [
            (_digest(key.encode()), holder.tenant)
            for holder in settings.tenants
            for key in holder.api_keys
        ]
        self._tenants = (*nameless, *named)

    def check(self, path: str, authorization: bytes | None) -> Tenant:
        """Whose key it is. Raises `Unauthorized` unless the path is open or the header holds
        `Bearer <a key>`."""
        if not self._tenants or path in OPEN_PATHS:
            return Tenant()
        if authorization is None:
            raise Unauthorized("No API key was sent. Send it as `Authorization: Bearer <key>`.")
        scheme, _, key = authorization.partition(b" ")
        given = _digest(key.strip())
        found: Tenant | None = None
        for digest, tenant in self._tenants:  # no early exit: time must not say which was near
            if hmac.compare_digest(digest, given):
                found = tenant
        if found is None or scheme.lower() != b"bearer":
            raise Unauthorized("The API key is not valid here.")
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
