"""What the gateway needs of whatever is behind it. Implemented by `cluster.dispatcher` (Ray) and by
`tests/kit` (one engine in the process)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from fabric.core.request import Request, TokenChunk


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One model as clients see it. `folder` holds its tokenizer files (never shown to a client)."""

    name: str
    version: str
    created: int  # unix seconds
    context_limit: int
    vocab: int
    eos_token_ids: tuple[int, ...]
    folder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """`ready`: a token was generated a moment ago, or could be. `reason` says why not."""

    ready: bool
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """How an open request is served. `replica`: where it runs. `queue_ms`: from its arrival until
    its first step, in every queue on the way; None: not known. `degraded`: in what it gets less
    than it asked for, in a word or two; empty: nothing."""

    replica: str
    queue_ms: float | None = None
    degraded: str = ""


class Backend(Protocol):
    """Where requests go."""

    def model(self) -> ServedModel:
        """The model served; raises `Unavailable` while it is not known yet."""
        ...

    def stream(self, request: Request) -> AsyncIterator[tuple[TokenChunk, ...]]:
        """All chunks of a request, as many at a time as have accumulated since the last item.

        The first item raises `Overloaded` or `Unavailable` if the request is not taken. Ends after
        every choice has finished. Closing the iterator aborts the request and frees its blocks.
        """
        ...

    def abort_choice(self, request_id: str, choice: int) -> None:
        """End one choice (the text held a stop string). Its last chunk then says Finish.ABORT."""
        ...

    def service(self, request_id: str) -> Service | None:
        """How an open request is served. Known with its first item; None: it is not open."""
        ...

    async def readiness(self) -> Readiness:
        """Can a token be generated? Red while loading, draining, or when the loop is stuck."""
        ...

    async def metrics_text(self) -> str:
        """Prometheus text of the whole fleet, labelled by replica."""
        ...

    async def fleet_status(self) -> dict[str, object]:
        """What `fabric status` shows, as JSON-able data: model, replicas, memory, queues."""
        ...
