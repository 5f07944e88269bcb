"""What clients may send. Strict: "1" is no number, true is no 1. Unknown fields are counted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fabric.core.errors import RequestError
from fabric.gateway.unbuilt import BENIGN, UNBUILT, refuse_unbuilt

INT64_MAX = 2**63 - 1
INT32_MAX = 2**31 - 1
EXACT_DOUBLE = 2.0**53  # beyond it a double no longer tells which integer was written

TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Prompt = (
    str
    | TokenIds
    | Annotated[list[str], Field(min_length=1)]
    | Annotated[list[TokenIds], Field(min_length=1)]
)


def _says(field: str, value: str) -> dict[str, Any]:
    """JSON schema: `field` is `value`, and the field of that name is a string."""
    properties = {field: {"const": value}, value: {"type": "string"}}
    return {"required": [field, value], "properties": properties}


def _has(field: str, kind: str) -> dict[str, Any]:
    """JSON schema: `field` is there, and of this type."""
    return {"required": [field], "properties": {field: {"type": kind}}}


class Body(BaseModel):
    """Any request body. Strict types, finite numbers."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    def unknown_fields(self) -> list[str]:
        """Names that no API we know of has."""
        known = BENIGN | UNBUILT.keys()
        return [name for name in self.model_extra or () if name not in known]


class StreamOptions(Body):
    """`stream_options`."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="accepted; nothing is padded")
    continuous_usage_stats: Literal[False] | None = None


class GenerationBody(Body):
    """What chat and plain completions share. null always means: the default."""

    model: str | None = Field(None, description="null: the model served here")
    max_tokens: int | None = Field(None, ge=0, le=INT32_MAX)
    min_tokens: int | None = Field(None, ge=0, le=INT32_MAX)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=INT32_MAX, description="0 and -1: off")
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-INT64_MAX - 1, le=INT64_MAX)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="token id (as a string) -> bias"
    )
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=64)
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    ignore_eos: bool | None = None
    n: int | None = Field(None, ge=1, le=128)
    priority: int | None = Field(None, ge=-INT32_MAX - 1, le=INT32_MAX, description="low is soon")
    service_tier: str | None = Field(None, description="at most the key's highest; see the answer")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    add_special_tokens: bool | None = None
    user: str | None = None

    def wants_usage(self) -> bool:
        """Is a usage event asked for at the end of the stream?"""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: Prompt = Field(description="text, texts, token ids, or lists of token ids")
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)


class ContentPart(Body):
    """One part of a message. Only text can be read here."""

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [_says("type", "text"), _says("type", "refusal")]}
    )

    type: str  # checked by hand: the error names what the part is
    text: str | None = None
    refusal: str | None = None


class Message(Body):
    """One message of a conversation. Only an assistant that called tools may have no content."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["content"], "properties": {"content": {"not": {"type": "null"}}}},
                {
                    "required": ["tool_calls"],
                    "properties": {
                        "role": {"const": "assistant"},
                        "tool_calls": {"type": "array", "minItems": 1},
                    },
                },
            ]
        }
    )

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


Messages = Annotated[list[Message], Field(min_length=1)]


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: Messages
    echo: Literal[False] | None = Field(None, description="the prompt is not given back in chat")
    max_completion_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeBody(Body):
    """`POST /tokenize`: `prompt`, or `messages` through the chat template."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [_has("prompt", "string"), _has("messages", "array")]}
    )

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[TokenId]


AnyBody = TypeVar("AnyBody", bound=Body)

# pydantic would list every member of a union; one sentence says it better.
SENTENCES: Mapping[str, str] = {
    "prompt": "must be a string, a list of strings, a list of token ids (0 or more) or a list of "
    "lists of token ids, and not empty",
    "stop": "must be a string or a list of strings",
    "content": "must be a string or a list of content parts",
}


def parse(kind: type[AnyBody], data: dict[str, Any]) -> AnyBody:
    """Validate plain data. Raises `RequestError` naming the field that is wrong."""
    refuse_unbuilt(data)
    try:
        try:
            return kind.model_validate(data)
        except ValidationError:
            return kind.model_validate(_whole_numbers(data))
    except ValidationError as error:
        raise _explain(error, data) from None


def _whole_numbers(data: dict[str, Any]) -> dict[str, Any]:
    """5.0 becomes 5: to JSON they are one number. In place; only for bodies that failed at first.

    Without recursion: a body may be nested deeper than Python's stack.
    """
    waiting: list[dict[str, Any] | list[Any]] = [data]
    while waiting:
        values = waiting.pop()
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            if isinstance(value, float) and value.is_integer() and abs(value) < EXACT_DOUBLE:
                values[key] = int(value)  # type: ignore[index]
            elif isinstance(value, dict | list):
                waiting.append(value)
    return data


def _explain(error: ValidationError, data: dict[str, Any]) -> RequestError:
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    # The deepest problem of a union is the one of the member that was meant.
    problem = max(problems, key=lambda p: len(_path(p["loc"], data)))
    missing = problem["type"] == "missing"
    path = _path(problem["loc"], data) + list(problem["loc"][-1:] if missing else ())
    names = [part for part in path if isinstance(part, str)]
    param = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")[:200]
    if missing:
        message = f"`{param}` is required."
    elif len(problem["loc"]) > len(path) and names and names[-1] in SENTENCES:
        param = param[: param.rindex(names[-1]) + len(names[-1])]
        message = f"`{param}` {SENTENCES[names[-1]]}."
    else:
        message = f"`{param}` {_sentence(problem['type'], problem['msg'])}."
    return RequestError(message, param=param or None, code="invalid_value")


def _sentence(kind: str, message: str) -> str:
    if kind in ("model_type", "dict_type"):
        return "must be an object"
    return re.sub(r"^\w+ should", "must", message).removesuffix(" after validation")


def _path(location: tuple[int | str, ...], data: Any) -> list[int | str]:
    """The part of a pydantic location that is in the data (the rest names union members)."""
    path: list[int | str] = []
    for part in location:
        named = isinstance(data, dict) and part in data
        if named or (isinstance(data, list) and isinstance(part, int) and part < len(data)):
            data = data[part]
            path.append(part)
    return path
