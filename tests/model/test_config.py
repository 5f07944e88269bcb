"""config.json: defaults as transformers has them, and one clear error for what can't be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from kit.tiny_models import make_tiny_model

from fabric.core.errors import ModelError
from fabric.model.config import load_config, parse_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 320,
}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None, "model_type": "mamba"}, "mamba"),
        ({"architectures": None}, "None"),
        ({"architectures": [["LlamaForCausalLM"]]}, "architecture"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": "awq"}, "awq"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"head_dim": 15}, "even"),
        ({"hidden_size": 2, "num_attention_heads": 4}, "head_dim"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_theta": 0}, "rope theta"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                }
            },
            "high_freq_factor",
        ),
        (
            {"architectures": ["MistralForCausalLM"], "layer_types": ["sliding_attention"] * 3},
            "layer_types",
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["sliding_attention"] * 3},
            "use_sliding_window",
        ),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "use_sliding_window": True,
                "layer_types": ["full_attention"],
            },
            "layer_types",
        ),
    ],
)
def test_what_cannot_be_served_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said.replace("[", r"\[")):
        parse_config(LLAMA | fields)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        load_config(tmp_path)
    for text in ("{", "[]", "\xff"):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(ModelError, match=r"config\.json"):
            load_config(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "given"),
    [
        ("LlamaForCausalLM", {"num_key_value_heads": ...}),
        ("LlamaForCausalLM", {"num_key_value_heads": None}),
        ("MistralForCausalLM", {"num_attention_heads": 8, "num_key_value_heads": ...}),
        ("MistralForCausalLM", {"sliding_window": ...}),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 7}),
        ("Qwen3ForCausalLM", {"head_dim": ...}),
        ("LlamaForCausalLM", {"rms_norm_eps": ..., "rope_theta": ...}),
    ],
)
def test_defaults_are_those_of_transformers(
    tmp_path: Path, architecture: str, given: dict[str, Any]
) -> None:
    from transformers import AutoConfig

    folder = make_tiny_model(tmp_path, architecture, **given)
    ours, theirs = load_config(folder), AutoConfig.from_pretrained(folder)
    assert ours.kv_heads == theirs.num_key_value_heads
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    head_dim = getattr(theirs, "head_dim", None)
    assert ours.head_dim == (head_dim or theirs.hidden_size // theirs.num_attention_heads)
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * ours.layers
    window = getattr(theirs, "sliding_window", None)
    assert ours.windows == tuple(window if kind == "sliding_attention" else None for kind in kinds)


def test_end_ids_of_the_generation_config_win() -> None:
    assert parse_config(LLAMA | {"eos_token_id": 2}).eos_token_ids == (2,)
    config = parse_config(LLAMA | {"eos_token_id": 2}, {"eos_token_id": [5, 6]})
    assert config.eos_token_ids == (5, 6)
    assert parse_config(LLAMA).eos_token_ids == ()


def test_context_limit_follows_the_scaling() -> None:
    def limit(**scaling: Any) -> int:
        return parse_config(LLAMA | {"rope_scaling": scaling or None}).context_limit

    assert limit() == 128
    assert limit(type="linear", factor=2.0) == 128  # max_position_embeddings holds it already
    assert limit(type="dynamic", factor=2.0) == 256
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert limit(**yarn) == 256


def test_parameters_are_what_the_file_holds(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "Qwen3ForCausalLM", tie_word_embeddings=True)
    data = (folder / "model.safetensors").read_bytes()
    header = int.from_bytes(data[:8], "little")
    assert load_config(folder).parameters() * 2 == len(data) - 8 - header
    assert json.loads(data[8 : 8 + header])  # it was a real file
