"""The OpenAPI document: bodies are parsed by hand (for speed and for our errors), so they are
described by hand too, from the very models that parse them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from fabric import __version__
from fabric.gateway.answers import ErrorAnswer
from fabric.gateway.schema import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from fabric.gateway.tiering import DEADLINE_HEADER, MAX_DEADLINE_MS, TIER_HEADER

BODIES: tuple[type[Body], ...] = (ChatBody, CompletionBody, TokenizeBody, DetokenizeBody)
GENERATING = ("/v1/chat/completions", "/v1/completions")
TEMPLATE = "#/components/schemas/{model}"

_MEANINGS: Mapping[int, str] = {
    400: "The request is wrong; `param` names the field.",
    401: "An API key is needed.",
    404: "No such model.",
    413: "The body is over the limit.",
    429: "Too busy; `Retry-After` says when to come back.",
    503: "Loading, draining, or no replica.",
}


def asks_for_service(names: Sequence[str]) -> list[dict[str, Any]]:
    """The headers that say how soon an answer is wanted. `names`: what a tier can be called."""
    return [
        {
            "name": TIER_HEADER,
            "in": "header",
            "description": "the tier; at most the key's highest",
            "schema": {"type": "string", "enum": list(names)},
        },
        {
            "name": DEADLINE_HEADER,
            "in": "header",
            "description": "ms after which the answer is of no use; who can't make it is refused",
            "schema": {"type": "integer", "minimum": 1, "maximum": MAX_DEADLINE_MS},
        },
    ]


def takes(body: type[Body]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads this body."""
    schema = {"$ref": TEMPLATE.format(model=body.__name__)}
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


def fails(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route for these errors."""
    return {status: {"model": ErrorAnswer, "description": _MEANINGS[status]} for status in statuses}


def streams() -> dict[str, Any]:
    """The 200 answer in its other form, server-sent events."""
    data = {"type": "string", "description": "a chunk, an error, or [DONE]"}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {"text/event-stream": {"schema": event}}


def describe(app: FastAPI, tiers: Sequence[str]) -> None:
    """Make `/openapi.json` tell the request bodies too, and what a tier can be called."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            described = get_openapi(title="fabric", version=__version__, routes=app.routes)
            _, found = models_json_schema(
                [(body, "validation") for body in BODIES], ref_template=TEMPLATE
            )
            schemas = described.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(found["$defs"])
            for path in GENERATING:
                operation = described["paths"][path]["post"]
                operation["parameters"] = asks_for_service(tiers)
            for body in (ChatBody, CompletionBody):
                asked = schemas[body.__name__]["properties"]["service_tier"]
                asked["anyOf"] = [{"type": "string", "enum": list(tiers)}, {"type": "null"}]
            app.openapi_schema = described
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
