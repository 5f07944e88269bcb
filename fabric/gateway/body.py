"""Reading a JSON body: bounded while it comes in, strict JSON, one object."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import Request

from fabric.core.errors import RequestError
from fabric.gateway.errors import BodyTooLarge, ClientLeft


async def read_object(request: Request, limit_bytes: int) -> dict[str, Any]:
    """The body as an object. Raises `BodyTooLarge`, `ClientLeft`, or `RequestError` for bad JSON.

    NaN, Infinity, numbers that overflow a double, lone surrogates and nesting beyond 1,024 levels
    are not JSON here.
    """
    data = await _read(request, limit_bytes)
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        # Only the reason and the position: the text itself may be private.
        raise RequestError(
            f"The body is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno}).",
            code="invalid_json",
        ) from None
    if not isinstance(value, dict):
        raise RequestError("The body must be a JSON object.", code="invalid_json")
    return value


async def _read(request: Request, limit_bytes: int) -> bytes:
    said = request.headers.get("content-length", "")
    if said.isdecimal() and (len(said) > 18 or int(said) > limit_bytes):
        raise _too_large(limit_bytes)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        part = message.get("body", b"")
        size += len(part)
        if size > limit_bytes:
            raise _too_large(limit_bytes)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_large(limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body is larger than the limit of {limit_bytes} bytes.")
