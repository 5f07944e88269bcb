"""Every error leaves in OpenAI's shape: `{"error": {message, type, param, code}}`.

    RequestError     400        ModelNotFound  404      BodyTooLarge  413
    Unauthorized     401        Overloaded     429      Unavailable   503 (ModelError too)
    Failed           500: the request itself broke what ran it

Anything else is a bug of ours: 500 with a fixed sentence; the log says where, never with what text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import orjson
from fastapi import Request
from fastapi.responses import Response

from fabric.core.errors import (
    FabricError,
    Failed,
    ModelError,
    ModelNotFound,
    Overloaded,
    RequestError,
    Unavailable,
)

HTTP_SENTENCES: Mapping[int, tuple[str, str]] = {
    404: ("unknown_url", "There is nothing at this path."),
    405: ("method_not_allowed", "This path does not take this method."),
}


class Unauthorized(RequestError):
    """No valid API key came with the request."""


class BodyTooLarge(RequestError):
    """The request body is over the limit."""


class ClientLeft(Exception):
    """The client closed the connection; nobody reads an answer."""


def error_response(error: BaseException) -> Response:
    """The answer for any exception, with `Retry-After` where waiting helps."""
    status, kind, code = _classify(error)
    headers = {}
    if isinstance(error, Overloaded | Unavailable):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return _json(status, error_body(error, kind=kind, code=code), headers)


def error_body(error: BaseException, *, kind: str = "", code: str | None = None) -> bytes:
    """The JSON of an error, also sent as a last SSE event when an answer has already begun."""
    if not kind:
        _, kind, code = _classify(error)
    message = "The server made an error; it has been logged."
    param = None
    if isinstance(error, ModelError):  # written for the operator: may name files
        message = "The model's tokenizer can't be used; see the server's log."
    elif isinstance(error, FabricError):
        message = str(error)
    if isinstance(error, RequestError):
        param = error.param
    fields = {"message": message, "type": kind, "param": param, "code": code}
    return orjson.dumps({"error": fields})


async def http_error(_request: Request, error: Exception) -> Response:
    """The answer for what the router itself refuses (unknown path, wrong method)."""
    status = int(getattr(error, "status_code", 500))
    code, message = HTTP_SENTENCES.get(status, ("http_error", "The request can't be served."))
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return _json(status, orjson.dumps({"error": body}), dict(getattr(error, "headers", None) or {}))


async def fabric_error(_request: Request, error: Exception) -> Response:
    """`error_response` as an exception handler of the app."""
    return error_response(error)


def _classify(error: BaseException) -> tuple[int, str, str | None]:
    match error:
        case Unauthorized():
            return 401, "invalid_request_error", "invalid_api_key"
        case ModelNotFound():
            return 404, "invalid_request_error", "model_not_found"
        case BodyTooLarge():
            return 413, "invalid_request_error", "request_too_large"
        case RequestError():
            return 400, "invalid_request_error", error.code
        case Failed():
            return 500, "server_error", "request_failed"
        case Overloaded():
            return 429, "rate_limit_error", "overloaded"
        case Unavailable():
            return 503, "server_error", "unavailable"
        case ModelError():
            return 503, "server_error", "model_error"
    return 500, "server_error", "internal_error"


def _json(status: int, body: bytes, headers: dict[str, str]) -> Response:
    return Response(body, status_code=status, headers=headers, media_type="application/json")
