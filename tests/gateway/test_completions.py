"""`/v1/completions`, `/tokenize`, `/detokenize`, `/v1/models`."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from kit.asgi import events
from kit.local_backend import LocalBackend, saying

from fabric.gateway.answers import Completion
from fabric.gateway.tokenizer import Tokenizer

PATH = "/v1/completions"


async def ask(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    answer = await client.post(PATH, json=body)
    assert answer.status_code == 200, answer.text
    Completion.model_validate_json(answer.content)
    return answer.json()


async def test_prompts_in_all_four_forms(
    client: httpx.AsyncClient, backend: LocalBackend, tokenizer: Tokenizer
) -> None:
    one = tokenizer.encode("hello world", add_special_tokens=False)
    two = tokenizer.encode("the lazy dogs", add_special_tokens=False)
    texts = []
    for prompt in ("hello world", one, ["hello world", "the lazy dogs"], [one, two]):
        answer = await ask(client, prompt=prompt, seed=1, max_tokens=4, echo=True, ignore_eos=True)
        texts.append([choice["text"] for choice in answer["choices"]])
    assert texts[0] == texts[1] and texts[2] == texts[3]
    assert texts[0][0] == texts[2][0] and texts[2][1].startswith("the lazy dogs")
    assert [request.prompt for request in backend.requests] == [
        tuple(p) for p in (one, one, one, two, one, two)
    ]


async def test_several_prompts_times_n(client: httpx.AsyncClient) -> None:
    body = {"prompt": ["hello", "world"], "n": 2, "seed": 4, "max_tokens": 6, "echo": True}
    answer = await ask(client, **body, ignore_eos=True)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    texts = [choice["text"] for choice in answer["choices"]]
    assert [text[:5] for text in texts] == ["hello", "hello", "world", "world"]
    assert answer["usage"]["completion_tokens"] == 24
    stream = await client.post(PATH, json={**body, "ignore_eos": True, "stream": True})
    streamed = [""] * 4
    for chunk in events(stream.text):
        choice = chunk["choices"][0]
        streamed[choice["index"]] += choice["text"]
    assert streamed == texts


async def test_default_max_tokens_is_16_and_never_over_the_context(
    client: httpx.AsyncClient, backend: LocalBackend
) -> None:
    await ask(client, prompt="hello")
    await ask(client, prompt=[5] * 505)
    assert [request.sampling.max_tokens for request in backend.requests] == [16, 7]


async def test_logprobs_and_echo(
    client: httpx.AsyncClient, backend: LocalBackend, tokenizer: Tokenizer
) -> None:
    said = tokenizer.encode("größer 👩", add_special_tokens=False)
    backend.worker.script = saying(said)
    prompt = tokenizer.encode("hello world", add_special_tokens=False)
    answer = await ask(client, prompt="hello world", max_tokens=30, logprobs=2, echo=True)
    choice = answer["choices"][0]
    found = choice["logprobs"]
    assert choice["text"] == "hello worldgrößer 👩"
    total = len(prompt) + len(said) + 1
    assert [len(found[name]) for name in found] == [total] * 4
    assert found["tokens"][0] == "hell" and found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert all(value == -1.0 for value in found["token_logprobs"][1:])
    assert all(found["tokens"][i] in found["top_logprobs"][i] for i in range(1, total))
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        if "\ufffd" not in token and not token.startswith("<|"):
            assert choice["text"][offset:].startswith(token)
    body = {"prompt": "hello world", "max_tokens": 30, "logprobs": 2, "echo": True}
    stream = await client.post(PATH, json={**body, "stream": True})
    streamed: dict[str, list[Any]] = {name: [] for name in found}
    for chunk in events(stream.text):
        for name, values in (chunk["choices"][0]["logprobs"] or {}).items():
            streamed[name] += values
    assert streamed == found


async def test_scoring_a_prompt_generates_nothing(client: httpx.AsyncClient) -> None:
    answer = await ask(client, prompt="hello world", max_tokens=0, echo=True, logprobs=1)
    choice = answer["choices"][0]
    assert choice["text"] == "hello world"
    assert choice["logprobs"]["tokens"] == ["hell", "o", " wor", "ld"]
    assert (answer["usage"]["completion_tokens"], choice["finish_reason"]) == (0, "length")
    body = {"prompt": "hello world", "max_tokens": 0, "echo": True, "stream": True}
    stream = events((await client.post(PATH, json=body)).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in stream) == "hello world"


async def test_prompt_logprobs(client: httpx.AsyncClient) -> None:
    answer = await ask(client, prompt="hello world", max_tokens=1, prompt_logprobs=0)
    entries = answer["choices"][0]["prompt_logprobs"]
    assert [entry and len(entry) for entry in entries] == [None, 1, 1, 1]


async def test_special_tokens_can_be_shown(
    client: httpx.AsyncClient, backend: LocalBackend
) -> None:
    backend.worker.script = saying([70, 0, 71])
    hidden = await ask(client, prompt="hello")
    shown = await ask(client, prompt="hello", skip_special_tokens=False)
    assert "<|endoftext|>" not in hidden["choices"][0]["text"]
    assert "<|endoftext|>" in shown["choices"][0]["text"]


async def test_tokenize_and_back(client: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    text = "hello 👩 <note>"
    answer = (await client.post("/tokenize", json={"prompt": text})).json()
    assert answer["tokens"] == tokenizer.encode(text, add_special_tokens=True)
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 512)
    assert answer["token_strs"] is None
    back = await client.post("/detokenize", json={"tokens": answer["tokens"], "model": "tiny"})
    assert back.json() == {"prompt": text}
    chat = {"messages": [{"role": "user", "content": "hi"}], "return_token_strs": True}
    answer = (await client.post("/tokenize", json=chat)).json()
    assert "".join(answer["token_strs"]) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_a_long_text_is_encoded_beside_the_loop(
    client: httpx.AsyncClient, tokenizer: Tokenizer
) -> None:
    text = "the quick brown fox " * 3000
    answer = (await client.post("/tokenize", json={"prompt": text})).json()
    assert answer["tokens"] == tokenizer.encode(text, add_special_tokens=True)


async def test_many_prompts_let_others_run_in_between(client: httpx.AsyncClient) -> None:
    async def turns_of_others(prompts: list[str]) -> int:
        turns, over = 0, asyncio.Event()

        async def other() -> None:
            nonlocal turns
            while not over.is_set():
                turns += 1
                await asyncio.sleep(0)

        running = asyncio.create_task(other())
        answer = await client.post(PATH, json={"prompt": [*prompts, ""]})
        over.set()
        await running
        assert answer.status_code == 400, "the last prompt is empty: all were read, none has run"
        return turns

    await turns_of_others([])  # reads the tokenizer
    assert await turns_of_others(["hello"] * 100) >= await turns_of_others([]) + 100


async def test_models(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert (await client.get("/v1/models/tiny")).json() == listed["data"][0]
    assert listed["data"][0]["max_model_len"] == 512
    other = await client.get("/v1/models/some/other")
    assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/fabric/status"])
async def test_operations(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.get(path)).status_code == 200
