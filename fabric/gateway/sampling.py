"""From a body's numbers to the core's `SamplingParams`, with every bound that needs the model."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from fabric.core.errors import ContextOverflow, RequestError
from fabric.core.request import SamplingParams
from fabric.gateway.backend import ServedModel
from fabric.gateway.schema import ChatBody, CompletionBody, GenerationBody
from fabric.gateway.settings import GatewaySettings

# A nucleus of nothing still holds the likeliest token: top_p 0 means greedy.
SMALLEST_TOP_P = 1e-6


def sampling_params(
    body: GenerationBody, model: ServedModel, settings: GatewaySettings, prompt_length: int
) -> SamplingParams:
    """How the tokens after a prompt of `prompt_length` are drawn. Raises `RequestError`.

    A missing seed is drawn here, so that a resumed request meets the same noise.
    """
    max_tokens = _max_tokens(body, model, settings, prompt_length)
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise RequestError(
            f"`min_tokens` ({min_tokens}) is more than `max_tokens` ({max_tokens}).",
            param="min_tokens",
            code="invalid_value",
        )
    logprobs, prompt_logprobs = _logprobs(body)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=_or(body.temperature, 1.0),
        top_p=max(_or(body.top_p, 1.0), SMALLEST_TOP_P),
        top_k=body.top_k if body.top_k is not None and body.top_k > 0 else None,
        min_p=_or(body.min_p, 0.0),
        seed=body.seed if body.seed is not None else secrets.randbits(63),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        logit_bias=_logit_bias(body.logit_bias or {}, model, settings),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        stop_token_ids=_stop_token_ids(body.stop_token_ids or [], model),
        ignore_eos=bool(body.ignore_eos),
        n=body.n or 1,
    )


def stop_strings(body: GenerationBody, settings: GatewaySettings) -> tuple[str, ...]:
    """The stop strings, in the client's order. Raises `RequestError`."""
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > settings.max_stops:
        raise _wrong("stop", f"holds {len(stops)} strings; the limit is {settings.max_stops}")
    if any(not stop for stop in stops):
        raise _wrong("stop", "holds an empty string")
    if any(len(stop) > settings.max_stop_chars for stop in stops):
        raise _wrong("stop", f"holds a string of over {settings.max_stop_chars} characters")
    return tuple(dict.fromkeys(stops))


def check_token_ids(param: str, tokens: list[int], model: ServedModel) -> None:
    """Raises `RequestError` if one is outside the vocabulary."""
    if tokens and max(tokens) >= model.vocab:
        raise _wrong(
            param, f"holds token id {max(tokens)}; the vocabulary has 0 to {model.vocab - 1}"
        )


def _max_tokens(
    body: GenerationBody, model: ServedModel, settings: GatewaySettings, prompt_length: int
) -> int:
    room = model.context_limit - prompt_length
    asked = body.max_tokens
    if isinstance(body, ChatBody):
        if body.max_completion_tokens is not None:
            asked = body.max_completion_tokens
        if asked == 0:
            raise _wrong("max_tokens", "must be at least 1")
    default = settings.completion_max_tokens if isinstance(body, CompletionBody) else room
    # max_tokens 0 (score the prompt, generate nothing): the engine's least is one, dropped later.
    wanted = max(1, min(default, room) if asked is None else asked)
    if wanted > room:
        raise ContextOverflow(
            f"This model's context holds {model.context_limit} tokens, but "
            f"{prompt_length + wanted} were asked for: {prompt_length} in the prompt and {wanted} "
            "to generate. Shorten the prompt or lower max_tokens.",
            param="messages" if isinstance(body, ChatBody) else "prompt",
            code="context_length_exceeded",
        )
    return wanted


def _logprobs(body: GenerationBody) -> tuple[int | None, int | None]:
    """Alternatives a generated token, and a prompt token, is reported with."""
    prompt_logprobs = body.prompt_logprobs
    if prompt_logprobs is not None and body.stream:
        raise _wrong("prompt_logprobs", "can't be streamed; ask without `stream`")
    if isinstance(body, ChatBody):
        if body.top_logprobs is not None and not body.logprobs:
            raise _wrong("top_logprobs", "needs `logprobs: true`")
        return ((body.top_logprobs or 0) if body.logprobs else None), prompt_logprobs
    assert isinstance(body, CompletionBody)
    if body.echo and body.logprobs is not None:
        prompt_logprobs = max(body.logprobs, prompt_logprobs or 0)
    return body.logprobs, prompt_logprobs


def _logit_bias(
    biases: Mapping[str, float], model: ServedModel, settings: GatewaySettings
) -> tuple[tuple[int, float], ...]:
    if len(biases) > settings.max_logit_biases:
        raise _wrong("logit_bias", f"holds over {settings.max_logit_biases} tokens")
    if not all(key.isascii() and key.isdecimal() and len(key) < 10 for key in biases):
        raise _wrong("logit_bias", "must have token ids as keys")
    check_token_ids("logit_bias", [int(key) for key in biases], model)
    return tuple(sorted({int(key): value for key, value in biases.items()}.items()))


def _stop_token_ids(tokens: list[int], model: ServedModel) -> tuple[int, ...]:
    check_token_ids("stop_token_ids", tokens, model)
    return tuple(dict.fromkeys(tokens))


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _wrong(param: str, problem: str) -> RequestError:
    return RequestError(f"`{param}` {problem}.", param=param, code="invalid_value")
