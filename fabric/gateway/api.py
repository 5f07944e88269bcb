"""The HTTP API: `create_app(backend, settings)` gives a FastAPI app without global state.

FrontDoor (id, key, count, log) -> route -> parse -> Jobs (tokens) -> Generation -> answer
"""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.responses import Response

from fabric import __version__
from fabric.core.errors import FabricError, ModelNotFound, RequestError, Unavailable
from fabric.gateway import answers
from fabric.gateway.answer import GenerationAnswer
from fabric.gateway.auth import KeyRing
from fabric.gateway.backend import Backend, ServedModel
from fabric.gateway.body import read_object
from fabric.gateway.call import SCOPE_KEY
from fabric.gateway.counters import GatewayCounters, exposition
from fabric.gateway.errors import fabric_error, http_error
from fabric.gateway.front import FrontDoor
from fabric.gateway.generation import Generation
from fabric.gateway.jobs import Jobs, render, require_model
from fabric.gateway.openapi import describe, fails, streams, takes
from fabric.gateway.sampling import check_token_ids
from fabric.gateway.schema import (
    AnyBody,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    parse,
)
from fabric.gateway.settings import GatewaySettings
from fabric.gateway.tiering import Tiering
from fabric.gateway.tokenizer import Encoder

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


def create_app(
    backend: Backend,
    settings: GatewaySettings | None = None,
    counters: GatewayCounters | None = None,
) -> FastAPI:
    """The app in front of `backend`. Cheap: the tokenizer is read at the first need.

    `counters`: give one to publish its samples with the fleet's metrics; then `/metrics` is
    exactly `backend.metrics_text()`. Without, this gateway's own counts are appended to it.
    """
    settings = settings or GatewaySettings()
    own = counters is None
    counters = counters or GatewayCounters()
    # Without redirects: few clients follow one with a body, and a path of its own is a 404.
    app = FastAPI(
        title="fabric",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(FrontDoor, keys=KeyRing(settings), counters=counters)
    app.add_exception_handler(FabricError, fabric_error)
    for status in (404, 405):
        app.add_exception_handler(status, http_error)
    routes = _Routes(backend, settings, counters, own_metrics=own)
    _add_generation(app, routes)
    _add_text(app, routes)
    _add_operations(app, routes)
    describe(app, Tiering(settings.tiers).names())
    return app


def _add_generation(app: FastAPI, routes: _Routes) -> None:
    errors = fails(400, 401, 404, 413, 429, 503)
    streamed = {"content": streams()}
    app.post(
        "/v1/chat/completions",
        responses={200: {"model": answers.ChatCompletion, **streamed}, **errors},
        openapi_extra=takes(ChatBody),
    )(routes.chat_completions)
    app.post(
        "/v1/completions",
        responses={200: {"model": answers.Completion, **streamed}, **errors},
        openapi_extra=takes(CompletionBody),
    )(routes.completions)


def _add_text(app: FastAPI, routes: _Routes) -> None:
    app.get("/v1/models", response_model=answers.ModelList, responses=fails(401, 503))(
        routes.models
    )
    app.get(
        "/v1/models/{model_id:path}",
        response_model=answers.ModelCard,
        responses=fails(401, 404, 503),
    )(routes.model_by_id)
    errors = fails(400, 401, 404, 413, 429, 503)
    app.post(
        "/tokenize",
        responses={200: {"model": answers.TokenizeAnswer}, **errors},
        openapi_extra=takes(TokenizeBody),
    )(routes.tokenize)
    app.post(
        "/detokenize",
        responses={200: {"model": answers.DetokenizeAnswer}, **errors},
        openapi_extra=takes(DetokenizeBody),
    )(routes.detokenize)


def _add_operations(app: FastAPI, routes: _Routes) -> None:
    app.get("/health", response_model=answers.Status)(routes.health)
    app.get("/ready", response_model=answers.Status, responses=fails(503))(routes.ready)
    text: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}}
    }
    app.get("/metrics", response_class=Response, responses=text)(routes.metrics)
    app.get("/fabric/status", response_model=dict[str, Any], responses=fails(401, 503))(
        routes.fleet_status
    )


