"""Greedy tokens of rounded weights depend on the request alone, as those of plain ones do."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from kit.cpp import without_cpp
from kit.local_engine import LocalEngine, ask
from kit.quantized_models import TEXT, checkpoint

from fabric.core.errors import ConfigError
from fabric.model.source import ModelFolder
from fabric.worker.runner import KernelBuild
from fabric.worker.worker import Worker

REQUESTS = 12


def tokens_of(engine: LocalEngine, *prompts: list[int]) -> list[list[int]]:
    outputs = engine.run(*(ask(f"r{i}", prompt) for i, prompt in enumerate(prompts)))
    return [outputs[f"r{i}", 0].tokens for i in range(len(prompts))]


@pytest.mark.parametrize("rounding", [pytest.param("int8", marks=pytest.mark.nightly), "int4"])
def test_the_demo_model_rounded_at_load(demo_model: ModelFolder, rounding: str) -> None:
    """Alone, in one batch, and in chunks that share steps with others."""
    worker = Worker(demo_model.path, device="cpu", build=KernelBuild(rounding=rounding))
    if not worker.description.startswith("C++"):
        without_cpp(f"batch invariance is its promise, but {worker.description} runs")
    assert rounding in worker.description
    draw = random.Random(3)
    prompts = [[draw.randrange(20, 49_000) for _ in range(2 + 5 * i)] for i in range(REQUESTS)]
    whole = LocalEngine(worker, prefix_cache=False)
    alone = [tokens_of(whole, prompt)[0] for prompt in prompts]
    assert len({tuple(tokens) for tokens in alone}) > REQUESTS // 2
    assert tokens_of(whole, *prompts) == alone
    assert max(len(plan.steps) for plan in whole.plans) == REQUESTS
    chunked = LocalEngine(worker, prefix_cache=False, chunk_tokens=13, step_tokens=40)
    assert tokens_of(chunked, *prompts) == alone


@pytest.mark.parametrize("name", ["int8 by int8", "int4", "int4 with minimums", "fp8 in blocks"])
def test_a_quantised_folder(tmp_path: Path, name: str) -> None:
    """fp8 runs as bfloat16 on a CPU. What is quantised once is not rounded again."""
    folder, _ = checkpoint(tmp_path / "model", name)
    worker = Worker(folder, device="cpu")
    assert name[:4] == "fp8 " or name[:4] in worker.description
    prompts = [TEXT[first : first + 9 * first + 3] for first in range(6)]
    engine = LocalEngine(worker, prefix_cache=False)
    alone = [tokens_of(engine, prompt)[0] for prompt in prompts]
    assert tokens_of(engine, *prompts) == alone
    with pytest.raises(ConfigError, match="quantised already"):
        Worker(folder, device="cpu", build=KernelBuild(rounding="int8"))
