"""The real demo model in bfloat16 against transformers: four ways to the same logits.

The yardstick is transformers' own bfloat16 against its float32 on the same input, per prompt.
"""

from __future__ import annotations

import pytest
import torch
from kit.cpp import without_cpp
from kit.demo import demo_model
from kit.paged import PagedRun, Piece
from kit.reference import reference_logits
from tokenizers import Tokenizer
from torch import Tensor

from fabric.kernels.executor import create_executor
from fabric.kernels.program import Executor, Program
from fabric.kernels.torch_executor import TorchExecutor
from fabric.model.decoder import build_program
from fabric.model.source import ModelFolder
from fabric.model.weights import Weights

__all__ = ["demo_model"]  # the fixture

QUESTION = """<|im_start|>user
What is the capital of France? Answer in one word.<|im_end|>
<|im_start|>assistant
"""
PROSE = """The paged key-value cache keeps the attention state of every sequence in blocks of a
fixed size. A block table maps positions to blocks, so that memory is given out one block at a time
and sequences with a common beginning can share it. When no block is free, """
CODE = """def fibonacci(n):
    '''Return the n-th number.'''
    if n < 2:
        return n
    """
PROMPTS = [QUESTION, PROSE, CODE]


@pytest.fixture(scope="module")
def program(demo_model: ModelFolder) -> Program:
    weights = Weights(demo_model.path)
    return build_program(weights.config, weights, torch.bfloat16, context_limit=512)


@pytest.fixture(scope="module", params=["torch", "best"])
def executor(request: pytest.FixtureRequest, program: Program) -> Executor:
    if request.param == "torch":
        return TorchExecutor(program)
    executor = create_executor(program, device="cpu")
    if isinstance(executor, TorchExecutor):
        without_cpp("the fastest executor is torch")
    return executor


@pytest.fixture(scope="module")
def prompts(demo_model: ModelFolder) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(demo_model.path / "tokenizer.json"))
    return [tokenizer.encode(prompt).ids for prompt in PROMPTS]


def test_prefill_decode_chunks_and_prefix_hits(
    demo_model: ModelFolder, executor: Executor, prompts: list[list[int]]
) -> None:
    run = PagedRun(executor, rows=5)
    for row, tokens in enumerate(prompts):
        exact = reference_logits(demo_model.path, tokens, torch.float32)
        rough = reference_logits(demo_model.path, tokens, torch.bfloat16)
        tolerance = 2 * (rough - exact).abs().max().item()

        def check(way: str, first: int, logits: Tensor) -> None:
            difference = (logits - exact[first:]).abs().max().item()  # noqa: B023
            assert difference <= tolerance, (way, difference, tolerance)  # noqa: B023

        (whole,) = run.step(Piece(row=row, first=0, tokens=tokens))
        check("prefill", 0, whole)
        parts = [
            run.step(Piece(row=3, first=first, tokens=tokens[first : first + 11]))[0]
            for first in range(0, len(tokens), 11)
        ]
        check("chunked prefill", 0, torch.cat(parts))
        half = len(tokens) - 10
        run.step(Piece(row=3, first=0, tokens=tokens[:half]))
        rows = [
            run.step(Piece(row=3, first=first, tokens=[tokens[first]]))[0]
            for first in range(half, len(tokens))
        ]
        check("decode", half, torch.cat(rows))
        cached = (len(tokens) - 1) // run.page
        run.share_prefix(row, 4, cached)
        (tail,) = run.step(Piece(row=4, first=cached * 16, tokens=tokens[cached * 16 :]))
        check("prefix hit", cached * 16, tail)


def test_it_speaks(demo_model: ModelFolder, executor: Executor, prompts: list[list[int]]) -> None:
    run = PagedRun(executor)
    tokens = list(prompts[0])
    (logits,) = run.step(Piece(row=0, first=0, tokens=tokens))
    answer = [int(logits[-1].argmax())]
    while answer[-1] not in Weights(demo_model.path).config.eos_token_ids and len(answer) < 16:
        step = Piece(row=0, first=len(tokens) + len(answer) - 1, tokens=answer[-1:])
        answer.append(int(run.step(step)[0].argmax()))
    tokenizer = Tokenizer.from_file(str(demo_model.path / "tokenizer.json"))
    assert "Paris" in tokenizer.decode(answer)


def test_the_tokenizer_is_the_published_one(demo_model: ModelFolder) -> None:
    # Token ids of SmolLM2's own tokenizer: digits one by one, ChatML tokens whole.
    tokenizer = Tokenizer.from_file(str(demo_model.path / "tokenizer.json"))
    assert tokenizer.encode("Hello world 123").ids == [19556, 905, 216, 33, 34, 35]
    assert tokenizer.encode("<|im_start|>user\nHi<|im_end|>").ids == [1, 4093, 198, 26843, 2]
    for text in (
        "naïve café 日本語 🎉🎉",
        "\n\n  def f(x):\n\treturn x\n",
        "don't 1,234.5 \u200b",
        "",
    ):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