class _Routes:
    """The handlers of one app."""

    def __init__(
        self,
        backend: Backend,
        settings: GatewaySettings,
        counters: GatewayCounters,
        *,
        own_metrics: bool,
    ) -> None:
        self._backend = backend
        self._settings = settings
        self._counters = counters
        self._own_metrics = own_metrics
        self._encoder = Encoder(settings)
        self._jobs = Jobs(settings, self._encoder)

    async def chat_completions(self, request: Request) -> Response:
        """Answer a conversation, whole or as server-sent events (`stream: true`)."""
        body = await self._read(request, ChatBody)
        job = await self._jobs.chat(body, self._backend.model(), request.scope[SCOPE_KEY])
        return GenerationAnswer(Generation(job, self._backend))

    async def completions(self, request: Request) -> Response:
        """Continue one or several prompts, given as text or as token ids."""
        body = await self._read(request, CompletionBody)
        job = await self._jobs.completion(body, self._backend.model(), request.scope[SCOPE_KEY])
        return GenerationAnswer(Generation(job, self._backend))

    async def models(self) -> Response:
        """The model served here."""
        card = _card(self._backend.model())
        return _json({"object": "list", "data": [card]})

    async def model_by_id(self, model_id: str) -> Response:
        """One model by its name."""
        model = self._backend.model()
        if model_id != model.name:
            require_model(model_id, model)
            raise ModelNotFound("No such model.", param="model")
        return _json(_card(model))

    async def tokenize(self, request: Request) -> Response:
        """The token ids of a text or of a conversation."""
        body = await self._read(request, TokenizeBody)
        model = self._backend.model()
        require_model(body.model, model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("Send either `prompt` or `messages`.", param="prompt")
        tokenizer = await self._encoder.tokenizer(model)
        chat = body.messages is not None
        text = render(body, tokenizer) if chat else body.prompt or ""
        special = not chat if body.add_special_tokens is None else body.add_special_tokens
        tokens = await self._encoder.encode(tokenizer, text, add_special_tokens=special)
        names = await self._encoder.names(tokenizer, tokens) if body.return_token_strs else None
        return _json(
            {
                "count": len(tokens),
                "max_model_len": model.context_limit,
                "tokens": tokens,
                "token_strs": names,
            }
        )

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        body = await self._read(request, DetokenizeBody)
        model = self._backend.model()
        require_model(body.model, model)
        check_token_ids("tokens", body.tokens, model)
        tokenizer = await self._encoder.tokenizer(model)
        return _json({"prompt": await self._encoder.decode(tokenizer, body.tokens)})

    async def health(self) -> Response:
        """This process answers."""
        return _json({"status": "ok"})

    async def ready(self) -> Response:
        """A token can be generated now."""
        readiness = await self._backend.readiness()
        if not readiness.ready:
            raise Unavailable(f"Not ready: {readiness.reason or 'loading'}.")
        await self._encoder.tokenizer(self._backend.model())
        return _json({"status": "ready"})

    async def metrics(self) -> Response:
        """Prometheus metrics of the fleet."""
        text = await self._backend.metrics_text()
        if self._own_metrics:
            text += exposition(self._counters.samples())
        return Response(text, media_type=PROMETHEUS)

    async def fleet_status(self) -> Response:
        """Model, replicas, memory and queues, as `fabric status` shows them."""
        return _json(await self._backend.fleet_status())

    async def _read(self, request: Request, kind: type[AnyBody]) -> AnyBody:
        body = parse(kind, await read_object(request, self._settings.max_body_bytes))
        self._counters.unknown_fields(body.unknown_fields())
        return body


def _card(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "fabric",
        "max_model_len": model.context_limit,
    }


def _json(value: object) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
