"""The OpenAPI document: bodies are parsed by hand (for speed and for our errors), so they are
described by hand too, from the very models that parse them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from fabric import __version__
from fabric.gateway.answers import ErrorAnswer
from fabric.gateway.schema import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

BODIES: tuple[type[Body], ...] = (ChatBody, CompletionBody, TokenizeBody, DetokenizeBody)
TEMPLATE = "#/components/schemas/{model}"

_MEANINGS: Mapping[int, str] = {
    400: "The request is wrong; `param` names the field.",
    401: "An API key is needed.",
    404: "No such model.",
    413: "The body is over the limit.",
    429: "Too busy; `Retry-After` says when to come back.",
    503: "Loading, draining, or no replica.",
}


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


def describe(app: FastAPI) -> None:
    """Make `/openapi.json` tell the request bodies too."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            described = get_openapi(title="fabric", version=__version__, routes=app.routes)
            _, found = models_json_schema(
                [(body, "validation") for body in BODIES], ref_template=TEMPLATE
            )
            schemas = described.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(found["$defs"])
            app.openapi_schema = described
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
