"""A model's chat template: Jinja from the model's folder, run in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import orjson

from fabric.core.errors import RequestError
from fabric.gateway.schema import ContentPart, Message

MAX_REASON_CHARS = 300


class ChatTemplate:
    """Compiled once. `specials`: bos_token, eos_token ... as the template names them."""

    def __init__(self, source: str, specials: Mapping[str, str]) -> None:
        """Raises `jinja2.TemplateError` if the source is no template."""
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _strftime_now
        self._template = environment.from_string(source)
        self._specials = dict(specials)

    def render(
        self, messages: list[Message], *, extra: Mapping[str, Any], add_generation_prompt: bool
    ) -> str:
        """The prompt's text. Raises `RequestError` if the template refuses the messages."""
        from jinja2 import TemplateError

        values = {**self._specials, **extra, "messages": [_plain(m) for m in messages]}
        values |= {"add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
        try:
            return self._template.render(values)
        except _Refused as error:
            reason = str(error)[:MAX_REASON_CHARS]
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            reason = f"it failed on them ({type(error).__name__})"
        except (AttributeError, RecursionError, MemoryError) as error:
            reason = f"it failed on them ({type(error).__name__})"
        raise RequestError(
            f"The model's chat template does not take these messages: {reason}",
            param="messages",
            code="chat_template_error",
        )


class _Refused(Exception):
    """The template's author refuses the messages."""


def check_messages(messages: list[Message]) -> None:
    """Raises `RequestError` naming the message or part that can't be read."""
    for index, message in enumerate(messages):
        at = f"messages[{index}]"
        if message.content is None and not (message.role == "assistant" and message.tool_calls):
            raise RequestError(
                f"`{at}.content` is required.", param=f"{at}.content", code="invalid_value"
            )
        if isinstance(message.content, list):
            for place, part in enumerate(message.content):
                _check_part(part, f"{at}.content[{place}]")


def _check_part(part: ContentPart, at: str) -> None:
    if part.type not in ("text", "refusal"):
        raise RequestError(
            f"`{at}`: content of type `{part.type[:40]}` is not supported by this model; only "
            "text is.",
            param=f"{at}.type",
            code="unsupported_content",
        )
    if _text_of(part) is None:
        raise RequestError(
            f"`{at}.{part.type}` is required.", param=f"{at}.{part.type}", code="invalid_value"
        )


def _text_of(part: ContentPart) -> str | None:
    return part.text if part.type == "text" else part.refusal


def _plain(message: Message) -> dict[str, Any]:
    """What templates were written for: string content, `system`, tool arguments as data."""
    content = message.content
    if isinstance(content, list):
        content = "\n".join(_text_of(part) or "" for part in content)
    plain: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": content if content is not None else "",
    }
    for field in ("name", "tool_call_id"):
        value = getattr(message, field)
        if value is not None:
            plain[field] = value
    if message.tool_calls:
        plain["tool_calls"] = [_plain_call(call) for call in message.tool_calls]
    return plain


def _plain_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        # orjson is strict: what is nested too deep or is no Unicode stays the string that it was.
        arguments = orjson.loads(function["arguments"])
    except orjson.JSONDecodeError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _refuse(message: str) -> str:
    raise _Refused(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes <, > and & for HTML; a prompt is no web page.
    return json.dumps(value, ensure_ascii=False, indent=indent)
