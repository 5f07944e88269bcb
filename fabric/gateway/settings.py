"""What the gateway can be told. Composed by whoever hosts the app."""

from __future__ import annotations

from dataclasses import dataclass, field

from fabric.core.tenants import Tenant
from fabric.core.tiers import BUILT_IN, Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyHolder:
    """A tenant and its API keys."""

    tenant: Tenant
    api_keys: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """The HTTP front's own limits. Lengths in characters or tokens as named, bodies in bytes.

    `api_keys` (of nobody in particular) and `tenants` empty: no key is asked for. `tiers`: the most
    important first. `completion_max_tokens` is what `/v1/completions`
    generates when the client names no limit (OpenAI's 16); chat fills the context instead.
    `inline_encode_chars`: longer texts are encoded in a thread, so that one huge prompt does not
    hold up everybody's tokens.
    """

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    tenants: tuple[KeyHolder, ...] = ()
    tiers: tuple[Tier, ...] = BUILT_IN
    max_body_bytes: int = 4 << 20
    max_choices: int = 512  # prompts x n of one HTTP request
    max_stops: int = 16
    max_stop_chars: int = 256
    max_logit_biases: int = 1024
    completion_max_tokens: int = 16
    inline_encode_chars: int = 4096
    max_waiting_encodes: int = 256
