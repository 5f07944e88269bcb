"""Every architecture and rope scaling against transformers, on tiny random models.

Four ways to the same logits: the prompt in one step, in chunks mixed with another sequence, token
by token, and behind another sequence's cached blocks. Prompts are longer than windows and original
context lengths, so every scaling and mask is at work.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.cpp import without_cpp
from kit.paged import PagedRun, Piece
from kit.reference import reference_logits
from kit.tiny_models import VOCAB, make_tiny_model
from torch import Tensor

from fabric.kernels.executor import create_executor
from fabric.kernels.program import Executor
from fabric.kernels.torch_executor import TorchExecutor
from fabric.model.decoder import build_program
from fabric.model.weights import Weights

LENGTH = 60
PAGE = 16

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "dynamic": {
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
        "max_position_embeddings": 24,
    },
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 24,
        },
        "rope_theta": 500.0,  # so that 8 frequencies fall on both sides of the ramp, and on it
    },
    "yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 24,
            "beta_fast": 1.0,
            "beta_slow": 0.05,
        },
        "max_position_embeddings": 96,
        "rope_theta": 500.0,  # the ramp runs from 1.7 to 5.6 of 8 frequencies
    },
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": 20},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {},
}

# Differences within an architecture: (architecture, fields of config.json; ... drops a field).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2-every-head-its-own-kv": ("LlamaForCausalLM", {"num_key_value_heads": ...}),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "smollm2-tied-derived-head-dim": (
        "LlamaForCausalLM",
        {
            "tie_word_embeddings": True,
            "head_dim": ...,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "hidden_size": 96,
        },
    ),
    "llama-wide-heads": ("LlamaForCausalLM", {"head_dim": 32}),
    "mistral-no-window": ("MistralForCausalLM", {}),
    "mistral-window-of-one-page": ("MistralForCausalLM", {"sliding_window": 16}),
    "qwen2-upper-layers-windowed": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen2-window-switched-off": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3-layer-types": (
        "Qwen3ForCausalLM",
        {
            "use_sliding_window": True,
            "sliding_window": 11,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen3-attention-bias": ("Qwen3ForCausalLM", {"attention_bias": True}),
    "version-5-spelling": (
        "LlamaForCausalLM",
        {
            "rope_theta": ...,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e3},
        },
    ),
    "yarn-own-attention-factor": (
        "LlamaForCausalLM",
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 24,
                "attention_factor": 1.3,
                "beta_fast": 1.0,
                "beta_slow": 0.05,
                "truncate": False,
            },
            "rope_theta": 500.0,
        },
    ),
    "mixtral": ("MixtralForCausalLM", {}),
    "mixtral-windowed": ("MixtralForCausalLM", {"sliding_window": 20, "num_experts_per_tok": 3}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {}),
    "qwen3-moe-one-expert-not-renormalised": (
        "Qwen3MoeForCausalLM",
        {"norm_topk_prob": False, "num_experts_per_tok": 1},
    ),
    "qwen3-moe-some-layers-dense": (
        "Qwen3MoeForCausalLM",
        {
            "num_hidden_layers": 4,
            "mlp_only_layers": [1],
            "decoder_sparse_step": 2,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "use_sliding_window": True,
            "sliding_window": 15,
        },
    ),
    "yarn-mscale": (
        "LlamaForCausalLM",
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 24,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
            }
        },
    ),
}

CASES = {
    f"{architecture.removesuffix('ForCausalLM').lower()}-{scaling}": (
        architecture,
        ARCHITECTURES[architecture] | SCALINGS[scaling],
    )
    for architecture in ARCHITECTURES
    for scaling in SCALINGS
} | VARIANTS


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model folder a case."""
    root = tmp_path_factory.mktemp("models")
    return {
        name: make_tiny_model(root / name, architecture, seed=index, **fields)
        for index, (name, (architecture, fields)) in enumerate(CASES.items())
    }


@pytest.mark.parametrize("case", CASES)
def test_float32_equals_transformers(folders: dict[str, Path], case: str) -> None:
    # Sums of at most 96 products in float32 and a few layers of them: relative errors of about
    # 1e-6, so 1e-5 of the largest logit. A wrong mask or rotation is off by more than 1e-1.
    expected = _expected(folders[case], torch.float32)
    tolerance = 1e-5 * expected.abs().max().item()
    for way, start, logits in _every_way(_torch(folders[case], torch.float32)):
        difference = (logits - expected[start:]).abs().max().item()
        assert difference <= tolerance, (way, difference, tolerance)


