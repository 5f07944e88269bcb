"""`/v1/chat/completions`: shapes, parameters, template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from kit.asgi import client_of, events
from kit.local_backend import LocalBackend, saying
from kit.tokenizers import byte_level

from fabric.gateway.answers import ChatCompletion
from fabric.gateway.api import create_app
from fabric.gateway.tokenizer import Tokenizer

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


def replying(backend: LocalBackend, tokenizer: Tokenizer, text: str) -> list[int]:
    """Make the engine say `text`."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    backend.worker.script = saying(tokens)
    return tokens


async def ask(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    answer = await client.post(PATH, json={"messages": HELLO, **body})
    assert answer.status_code == 200, answer.text
    ChatCompletion.model_validate_json(answer.content)
    return answer.json()


async def test_an_answer(
    client: httpx.AsyncClient, backend: LocalBackend, tokenizer: Tokenizer
) -> None:
    tokens = replying(backend, tokenizer, "größer, 你好 👩‍👩‍👧!")
    answer = await ask(client, model="tiny")
    choice = answer["choices"][0]
    assert choice["message"]["content"] == "größer, 你好 👩‍👩‍👧!"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", 2)
    usage = answer["usage"]
    assert usage["completion_tokens"] == len(tokens) + 1
    prompt = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    sent = backend.requests[0]
    assert list(sent.prompt) == tokenizer.encode(prompt, add_special_tokens=False)
    assert usage["prompt_tokens"] == len(sent.prompt)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert sent.sampling.max_tokens == 512 - len(sent.prompt)


async def test_the_stream_says_the_same(
    client: httpx.AsyncClient, backend: LocalBackend, tokenizer: Tokenizer
) -> None:
    replying(backend, tokenizer, "größer, 你好 👩‍👩‍👧!")
    whole = await ask(client, seed=1)
    body = {"messages": HELLO, "seed": 1, "stream": True, "stream_options": {"include_usage": True}}
    answer = await client.post(PATH, json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = events(answer.text)
    last = chunks.pop()
    # The second time the prompt is in the prefix cache.
    assert last["usage"].pop("prompt_tokens_details")["cached_tokens"] > 0
    assert whole["usage"].pop("prompt_tokens_details")["cached_tokens"] == 0
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all(chunk["usage"] is None for chunk in chunks)
    assert {(c["id"], c["object"]) for c in chunks} == {(last["id"], "chat.completion.chunk")}
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert not any("role" in choice["delta"] for choice in choices[1:])
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    assert text == whole["choices"][0]["message"]["content"]
    assert not any("\ufffd" in c["delta"].get("content", "") for c in choices)
    assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["stop"]
    assert choices[-1]["finish_reason"] == "stop"


async def test_a_character_cut_by_the_limit_is_not_shown(
    client: httpx.AsyncClient, backend: LocalBackend, tokenizer: Tokenizer
) -> None:
    tokens = replying(backend, tokenizer, "a🇩🇪")
    for limit in range(1, len(tokens)):
        answer = await ask(client, max_completion_tokens=limit)
        choice = answer["choices"][0]
        assert choice["finish_reason"] == "length"
        assert "a🇩🇪".startswith(choice["message"]["content"])
        assert answer["usage"]["completion_tokens"] == limit


async def test_stop_strings_end_the_choice(
    client: httpx.AsyncClient, backend: LocalBackend, tokenizer: Tokenizer
) -> None:
    replying(backend, tokenizer, "one hello world of foxes")
    answer = await ask(client, stop=["lo wor", "zzz"])
    choice = answer["choices"][0]
    assert choice["message"]["content"] == "one hel"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "lo wor")
    assert backend.aborted == [(backend.requests[0].request_id, 0)]
    backend.assert_idle()
    answer = await ask(client, stop="lo wor", include_stop_str_in_output=True)
    assert answer["choices"][0]["message"]["content"] == "one hello wor"


async def test_n_choices_stop_one_by_one(client: httpx.AsyncClient, backend: LocalBackend) -> None:
    answer = await ask(client, n=4, seed=5, max_tokens=30, stop=["a", "e", "o"], ignore_eos=True)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert len(set(texts)) == 4
    assert not any(letter in text for text in texts for letter in "aeo")
    body = {"messages": HELLO, "n": 4, "seed": 5, "max_tokens": 30, "stop": ["a", "e", "o"]}
    stream = await client.post(PATH, json={**body, "ignore_eos": True, "stream": True})
    streamed = ["", "", "", ""]
    for chunk in events(stream.text):
        choice = chunk["choices"][0]
        streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == texts


async def test_logprobs(client: httpx.AsyncClient, backend: LocalBackend) -> None:
    body = {"logprobs": True, "top_logprobs": 2, "max_tokens": 5, "seed": 3, "ignore_eos": True}
    answer = await ask(client, **body)
    entries = answer["choices"][0]["logprobs"]["content"]
    assert len(entries) == 5
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    joined = b"".join(bytes(entry["bytes"]) for entry in entries)
    shown = answer["choices"][0]["message"]["content"]
    assert joined.decode("utf-8", "replace").rstrip("\ufffd") == shown.rstrip("\ufffd")
    stream = await client.post(PATH, json={"messages": HELLO, **body, "stream": True})
    streamed = [
        entry
        for chunk in events(stream.text)
        for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == entries
    none = await ask(client, logprobs=True, max_tokens=2)
    assert none["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_prompt_logprobs(client: httpx.AsyncClient, backend: LocalBackend) -> None:
    answer = await ask(client, prompt_logprobs=1, max_tokens=2)
    entries = answer["prompt_logprobs"]
    assert len(entries) == answer["usage"]["prompt_tokens"]
    assert entries[0] is None
    assert entries[1][str(backend.requests[0].prompt[1])]["rank"] == 1


async def test_every_parameter_reaches_the_core(
    client: httpx.AsyncClient, backend: LocalBackend
) -> None:
    await ask(
        client,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        seed=-(2**63),
        repetition_penalty=1.1,
        frequency_penalty=-1,
        presence_penalty=2,
        logit_bias={"7": -100, "3": 1.5},
        stop_token_ids=[9, 9, 8],
        min_tokens=2,
        max_completion_tokens=3,
        max_tokens=300,
        ignore_eos=True,
        n=2,
        priority=-3,
    )
    request = backend.requests[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 5)
    assert (sampling.min_p, sampling.seed) == (0.1, -(2**63))
    assert sampling.repetition_penalty == 1.1
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (-1, 2)
    assert sampling.logit_bias == ((3, 1.5), (7, -100))
    assert sampling.stop_token_ids == (9, 8)
    assert (sampling.min_tokens, sampling.max_tokens) == (2, 3)
    assert (sampling.ignore_eos, sampling.n, request.priority) == (True, 2, -3)


async def test_null_and_off_mean_the_default(
    client: httpx.AsyncClient, backend: LocalBackend
) -> None:
    names = "temperature top_p top_k min_p seed stop n logit_bias stream user tools logprobs"
    await ask(client, **dict.fromkeys(names.split()), max_tokens=1)
    await ask(client, top_k=-1, max_tokens=1, response_format={"type": "text"}, modalities=["text"])
    first, second = (request.sampling for request in backend.requests)
    assert (first.temperature, first.top_p, first.top_k, second.top_k) == (1.0, 1.0, None, None)
    assert first.seed != second.seed, "a missing seed is drawn anew"


async def test_roles_and_parts(
    client: httpx.AsyncClient, backend: LocalBackend, tokenizer: Tokenizer
) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "c"},
    ]
    answer = await client.post(PATH, json={"messages": messages, "max_tokens": 1})
    assert answer.status_code == 200
    prompt = tokenizer.decode(list(backend.requests[0].prompt))
    assert prompt == (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n<|im_start|>tool\n42<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("arguments", ["[" * 100_000, '{"a": "\\ud800"}', "{", '{"a": 1}'])
async def test_arguments_of_past_tool_calls_may_be_anything(tmp_path: Path, arguments: str) -> None:
    """They are a string in which the model wrote JSON, or not quite."""
    template = "{{ (messages[0].tool_calls[0].function.arguments | tojson)[:20] }}"
    backend = LocalBackend(byte_level(tmp_path, template=template))
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    body = {"messages": [{"role": "assistant", "tool_calls": [call]}], "max_tokens": 1}
    async with client_of(create_app(backend)) as client:
        assert (await client.post(PATH, json=body)).status_code == 200


async def test_the_newer_limit_wins_over_the_older(client: httpx.AsyncClient) -> None:
    answer = await ask(client, max_tokens=0, max_completion_tokens=3, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 3


async def test_the_final_message_can_be_continued(
    client: httpx.AsyncClient, backend: LocalBackend, tokenizer: Tokenizer
) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "I think that"}]
    body = {"messages": messages, "continue_final_message": True, "max_tokens": 1}
    assert (await client.post(PATH, json=body)).status_code == 200
    assert tokenizer.decode(list(backend.requests[0].prompt)).endswith("assistant\nI think that")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.missing.more }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
async def test_a_template_that_fails_is_a_400(tmp_path: Path, template: str, reason: str) -> None:
    backend = LocalBackend(byte_level(tmp_path, template=template))
    async with client_of(create_app(backend)) as client:
        answer = await client.post(PATH, json={"messages": HELLO})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
    assert reason in answer.json()["error"]["message"]


async def test_a_model_without_a_template_has_no_chat(tmp_path: Path) -> None:
    backend = LocalBackend(byte_level(tmp_path, template=None))
    async with client_of(create_app(backend)) as client:
        answer = await client.post(PATH, json={"messages": HELLO})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_chat_template")
        plain = await client.post("/v1/completions", json={"prompt": "hello"})
        assert plain.status_code == 200
