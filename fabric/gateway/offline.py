"""The gateway without HTTP, for scripts: a prompt becomes a job, its chunks a `Completion`.

The same validation, tokenizer, chat template and text as the server's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fabric.core.errors import RequestError
from fabric.core.request import Request, TokenChunk, TokenLogprobs
from fabric.gateway.backend import ServedModel
from fabric.gateway.sampling import check_token_ids, sampling_params, stop_strings
from fabric.gateway.schema import CompletionBody, Message, parse
from fabric.gateway.settings import GatewaySettings
from fabric.gateway.stops import StopAutomaton
from fabric.gateway.template import check_messages
from fabric.gateway.text import ChoiceText, TextRules
from fabric.gateway.tokenizer import Tokenizer, require_template


class OfflineGateway:
    """Text in and out of one model. Raises `ModelError` if its tokenizer can't be read."""

    def __init__(self, model: ServedModel) -> None:
        self.model = model
        self.tokenizer = Tokenizer(model)
        self._settings = GatewaySettings()
        self._jobs = 0

    def job(self, prompt: str | Sequence[int], fields: Mapping[str, Any]) -> OfflineJob:
        """`fields`: those of `/v1/completions`; max_tokens None fills the context. Raises
        `RequestError`."""
        body = parse(CompletionBody, {**fields, "prompt": ""})
        tokens = (
            self.tokenizer.encode(prompt, add_special_tokens=True)
            if isinstance(prompt, str)
            else list(prompt)
        )
        if not tokens:
            raise RequestError("The prompt is empty.", param="prompt")
        check_token_ids("prompt", tokens, self.model)
        if body.max_tokens is None:
            body.max_tokens = max(self.model.context_limit - len(tokens), 1)
        sampling = sampling_params(body, self.model, self._settings, len(tokens))
        rules = TextRules(
            stops=stop_strings(body, self._settings),
            skip_special=body.skip_special_tokens is not False,
            min_tokens=sampling.min_tokens,
            logprobs=sampling.logprobs is not None,
        )
        automaton = StopAutomaton(rules.stops) if rules.stops else None
        pieces = self.tokenizer.pieces
        self._jobs += 1
        request = Request(
            request_id=f"offline-{self._jobs}",
            prompt=tuple(tokens),
            sampling=sampling,
            arrival=time.time_ns(),
            model_version=self.model.version,
        )
        texts = [ChoiceText(index, pieces, rules, automaton) for index in range(sampling.n)]
        return OfflineJob(request, texts)

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """A conversation's tokens through the chat template. Raises `RequestError`."""
        told = [parse(Message, dict(message)) for message in messages]
        check_messages(told)
        template = require_template(self.tokenizer)
        text = template.render(told, extra={}, add_generation_prompt=True)
        return self.tokenizer.encode(text, add_special_tokens=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One continuation. `finish`: "stop" or "length"; `stop_reason`: the stop string or token met.

    `tokens` are all that were counted, a stop token included; `logprobs` has one entry each.
    """

    text: str
    tokens: tuple[int, ...]
    finish: str
    stop_reason: str | int | None
    logprobs: tuple[TokenLogprobs, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What one prompt brought: `n` choices. `cached_tokens`: prompt tokens that were known."""

    prompt_tokens: tuple[int, ...]
    choices: tuple[Choice, ...]
    cached_tokens: int
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text


class OfflineJob:
    """One prompt on its way: its request, and what has come of each choice."""

    def __init__(self, request: Request, texts: list[ChoiceText]) -> None:
        self.request = request
        self.texts = texts
        self._parts: list[list[str]] = [[] for _ in texts]
        self._tokens: list[list[int]] = [[] for _ in texts]
        self._logprobs: list[list[TokenLogprobs]] = [[] for _ in texts]
        self._reasons: list[str | int | None] = [None for _ in texts]
        self._first: TokenChunk | None = None

    def take(self, chunk: TokenChunk) -> bool:
        """Add a chunk; True if its choice has met a stop string and is to be aborted."""
        choice = chunk.choice
        text = self.texts[choice]
        if text.finish is not None:
            return False
        if self._first is None and chunk.cached_tokens is not None:
            self._first = chunk
        before = text.tokens
        delta = text.push(chunk)
        counted = text.tokens - before
        self._parts[choice].append(delta.text)
        self._tokens[choice] += chunk.tokens[:counted]
        self._logprobs[choice] += (chunk.logprobs or ())[:counted]
        self._reasons[choice] = delta.stop_reason
        return text.finish is not None and chunk.finish is None

    def completion(self) -> Completion:
        """After every choice has finished."""
        scored = self.request.sampling.logprobs is not None
        choices = tuple(
            Choice(
                text="".join(self._parts[index]),
                tokens=tuple(self._tokens[index]),
                finish=text.finish or "stop",
                stop_reason=self._reasons[index],
                logprobs=tuple(self._logprobs[index]) if scored else None,
            )
            for index, text in enumerate(self.texts)
        )
        first = self._first
        return Completion(
            prompt_tokens=self.request.prompt,
            choices=choices,
            cached_tokens=(first.cached_tokens or 0) if first else 0,
            prompt_logprobs=first.prompt_logprobs if first else None,
        )
