"""One JSON line a request. Never a prompt, an output or a key."""

from __future__ import annotations

import logging
import time
import traceback
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

import orjson

from fabric.gateway.call import Call

LOGGER = logging.getLogger("fabric.gateway")
NS_PER_MS = 1e6
LOG_BYTES_MAX = 256 << 20


def log_to(target: TextIO | Path) -> logging.Handler:
    """Send the gateway's lines to a stream or a file, and nowhere else. A file is kept below
    `LOG_BYTES_MAX`, and the last one before it."""
    handler: logging.Handler
    if isinstance(target, Path):
        handler = RotatingFileHandler(target, maxBytes=LOG_BYTES_MAX, backupCount=1)
    else:
        handler = logging.StreamHandler(target)
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    return handler


def log_call(call: Call, *, method: str, route: str) -> None:
    """The line of a request that is over. Times in ms; `status` 499: the client left.

    Probes and scrapes that went well are of no interest: level DEBUG.
    """
    level = logging.INFO if call.choices or call.status >= 400 else logging.DEBUG
    if not LOGGER.isEnabledFor(level):
        return
    now = time.monotonic_ns()
    first = call.first_token_ns
    line: dict[str, Any] = {
        "time": time.time(),
        "event": "request",
        "request_id": call.request_id,
        "id": call.unique_id,
        "method": method,
        "route": route,
        "status": call.status,
        "e2e_ms": round((now - call.started_ns) / NS_PER_MS, 3),
    }
    if call.choices:
        line |= {
            "model": call.model,
            "tenant": call.tenant.name,
            "tier": call.tier,
            "stream": call.stream,
            "choices": call.choices,
            "prompt_tokens": call.prompt_tokens,
            "cached_tokens": call.cached_tokens,
            "completion_tokens": call.completion_tokens,
            "ttft_ms": first and round((first - call.started_ns) / NS_PER_MS, 3),
            "finish": call.finish,
        }
    LOGGER.log(level, orjson.dumps(line).decode())


def log_bug(call: Call, error: BaseException) -> None:
    """An error of ours: its type and where it came from. Its message may quote text: left out."""
    frames = traceback.extract_tb(error.__traceback__)[-12:]
    line = {
        "time": time.time(),
        "event": "internal_error",
        "request_id": call.request_id,
        "id": call.unique_id,
        "error": type(error).__name__,
        "where": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    }
    LOGGER.error(orjson.dumps(line).decode())
