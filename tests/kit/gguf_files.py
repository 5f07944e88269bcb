"""Write a model folder as GGUF, as llama.cpp's converter does, for testing the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file

from fabric.model.gguf_import import GGUF_ARCHITECTURES

QUANTISATION = gguf.GGMLQuantizationType
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    folder: Path,
    file: Path,
    *,
    quantisation: gguf.GGMLQuantizationType = QUANTISATION.F32,
    extra: dict[str, np.ndarray[Any, Any]] | None = None,
    **metadata: Any,
) -> Path:
    """`folder` as `file`; matrices in `quantisation`, vectors in float32. `metadata` fields come on
    top ("__" stands for "."; None leaves a field out); `extra` tensors too."""
    config = json.loads((folder / "config.json").read_text())
    kind = {name: key for key, name in GGUF_ARCHITECTURES.items()}[config["architectures"][0]]
    writer = gguf.GGUFWriter(file, kind)
    fields = _fields(folder, config, kind)
    fields |= {key.replace("__", "."): value for key, value in metadata.items()}
    for key, value in fields.items():
        _add(writer, key, value)
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.float().numpy()
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            values = _pairs_from_halves(values, config[heads])
        data = gguf.quants.quantize(values, quantisation) if values.ndim == 2 else values
        raw = quantisation if values.ndim == 2 else QUANTISATION.F32
        writer.add_tensor(_gguf_name(name), data, raw_dtype=raw)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _fields(folder: Path, config: dict[str, Any], kind: str) -> dict[str, Any]:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    return {
        f"{kind}.block_count": config["num_hidden_layers"],
        f"{kind}.context_length": config["max_position_embeddings"],
        f"{kind}.embedding_length": config["hidden_size"],
        f"{kind}.feed_forward_length": config["intermediate_size"],
        f"{kind}.attention.head_count": config["num_attention_heads"],
        f"{kind}.attention.head_count_kv": config["num_key_value_heads"],
        f"{kind}.attention.key_length": config["head_dim"],
        f"{kind}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{kind}.rope.freq_base": config["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in tokenizer["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    adders = {bool: writer.add_bool, str: writer.add_string, int: writer.add_uint32}
    adders |= {float: writer.add_float32, list: writer.add_array}
    adders[type(value)](key, value)


def _gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in _NAMES:
        return f"{_NAMES[stem]}.{kind}"
    layer, rest = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{_NAMES[rest]}.{kind}"


def _pairs_from_halves(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """`permute` of llama.cpp's convert_hf_to_gguf.py."""
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)
