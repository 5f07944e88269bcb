"""What is known of one HTTP request, for its log line. Filled in on its way; never any text."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field

SAFE_ID = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._:-")
MAX_ID_CHARS = 128
SCOPE_KEY = "fabric.call"


@dataclass(slots=True, kw_only=True)
class Call:
    """`request_id` is the client's where it sent a sane one; `unique_id` never repeats."""

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


def new_call(client_id: bytes | None) -> Call:
    """A call whose id is the client's `x-request-id` if it is short and harmless."""
    unique = uuid.uuid4().hex
    given = client_id.decode("latin-1") if client_id else ""
    sane = 0 < len(given) <= MAX_ID_CHARS and SAFE_ID.issuperset(given)
    return Call(request_id=given if sane else unique, unique_id=unique)
