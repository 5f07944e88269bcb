"""One choice's way back from tokens to text: spell, hold back, show, stop.

    tokens --pieces--> bytes --UTF-8--> characters --stop search--> text that may be shown
                        |                   |
             an unfinished character   what may begin a stop string       is held back

Every token costs O(1), whatever came before it.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fabric.core.request import Finish, TokenChunk, TokenLogprobs
from fabric.gateway.stops import StopAutomaton, StopSearch

if TYPE_CHECKING:
    from fabric.gateway.pieces import Pieces

_UTF8 = codecs.getincrementaldecoder("utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRules:
    """How a request wants its tokens shown."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special: bool = True
    min_tokens: int = 0
    logprobs: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A token with its log-probabilities. `offset`: characters of output text before it."""

    logprobs: TokenLogprobs
    offset: int


@dataclass(slots=True, kw_only=True)
class Delta:
    """What a chunk adds to a choice. `finish` is OpenAI's word once the choice is over."""

    choice: int
    text: str
    scored: list[Scored] | None = None
    finish: str | None = None
    stop_reason: str | int | None = None
    first: TokenChunk | None = None  # the choice's first chunk, which says more


class ChoiceText:
    """State of one choice. `choice` is its index in the answer."""

    __slots__ = (
        "_chars",
        "_decode",
        "_pieces",
        "_rules",
        "_search",
        "_spelled",
        "choice",
        "finish",
        "tokens",
    )

    def __init__(
        self, choice: int, pieces: Pieces, rules: TextRules, stops: StopAutomaton | None
    ) -> None:
        self.choice = choice
        self.tokens = 0  # generated and counted, a stop token or string included
        self.finish: str | None = None
        self._rules = rules
        self._pieces = pieces.visible if rules.skip_special else pieces.spelled
        self._spelled = pieces.spelled
        # Invalid bytes in the middle become U+FFFD as they do in a whole text; an unfinished
        # character at the end is never shown.
        self._decode = _UTF8("replace").decode
        self._search = StopSearch(stops) if stops is not None else None
        self._chars = 0

    def push(self, chunk: TokenChunk) -> Delta:
        """Take the next tokens. After `finish` is set nothing more may be pushed."""
        assert self.finish is None
        delta = Delta(choice=self.choice, text="")
        if self.tokens == 0:
            delta.first = chunk
        if self._search is None and not self._rules.logprobs:
            self.tokens += len(chunk.tokens)
            delta.text = self._decode(
                b"".join([self._pieces[token] for token in self._shown(chunk)])
            )
        else:
            self._push_slowly(chunk, delta)
        if chunk.finish is not None and self.finish is None:
            self._end(chunk, delta)
        return delta

    def _shown(self, chunk: TokenChunk) -> tuple[int, ...]:
        if chunk.stop_token is None or self._rules.include_stop:
            return chunk.tokens
        return chunk.tokens[:-1]

    def _push_slowly(self, chunk: TokenChunk, delta: Delta) -> None:
        """Token by token: a stop string must end the count at the token that completes it."""
        shown = len(self._shown(chunk))
        texts = []
        delta.scored = [] if self._rules.logprobs else None
        for index, token in enumerate(chunk.tokens):
            self.tokens += 1
            if delta.scored is not None and chunk.logprobs is not None:
                delta.scored.append(Scored(logprobs=chunk.logprobs[index], offset=self._chars))
            if index >= shown:
                continue
            text = self._decode(self._pieces[token])
            self._chars += len(text)
            if self._search is None or self.tokens <= self._rules.min_tokens:
                texts.append(text)
                continue
            texts.append(self._search.push(text))
            if self._search.found is not None:
                delta.finish = self.finish = "stop"
                delta.stop_reason = self._search.found
                if self._rules.include_stop:
                    texts.append(self._search.found)
                break
        delta.text = "".join(texts)

    def _end(self, chunk: TokenChunk, delta: Delta) -> None:
        if self._search is not None:
            delta.text += self._search.flush()
        delta.finish = self.finish = "length" if chunk.finish is Finish.LENGTH else "stop"
        delta.stop_reason = chunk.stop_token


def scored_prompt(
    tokens: tuple[int, ...], logprobs: tuple[TokenLogprobs | None, ...], pieces: Pieces
) -> list[Scored]:
    """The prompt's tokens with theirs; the first has none: nothing came before it."""
    decode = _UTF8("replace").decode
    chars = 0
    scored = []
    for token, entry in zip(tokens, logprobs, strict=True):
        said = entry or TokenLogprobs(token=token, logprob=0.0, rank=0)
        scored.append(Scored(logprobs=said, offset=chars))
        chars += len(decode(pieces.spelled[token]))
    return scored
