"""The official client, unchanged."""

from __future__ import annotations

from collections.abc import AsyncIterator

import openai
import pytest
from kit.asgi import client_of
from kit.local_backend import LocalBackend, saying

from fabric.core.errors import Overloaded
from fabric.gateway.api import create_app
from fabric.gateway.settings import GatewaySettings
from fabric.gateway.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def openai_client(
    backend: LocalBackend, tokenizer: Tokenizer
) -> AsyncIterator[openai.AsyncOpenAI]:
    backend.worker.script = saying(tokenizer.encode("hello 你好", add_special_tokens=False))
    app = create_app(backend, GatewaySettings(api_keys=("key",)))
    async with openai.AsyncOpenAI(
        base_url="http://fabric/v1", api_key="key", http_client=client_of(app), max_retries=0
    ) as client:
        yield client


async def test_chat(openai_client: openai.AsyncOpenAI) -> None:
    answer = await openai_client.chat.completions.create(
        model="tiny", messages=HELLO, logprobs=True, top_logprobs=1, n=2, user="u"
    )
    assert [choice.message.content for choice in answer.choices] == ["hello 你好"] * 2
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].logprob == -1.0
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


async def test_chat_stream(openai_client: openai.AsyncOpenAI) -> None:
    stream = await openai_client.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "hello 你好"
    assert chunks[-1].usage.completion_tokens > 3
    async with openai_client.chat.completions.stream(model="tiny", messages=HELLO) as helper:
        final = await helper.get_final_completion()
    assert final.choices[0].message.content == "hello 你好"


async def test_completions(openai_client: openai.AsyncOpenAI) -> None:
    answer = await openai_client.completions.create(
        model="tiny", prompt=["a", "b"], logprobs=2, echo=True, max_tokens=3
    )
    assert [choice.text[0] for choice in answer.choices] == ["a", "b"]
    assert answer.choices[0].logprobs.token_logprobs[0] is None
    stream = await openai_client.completions.create(model="tiny", prompt="a", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "hello 你好"


async def test_models(openai_client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in openai_client.models.list()] == ["tiny"]
    assert (await openai_client.models.retrieve("tiny")).owned_by == "fabric"


async def test_errors(openai_client: openai.AsyncOpenAI, backend: LocalBackend) -> None:
    create = openai_client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as bad:
        await create(model="tiny", messages=HELLO, tools=[{"type": "function"}])
    assert (bad.value.param, bad.value.code) == ("tools", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError):
        await create(model="gpt-4", messages=HELLO)
    with pytest.raises(openai.AuthenticationError):
        await openai_client.with_options(api_key="wrong").models.list()
    backend.refusal = Overloaded("full", retry_after_s=1)
    with pytest.raises(openai.RateLimitError):
        await create(model="tiny", messages=HELLO)
