"""Fields of the OpenAI and vLLM APIs that mean something this server does not do (yet).

They are refused by name: to ignore `tools` or `response_format` would give a wrong answer silently.
Each may still come with a value that asks for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fabric.core.errors import RequestError

_NOTHING: tuple[object, ...] = (None,)

# field -> the values that ask for nothing
UNBUILT: Mapping[str, tuple[object, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "functions": (None, []),
    "function_call": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": _NOTHING,
    "guided_json": _NOTHING,
    "guided_regex": _NOTHING,
    "guided_choice": _NOTHING,
    "guided_grammar": _NOTHING,
    "guided_decoding_backend": _NOTHING,
    "guided_whitespace_pattern": _NOTHING,
    "grammar": _NOTHING,
    "best_of": (None, 1),
    "suffix": (None, ""),
    "audio": _NOTHING,
    "modalities": (None, [], ["text"]),
    "web_search_options": _NOTHING,
    "reasoning_effort": (None, "none"),
    "reasoning": _NOTHING,
    "verbosity": (None, "medium"),
    "moderation": _NOTHING,
    "use_beam_search": (None, False),
    "length_penalty": (None, 1),
    "early_stopping": (None, False),
    "bad_words": (None, []),
    "allowed_token_ids": _NOTHING,
    "logits_processors": (None, []),
    "truncate_prompt_tokens": _NOTHING,
    "prompt_embeds": _NOTHING,
    "documents": (None, []),
    "chat_template": _NOTHING,
    "mm_processor_kwargs": (None, {}),
    "kv_transfer_params": _NOTHING,
    "cache_salt": _NOTHING,
    "return_token_ids": (None, False),
    "return_tokens_as_token_ids": (None, False),
    "detokenize": (None, True),
}

# Fields that ask for nothing a client could miss: labels, storage and billing hints.
BENIGN = frozenset(
    {
        "metadata",
        "store",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
        "safety_identifier",
        "spaces_between_special_tokens",
        "request_id",
    }
)


def refuse_unbuilt(body: Mapping[str, Any]) -> None:
    """Raises `RequestError` naming the first field that asks for something not built."""
    for field, value in body.items():
        neutral = UNBUILT.get(field)
        if neutral is not None and not any(_same(value, n) for n in neutral):
            raise RequestError(
                f"`{field}` is not supported by this server.",
                param=field,
                code="unsupported_parameter",
            )


def _same(value: object, neutral: object) -> bool:
    if isinstance(value, bool) or isinstance(neutral, bool):
        return value is neutral  # True is not 1; 1.0 is, as JSON has one kind of numbers
    return value == neutral
