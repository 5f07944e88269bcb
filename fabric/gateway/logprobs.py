"""Log-probabilities in the three shapes clients know: chat, completions, vLLM's prompt list."""

from __future__ import annotations

from typing import Any

from fabric.core.request import TokenLogprobs
from fabric.gateway.pieces import Pieces
from fabric.gateway.text import Scored

# JSON has no -Infinity; clients expect a number.
LOWEST = -9999.0


def chat_logprobs(scored: list[Scored], pieces: Pieces) -> dict[str, Any]:
    """`choices[].logprobs` of a chat answer or chunk: one entry a generated token."""
    return {"content": [_chat_entry(s.logprobs, pieces) for s in scored], "refusal": None}


def completion_logprobs(
    scored: list[Scored], pieces: Pieces, *, text_offset: int
) -> dict[str, Any]:
    """`choices[].logprobs` of a completion. `text_offset`: characters before the first token.

    Rank 0 marks the first prompt token, which nothing predicts: its numbers are null. The chosen
    token is always among `top_logprobs`, so there may be one more than asked for.
    """
    predicted = [entry.logprobs.rank > 0 for entry in scored]
    return {
        "tokens": [spell(s.logprobs.token, pieces) for s in scored],
        "token_logprobs": [
            _finite(s.logprobs.logprob) if known else None
            for s, known in zip(scored, predicted, strict=True)
        ],
        "top_logprobs": [
            _alternatives(s.logprobs, pieces) if known else None
            for s, known in zip(scored, predicted, strict=True)
        ],
        "text_offset": [text_offset + s.offset for s in scored],
    }


def prompt_logprobs(
    entries: tuple[TokenLogprobs | None, ...], pieces: Pieces
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: a prompt token -> {token id: {logprob, rank, decoded_token}}."""
    return [None if entry is None else _ranked(entry, pieces) for entry in entries]


def spell(token: int, pieces: Pieces) -> str:
    """A token's text; the bytes of a split character become U+FFFD (the bytes field is exact)."""
    return pieces.spelled[token].decode("utf-8", "replace")


def _chat_entry(entry: TokenLogprobs, pieces: Pieces) -> dict[str, Any]:
    return {
        **_named(entry.token, entry.logprob, pieces),
        "top_logprobs": [_named(token, logprob, pieces) for token, logprob in entry.top],
    }


def _named(token: int, logprob: float, pieces: Pieces) -> dict[str, Any]:
    return {
        "token": spell(token, pieces),
        "logprob": _finite(logprob),
        "bytes": list(pieces.spelled[token]),
    }


def _alternatives(entry: TokenLogprobs, pieces: Pieces) -> dict[str, float]:
    # Two tokens may be spelled alike (halves of characters): the likelier keeps the name.
    found = {spell(entry.token, pieces): _finite(entry.logprob)}
    for token, logprob in entry.top:
        found.setdefault(spell(token, pieces), _finite(logprob))
    return found


def _ranked(entry: TokenLogprobs, pieces: Pieces) -> dict[str, Any]:
    listed = {entry.token: (entry.logprob, entry.rank)}
    for rank, (token, logprob) in enumerate(entry.top, start=1):
        listed.setdefault(token, (logprob, rank))
    return {
        str(token): {
            "logprob": _finite(logprob),
            "rank": rank,
            "decoded_token": spell(token, pieces),
        }
        for token, (logprob, rank) in listed.items()
    }


def _finite(logprob: float) -> float:
    return max(LOWEST, logprob)  # max keeps its first argument against NaN