@pytest.mark.parametrize("executor", ["torch", "best"])
@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_as_good_as_transformers(
    folders: dict[str, Path], case: str, executor: str
) -> None:
    # The yardstick: how far transformers' own bfloat16 is from its float32 on the same input.
    exact = _expected(folders[case], torch.float32)
    tolerance = 2 * (_expected(folders[case], torch.bfloat16) - exact).abs().max().item()
    make = {"torch": _torch, "best": _best}[executor]
    for way, start, logits in _every_way(make(folders[case], torch.bfloat16)):
        difference = (logits - exact[start:]).abs().max().item()
        assert difference <= tolerance, (way, difference, tolerance)


@pytest.mark.parametrize(
    ("case", "fields"),
    [
        ("mistral-default", {"sliding_window": None}),
        ("mistral-default", {"sliding_window": 21}),
        ("qwen2-upper-layers-windowed", {"max_window_layers": 0}),
        ("llama-linear", {"rope_scaling": None}),
        ("llama-dynamic", {"rope_scaling": None, "max_position_embeddings": 256}),
        ("llama-llama3", {"rope_scaling": None}),
        ("llama-yarn", {"rope_scaling": None}),
        ("mixtral", {"num_experts_per_tok": 1}),
        ("qwen3-moe", {"norm_topk_prob": False}),
        ("yarn-mscale", {"rope_scaling": SCALINGS["yarn"]["rope_scaling"]}),
        ("yarn-own-attention-factor", SCALINGS["yarn"]),
    ],
)
def test_each_difference_is_visible(
    folders: dict[str, Path], tmp_path: Path, case: str, fields: dict[str, Any]
) -> None:
    """The comparison above could not pass by accident: ignoring the field fails it by far."""
    architecture, given = CASES[case]
    index = list(CASES).index(case)
    altered = make_tiny_model(tmp_path, architecture, seed=index, **given | fields)
    expected = _expected(folders[case], torch.float32)
    _, start, logits = next(_every_way(_torch(altered, torch.float32)))
    assert (logits - expected[start:]).abs().max() > 1e-2


def _tokens() -> list[int]:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, VOCAB, (LENGTH,), generator=generator).tolist()


@cache
def _expected(folder: Path, dtype: torch.dtype) -> Tensor:
    # transformers rotates a long prompt under dynamic scaling by its last position's base; only
    # token by token does it do what a served sequence does (fabric/model/rope.py says more).
    dynamic = '"dynamic"' in (folder / "config.json").read_text()
    return reference_logits(folder, _tokens(), dtype, token_by_token=dynamic)


def _torch(folder: Path, dtype: torch.dtype) -> Executor:
    weights = Weights(folder)
    return TorchExecutor(build_program(weights.config, weights, dtype))


def _best(folder: Path, dtype: torch.dtype) -> Executor:
    weights = Weights(folder)
    executor = create_executor(build_program(weights.config, weights, dtype), device="cpu")
    if isinstance(executor, TorchExecutor):
        without_cpp("the fastest executor is torch")
    return executor


def _every_way(executor: Executor) -> Iterator[tuple[str, int, Tensor]]:
    """(how, first position, logits from there on) of the same tokens, computed four ways."""
    tokens = _tokens()
    other = tokens[::-1]
    run = PagedRun(executor, page=PAGE, blocks_a_row=5)
    (whole,) = run.step(Piece(row=0, first=0, tokens=tokens))
    yield "prefill", 0, whole

    parts = []
    for first in range(0, LENGTH, 7):  # 7: chunks begin and end inside of blocks
        chunk = Piece(row=1, first=first, tokens=tokens[first : first + 7])
        noise = Piece(row=2, first=first, tokens=other[first : first + 7])
        parts.append(run.step(noise, chunk)[1])
    yield "chunked prefill", 0, torch.cat(parts)

    rows = [run.step(Piece(row=3, first=0, tokens=tokens[:40]))[0][-1:]]
    for position in range(40, LENGTH):
        decode = Piece(row=3, first=position, tokens=[tokens[position]])
        beside = Piece(row=2, first=0, tokens=other[: position % 5 + 1])
        rows.append(run.step(decode, beside)[0])
    yield "decode", 39, torch.cat(rows)

    cached = LENGTH // PAGE  # whole blocks
    run.share_prefix(0, 2, cached)
    (tail,) = run.step(Piece(row=2, first=cached * PAGE, tokens=tokens[cached * PAGE :]))
    yield "prefix hit", cached * PAGE, tail
