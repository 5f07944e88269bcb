"""Every wrong request is told what is wrong, in OpenAI's shape, and leaves nothing behind."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from kit.asgi import Exchange, client_of
from kit.local_backend import LocalBackend

from fabric.core.errors import Overloaded, Unavailable
from fabric.gateway.answers import ErrorAnswer
from fabric.gateway.api import create_app
from fabric.gateway.settings import GatewaySettings

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error, checked for its shape and for what it must not tell."""
    assert answer.status_code == status, answer.text
    ErrorAnswer.model_validate_json(answer.content)
    error = answer.json()["error"]
    assert error["message"] and len(error["message"]) < 600
    assert not re.search(r"Traceback|\.py|/tmp|/work|pydantic", answer.text)
    return error


WRONG_NUMBERS = [
    ("temperature", -1),
    ("temperature", 2.1),
    ("temperature", 1e308),
    ("temperature", "1"),
    ("temperature", True),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 10**30),
    ("top_k", 1.5),
    ("min_p", 2),
    ("seed", 2**63),
    ("seed", -(2**63) - 1),
    ("repetition_penalty", 0),
    ("frequency_penalty", 3),
    ("presence_penalty", -3),
    ("n", 0),
    ("n", 129),
    ("n", [1]),
    ("max_tokens", -1),
    ("max_tokens", 2**40),
    ("min_tokens", -1),
    ("priority", 2**40),
    ("prompt_logprobs", 21),
    ("stream", "yes"),
    ("stop", 5),
    ("stop", [""]),
    ("stop", ["x"] * 17),
    ("stop", "x" * 257),
    ("stop_token_ids", [361]),
    ("stop_token_ids", [-1]),
    ("logit_bias", {"361": 1}),
    ("logit_bias", {"5": 101}),
    ("logit_bias", {"five": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {str(i): 1 for i in range(1025)}),
    ("user", 5),
]


