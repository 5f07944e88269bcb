"""What is known of one HTTP request, for its log line. Filled in on its way; never any text."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from fabric.core.tenants import Tenant

SAFE_ID = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._:-")
MAX_ID_CHARS = 128
SCOPE_KEY = "fabric.call"


@dataclass(slots=True, kw_only=True)
class Call:
    """`request_id` is the client's where it sent a sane one; `unique_id` never repeats.

    `asked_tier` and `asked_deadline_ms` are headers as they came; `tier` is what was granted.
    """

    request_id: str
    unique_id: str
    arrival: int = field(default_factory=time.time_ns)  # wall clock: other machines compare it
    started_ns: int = field(default_factory=time.monotonic_ns)
    first_token_ns: int | None = None
    model: str | None = None
    status: int = 0
    stream: bool = False
    choices: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finish: str | None = None
    disconnected: bool = False
    tenant: Tenant = field(default_factory=Tenant)
    asked_tier: str | None = None
    asked_deadline_ms: str | None = None
    tier: str | None = None


def new_call(headers: Mapping[bytes, bytes]) -> Call:
    """A call whose id is the client's `x-request-id` if it is short and harmless."""
    client_id = headers.get(b"x-request-id")
    unique = uuid.uuid4().hex
    given = client_id.decode("latin-1") if client_id else ""
    sane = 0 < len(given) <= MAX_ID_CHARS and SAFE_ID.issuperset(given)
    return Call(
        request_id=given if sane else unique,
        unique_id=unique,
        asked_tier=_text(headers.get(b"x-fabric-tier")),
        asked_deadline_ms=_text(headers.get(b"x-fabric-deadline-ms")),
    )


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1").strip()
