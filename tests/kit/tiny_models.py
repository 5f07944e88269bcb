"""Tiny random model folders, real in every way but size: weights, tokenizer with chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from fabric.model.config import ARCHITECTURES, parse_config

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END = SPECIAL.index("<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Merges: the words of this sentence, grown letter by letter. A space is part of the next word.
_WORDS = (
    "the quick brown fox jumps over lazy dogs and hello world tell me what you think of this one"
)
VOCAB = 320


def make_tiny_model(
    folder: Path,
    architecture: str = "LlamaForCausalLM",
    *,
    seed: int = 0,
    shards: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    **overrides: Any,
) -> Path:
    """Write a model folder and return it. `overrides` are fields of config.json.

    Weights are drawn so that attention is peaked and logits are several apart: a wrong mask, bias
    or rotation shows at once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = _config(architecture) | overrides
    data = {key: value for key, value in data.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(data, indent=2))
    ids = {"bos_token_id": 1, "eos_token_id": data.get("eos_token_id", END)}
    (folder / "generation_config.json").write_text(json.dumps(ids))
    write_tiny_tokenizer(folder)
    write_weights(folder, random_weights(data, seed=seed, dtype=dtype), shards=shards)
    return folder


def random_weights(
    data: dict[str, Any], *, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """Every tensor that a config.json asks for."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in parse_config(data).tensor_shapes().items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            weight = 1 + 0.2 * noise
        elif name.endswith(".bias") or "embed" in name:
            weight = 0.5 * noise
        else:
            peaked = ("q_proj", "k_proj", "moe.gate.", "mlp.gate.")
            gain = 2.0 if any(part in name for part in peaked) else 1.0
            weight = gain * noise / shape[1] ** 0.5
        weights[name] = weight.to(dtype)
    return weights


def write_weights(folder: Path, weights: dict[str, torch.Tensor], *, shards: int = 1) -> None:
    """model.safetensors, or that many shards with an index."""
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(weights)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tiny_tokenizer(folder: Path) -> None:
    """Byte-level BPE of `VOCAB` tokens, with ChatML's special tokens: any text round-trips."""
    tokenizer = Tokenizer(BPE(vocab=vocabulary(), merges=merges()))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    assert tokenizer.get_vocab_size() == VOCAB
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def merges() -> list[tuple[str, str]]:
    """The tokenizer's merges, best first."""
    found: dict[tuple[str, str], None] = {}
    for word in _WORDS.split():
        for spelling in (word, "Ġ" + word):
            for i in range(1, len(spelling)):
                found[spelling[:i], spelling[i]] = None
    unique = {first + second: (first, second) for first, second in found}
    return list(unique.values())[: VOCAB - len(SPECIAL) - 256]


def vocabulary() -> dict[str, int]:
    """Special tokens, the 256 bytes, then one token a merge."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [first + second for first, second in merges()]
    return {token: index for index, token in enumerate(tokens)}


# Four experts, two of which work on each token; some weights are drawn larger, so that the router
# decides clearly and unevenly.
_EXPERTS: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3MoeForCausalLM": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    },
}


def _config(architecture: str) -> dict[str, Any]:
    return _EXPERTS.get(architecture, {}) | {
        "architectures": [architecture],
        "model_type": ARCHITECTURES[architecture].model_type,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": END,
    }