@pytest.mark.parametrize("path", [CHAT, PLAIN])
async def test_wrong_values_name_their_field(client: httpx.AsyncClient, path: str) -> None:
    base = {"messages": HELLO} if path == CHAT else {"prompt": "hello"}
    for field, value in WRONG_NUMBERS:
        error = problem(await client.post(path, json={**base, field: value}), 400)
        assert error["type"] == "invalid_request_error"
        assert (error["param"] or "").split("[")[0].split(".")[0] == field, (field, value, error)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "hello"}, "messages"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "king", "content": "a"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"content": "a"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
        ),
        (CHAT, {"messages": [{"role": "function", "content": "a"}]}, "messages"),
        (CHAT, {"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"messages": HELLO, "logprobs": 3}, "logprobs"),
        (CHAT, {"messages": HELLO, "max_tokens": 0}, "max_tokens"),
        (CHAT, {"messages": HELLO, "echo": True}, "echo"),
        (CHAT, {"messages": HELLO, "stream_options": {}}, "stream_options"),
        (CHAT, {"messages": HELLO, "min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        (
            CHAT,
            {"messages": HELLO, "stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
        (CHAT, {"messages": HELLO, "stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        (PLAIN, {}, "prompt"),
        (PLAIN, {"prompt": ""}, "prompt"),
        (PLAIN, {"prompt": []}, "prompt"),
        (PLAIN, {"prompt": [[]]}, "prompt"),
        (PLAIN, {"prompt": ["a", 5]}, "prompt"),
        (PLAIN, {"prompt": [-1]}, "prompt"),
        (PLAIN, {"prompt": [361]}, "prompt"),
        (PLAIN, {"prompt": [[5], [10**20]]}, "prompt"),
        (PLAIN, {"prompt": None}, "prompt"),
        (PLAIN, {"prompt": ["a"] * 513}, "prompt"),
        (PLAIN, {"prompt": "a", "logprobs": 21}, "logprobs"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt"),
        ("/detokenize", {"tokens": [361]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
async def test_wrong_bodies(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], param: str
) -> None:
    assert problem(await client.post(path, json=body), 400)["param"] == param


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "auto"),
        ("functions", [{}]),
        ("response_format", {"type": "json_object"}),
        ("guided_json", {}),
        ("structured_outputs", {}),
        ("best_of", 2),
        ("best_of", True),
        ("suffix", "the end"),
        ("audio", {}),
        ("modalities", ["text", "audio"]),
        ("web_search_options", {}),
        ("use_beam_search", True),
        ("reasoning_effort", "high"),
        ("chat_template", "{{ 1 }}"),
    ],
)
async def test_what_is_not_built_is_refused_by_name(
    client: httpx.AsyncClient, field: str, value: object
) -> None:
    for path, base in ((CHAT, {"messages": HELLO}), (PLAIN, {"prompt": "hello"})):
        error = problem(await client.post(path, json={**base, field: value}), 400)
        assert (error["param"], error["code"]) == (field, "unsupported_parameter")
        assert f"`{field}`" in error["message"]


@pytest.mark.parametrize("number", [1, 1.0])
async def test_one_is_one_however_it_is_written(client: httpx.AsyncClient, number: float) -> None:
    body = {"prompt": "a", "max_tokens": 1, "best_of": number, "length_penalty": number}
    assert (await client.post(PLAIN, json=body)).status_code == 200


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b'"hello"',
        b"null",
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": ' + b"[" * 3000,
    ],
)
async def test_what_is_not_json(client: httpx.AsyncClient, text: bytes) -> None:
    for path in (CHAT, PLAIN, "/tokenize", "/detokenize"):
        error = problem(await client.post(path, content=text), 400)
        assert error["code"] == "invalid_json"


async def test_context_overflow_names_both_lengths(client: httpx.AsyncClient) -> None:
    for body in ({"prompt": [5] * 600}, {"prompt": [5] * 10, "max_tokens": 503}):
        error = problem(await client.post(PLAIN, json=body), 400)
        assert error["code"] == "context_length_exceeded"
        assert "512" in error["message"] and str(len(body["prompt"])) in error["message"]
    long = [{"role": "user", "content": "fox " * 600}]
    error = problem(await client.post(CHAT, json={"messages": long}), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


async def test_unknown_models_paths_and_methods(client: httpx.AsyncClient) -> None:
    for path, body in (
        (CHAT, {"messages": HELLO}),
        (PLAIN, {"prompt": "a"}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [1]}),
    ):
        error = problem(await client.post(path, json={**body, "model": "gpt"}), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert problem(await client.get("/v2/nothing"), 404)["code"] == "unknown_url"
    for path in (f"{CHAT}/", f"{PLAIN}/"):  # a redirect would cost the body, in many clients
        assert problem(await client.post(path, json={"prompt": "a"}), 404)["code"] == "unknown_url"
    answer = await client.delete(PLAIN)
    assert problem(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize("stream", [False, True])
async def test_busy_and_unavailable(
    client: httpx.AsyncClient, backend: LocalBackend, stream: bool
) -> None:
    body = {"prompt": ["a", "b"], "stream": stream}
    backend.refusal = Overloaded("The queue is full.", retry_after_s=2.3)
    answer = await client.post(PLAIN, json=body)
    assert problem(answer, 429)["message"] == "The queue is full."
    assert answer.headers["retry-after"] == "3"
    backend.refusal = Unavailable("Draining.")
    answer = await client.post(PLAIN, json=body)
    assert problem(answer, 503)["code"] == "unavailable"
    assert answer.headers["retry-after"] == "5"
    backend.refusal = RuntimeError("a secret at /tmp/x.py")
    error = problem(await client.post(PLAIN, json=body), 500)
    assert "secret" not in error["message"]


async def test_loading(client: httpx.AsyncClient, backend: LocalBackend) -> None:
    backend.loading, backend.unready = True, "loading weights"
    for path in ("/ready", "/v1/models"):
        problem(await client.get(path), 503)
    for path, body in ((CHAT, {"messages": HELLO}), (PLAIN, {"prompt": "a"})):
        problem(await client.post(path, json=body), 503)
    assert (await client.get("/health")).status_code == 200


async def test_what_the_engine_refuses_is_a_400(backend: LocalBackend) -> None:
    backend.served = type(backend.served)(
        **{f: getattr(backend.served, f) for f in backend.served.__slots__}
        | {"context_limit": 9999}
    )
    async with client_of(create_app(backend)) as client:
        error = problem(await client.post(PLAIN, json={"prompt": [5] * 600}), 400)
    assert "600" in error["message"]


async def test_bodies_over_the_limit(backend: LocalBackend) -> None:
    app = create_app(backend, GatewaySettings(max_body_bytes=1000))
    async with client_of(app) as client:
        answer = await client.post(PLAIN, json={"prompt": "a" * 1000})
        assert problem(answer, 413)["code"] == "request_too_large"
    part = b" " * 400
    for headers in ([], [(b"content-length", b"9" * 30)], [(b"content-length", b"12")]):
        exchange = Exchange(path=PLAIN, parts=[part] * 100, headers=headers)
        await exchange.run(app)
        assert exchange.status == 413
        assert len(exchange.parts) >= 97, "the rest is not even read"


async def test_keys(backend: LocalBackend) -> None:
    app = create_app(backend, GatewaySettings(api_keys=("one", "zwei€")))
    async with client_of(app) as client:
        for headers in ({}, {"authorization": "Bearer two"}, {"authorization": "Basic one"}):
            for path in ("/v1/models", "/fabric/status", "/v2/nothing"):
                answer = await client.get(path, headers=headers)
                assert problem(answer, 401)["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
        answer = await client.post(PLAIN, json={"prompt": "a"})
        problem(answer, 401)
        for key in ("one", "zwei€"):
            header = {"authorization": f"Bearer {key}".encode()}
            assert (await client.get("/v1/models", headers=header)).status_code == 200
        for path in ("/health", "/ready", "/metrics", "/openapi.json"):
            assert (await client.get(path)).status_code == 200
