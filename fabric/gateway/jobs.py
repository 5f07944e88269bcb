"""From a validated body to a `Job`: prompts become tokens, numbers become `SamplingParams`."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from fabric.core.errors import ModelNotFound, RequestError
from fabric.core.request import Request
from fabric.gateway.backend import ServedModel
from fabric.gateway.call import Call
from fabric.gateway.generation import Job
from fabric.gateway.sampling import check_token_ids, sampling_params, stop_strings
from fabric.gateway.schema import ChatBody, CompletionBody, GenerationBody, Message, TokenizeBody
from fabric.gateway.settings import GatewaySettings
from fabric.gateway.template import check_messages
from fabric.gateway.text import TextRules
from fabric.gateway.tiering import Service, Tiering
from fabric.gateway.tokenizer import Encoder, Tokenizer, require_template

Encoded = tuple[tuple[int, ...], str]  # token ids, and the text they came from, if from any

MAX_NAME_CHARS = 100


class Jobs:
    """Builds jobs. Holds what is the same for all: limits and the tokenizer's loader."""

    def __init__(self, settings: GatewaySettings, encoder: Encoder) -> None:
        self._settings = settings
        self._encoder = encoder
        self._tiering = Tiering(settings.tiers)

    async def chat(self, body: ChatBody, model: ServedModel, call: Call) -> Job:
        """Raises `RequestError`, `ModelError` or `Overloaded`."""
        require_model(body.model, model)
        tokenizer = await self._encoder.tokenizer(model)
        text = render(body, tokenizer)
        tokens = await self._encoder.encode(
            tokenizer, text, add_special_tokens=bool(body.add_special_tokens)
        )
        return self._job(body, model, call, tokenizer, [(tuple(tokens), text)])

    async def completion(self, body: CompletionBody, model: ServedModel, call: Call) -> Job:
        """Raises `RequestError`, `ModelError` or `Overloaded`."""
        require_model(body.model, model)
        tokenizer = await self._encoder.tokenizer(model)
        given = body.prompt
        prompts = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
        if len(prompts) * (body.n or 1) > self._settings.max_choices:
            raise RequestError(
                f"{len(prompts)} prompts x n {body.n or 1} is over the limit of "
                f"{self._settings.max_choices} choices in one request.",
                param="prompt",
                code="too_many_choices",
            )
        special = body.add_special_tokens is not False
        encoded = []
        for prompt in prompts:
            tokens, text = await self._encode(tokenizer, prompt, model, special)
            if body.echo and not text:
                text = await self._encoder.decode(tokenizer, list(tokens))
            encoded.append((tokens, text))
            await asyncio.sleep(0)  # many short prompts are a long one: let others' tokens out
        return self._job(body, model, call, tokenizer, encoded)

    async def _encode(
        self, tokenizer: Tokenizer, prompt: object, model: ServedModel, special: bool
    ) -> Encoded:
        if isinstance(prompt, str):
            tokens = await self._encoder.encode(tokenizer, prompt, add_special_tokens=special)
            return tuple(tokens), prompt
        assert isinstance(prompt, list)
        check_token_ids("prompt", prompt, model)
        return tuple(prompt), ""

    def _job(
        self,
        body: GenerationBody,
        model: ServedModel,
        call: Call,
        tokenizer: Tokenizer,
        prompts: list[Encoded],
    ) -> Job:
        if body.stream_options is not None and not body.stream:
            raise RequestError(
                "`stream_options` needs `stream: true`.",
                param="stream_options",
                code="invalid_value",
            )
        chat = isinstance(body, ChatBody)
        service = self._tiering.service(body.service_tier, call)
        requests = [self._request(body, model, call, service, p) for p in prompts]
        requests = [replace(r, request_id=f"{r.request_id}-{i}") for i, r in enumerate(requests)]
        stops = stop_strings(body, self._settings)
        call.model = model.name
        call.stream = bool(body.stream)
        sampling = requests[0].sampling
        return Job(
            call=call,
            model_name=model.name,
            fingerprint=f"fp_{model.version[:12]}",
            created=int(time.time()),
            requests=tuple(requests),
            prompt_texts=tuple(text for _, text in prompts),
            rules=TextRules(
                stops=stops,
                include_stop=bool(body.include_stop_str_in_output),
                skip_special=body.skip_special_tokens is not False,
                min_tokens=sampling.min_tokens,
                logprobs=sampling.logprobs is not None,
            ),
            pieces=tokenizer.pieces,
            service_tier=service.service_tier,
            chat=chat,
            stream=bool(body.stream),
            stream_usage=body.wants_usage(),
            echo=isinstance(body, CompletionBody) and bool(body.echo),
            generate=chat or body.max_tokens != 0,
            show_prompt=body.prompt_logprobs is not None,
        )

    def _request(
        self,
        body: GenerationBody,
        model: ServedModel,
        call: Call,
        service: Service,
        prompt: Encoded,
    ) -> Request:
        tokens, _ = prompt
        if not tokens:
            raise RequestError("The prompt is empty.", param="prompt", code="invalid_value")
        return Request(
            request_id=call.unique_id,
            prompt=tokens,
            sampling=sampling_params(body, model, self._settings, len(tokens)),
            arrival=call.arrival,
            model_version=model.version,
            priority=body.priority or 0,
            tenant=call.tenant.name,
            tier=service.tier,
            deadline=service.deadline,
        )


def require_model(name: str | None, model: ServedModel) -> None:
    """Raises `ModelNotFound` unless `name` is the served model's (or left out)."""
    if name is not None and name != model.name:
        shown = name if len(name) <= MAX_NAME_CHARS else name[:MAX_NAME_CHARS] + "…"
        raise ModelNotFound(
            f"The model `{shown}` does not exist here; this server serves `{model.name}`.",
            param="model",
        )


def render(body: ChatBody | TokenizeBody, tokenizer: Tokenizer) -> str:
    """The prompt text of a conversation. Raises `RequestError`."""
    messages = body.messages or []
    check_messages(messages)
    template = require_template(tokenizer)
    extra = body.chat_template_kwargs or {}
    continues = bool(body.continue_final_message)
    prompted = body.add_generation_prompt is not False
    if continues and body.add_generation_prompt:
        raise RequestError(
            "`continue_final_message` and `add_generation_prompt` can't both be true.",
            param="continue_final_message",
            code="invalid_value",
        )
    text = template.render(messages, extra=extra, add_generation_prompt=prompted and not continues)
    return _without_ending(text, messages[-1]) if continues else text


def _without_ending(text: str, last: Message) -> str:
    """Cut what the template puts after the last message, so that the model goes on with it."""
    final = last.content if isinstance(last.content, str) else None
    at = text.rfind(final.strip()) if final and final.strip() else -1
    if final is None or at < 0:
        raise RequestError(
            "`continue_final_message` needs a last message with text that the template keeps.",
            param="continue_final_message",
            code="invalid_value",
        )
    return text[: at + len(final.strip())]
