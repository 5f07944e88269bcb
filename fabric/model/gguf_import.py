"""A GGUF file -> a Hugging Face folder: config.json, tokenizer files, bfloat16 safetensors.

llama.cpp renames the tensors and, for its "llama" architecture, reorders the rows of q and k (it
pairs neighbours in the rotary embedding, Hugging Face pairs halves). Both are undone here.
Quantised tensors are expanded with the `gguf` package.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fabric.core.errors import ModelError
from fabric.model.config import ARCHITECTURES, DecoderConfig, parse_config
from fabric.model.gguf_tokenizer import write_tokenizer
from fabric.model.progress import Progress, silent
from fabric.model.rope import rope_frequencies
from fabric.model.safetensors_writer import write_safetensors

GGUF_ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# Hugging Face name -> GGUF name, {} for the layer.
_GLOBAL: Mapping[str, str] = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER: Mapping[str, str] = {
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
_ROWS_AT_ONCE_NUMBERS = 1 << 24  # numbers expanded to float32 at a time: 64 MB


def convert_gguf(file: Path, folder: Path, progress: Progress = silent) -> None:
    """Fill `folder` from `file`. Raises `ModelError` if it can't be read or is not supported."""
    reader = _open(file)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    value = _Metadata(file, reader.fields)
    with _blaming(file):
        data = _config_data(value, tensors)
        config = parse_config(data)
    _check_space(folder, config.parameters() * 2)
    (folder / "config.json").write_text(json.dumps(data, indent=2) + "\n")
    generation = {key: data[key] for key in ("bos_token_id", "eos_token_id") if key in data}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    with _blaming(file):
        write_tokenizer(value.all(), folder)
    shapes = config.tensor_shapes()
    _check_tensors(file, tensors, shapes)
    write_safetensors(
        folder / "model.safetensors",
        shapes,
        _expanded(file, tensors, config, permuted=value("general.architecture") == "llama"),
        progress,
    )


@contextmanager
def _blaming(file: Path) -> Iterator[None]:
    """Metadata may hold anything: what breaks on it is one `ModelError`. (The tokenizers library
    raises plain `Exception`; the disk's `OSError` is not the file's fault.)"""
    try:
        yield
    except (ModelError, OSError):
        raise
    except Exception as error:  # noqa: BLE001
        raise ModelError(
            f"{file} has damaged metadata ({type(error).__name__}: {str(error)[:200]})"
        ) from None


class _Metadata:
    """Fields of one file by key; `{arch}` stands for the architecture's prefix."""

    def __init__(self, file: Path, fields: Mapping[str, Any]) -> None:
        self._file = file
        self._fields = fields

    def __call__(self, key: str, default: Any = None) -> Any:
        if "{arch}" in key:
            key = key.format(arch=self("general.architecture"))
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def required(self, key: str) -> Any:
        value = self(key)
        if value is None or isinstance(value, list):
            raise ModelError(f"{self._file}: metadata {key} is missing or a list")
        return value

    def all(self) -> dict[str, Any]:
        """The tokenizer's fields."""
        return {key: self(key) for key in self._fields if key.startswith("tokenizer.")}


def _open(file: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except (ValueError, KeyError, IndexError, OSError, UnicodeDecodeError, TypeError) as error:
        raise ModelError(
            f"{file} is truncated or no GGUF file ({type(error).__name__} while reading it)"
        ) from None


def _config_data(value: _Metadata, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The data of a config.json."""
    kind = value("general.architecture")
    if kind not in GGUF_ARCHITECTURES:
        raise ModelError(
            f"GGUF architecture {kind!r} is not supported; supported: "
            f"{', '.join(GGUF_ARCHITECTURES)}"
        )
    if (value("split.count") or 1) > 1:
        raise ModelError("the GGUF file is split in parts; merge them with llama.cpp's gguf-split")
    if "token_embd.weight" not in tensors:
        raise ModelError("the GGUF file has no tensor token_embd.weight")
    name = GGUF_ARCHITECTURES[kind]
    heads = value.required("{arch}.attention.head_count")
    hidden = value.required("{arch}.embedding_length")
    head_dim = value("{arch}.attention.key_length") or value("{arch}.rope.dimension_count")
    head_dim = head_dim or hidden // heads
    for key in ("attention.sliding_window", "rope.scaling.attn_factor", "expert_count"):
        if value("{arch}." + key, 0) not in (0, 1):
            raise ModelError(f"the GGUF file sets {kind}.{key}, which is not supported")
    if value("{arch}.rope.dimension_count", head_dim) != head_dim:
        raise ModelError("the GGUF file rotates a part of each head only; that is not supported")
    data: dict[str, Any] = {
        "architectures": [name],
        "model_type": ARCHITECTURES[name].model_type,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": value.required("{arch}.feed_forward_length"),
        "num_hidden_layers": value.required("{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": value.required("{arch}.context_length"),
        "rms_norm_eps": value.required("{arch}.attention.layer_norm_rms_epsilon"),
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": kind != "qwen2" and "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "dtype": "bfloat16",
        "rope_theta": value("{arch}.rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(value, tensors),
    }
    return data | _special_ids(value)


def _special_ids(value: _Metadata) -> dict[str, Any]:
    """End-of-sequence ids (end of text, of turn, of message) and the begin-of-sequence id."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    ends = [value(key) for key in keys if value(key) is not None]
    ids: dict[str, Any] = {"eos_token_id": list(dict.fromkeys(ends))} if ends else {}
    begin = value("tokenizer.ggml.bos_token_id")
    return ids if begin is None else ids | {"bos_token_id": begin}


def _rope_scaling(value: _Metadata, tensors: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = value("{arch}.rope.scaling.type", "none")
    factor = value("{arch}.rope.scaling.factor")
    if "rope_freqs.weight" in tensors:
        return _llama3_scaling(value, tensors["rope_freqs.weight"])
    if kind == "none" or not factor:
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    original = value("{arch}.rope.scaling.original_context_length")
    if original:
        scaling["original_max_position_embeddings"] = original
    for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if (number := value("{arch}.rope.scaling." + key)) is not None:
            scaling[name] = number
    if kind not in ("linear", "yarn"):
        raise ModelError(f"GGUF rope scaling {kind!r} is not supported")
    return scaling


def _llama3_scaling(value: _Metadata, tensor: Any) -> dict[str, Any]:
    """GGUF stores Llama 3.1's scaling as one divisor a frequency; find the rule that made them."""
    divisors = np.asarray(tensor.data, dtype=np.float32)
    scaling = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theta = value("{arch}.rope.freq_base", 10000.0)
    plain = rope_frequencies({"rope_theta": theta}, 2 * len(divisors))
    scaled = rope_frequencies({"rope_theta": theta, "rope_scaling": scaling}, 2 * len(divisors))
    if not np.allclose((plain / scaled).numpy(), divisors, rtol=1e-3):
        raise ModelError("the GGUF file has rope_freqs that are not Llama 3.1's scaling")
    return scaling


def _check_tensors(
    file: Path, tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    wanted = {_gguf_name(name): (name, shape) for name, shape in shapes.items()}
    for gguf_name, (name, shape) in wanted.items():
        if gguf_name not in tensors:
            raise ModelError(f"{file}: tensor {gguf_name} ({name}) is missing")
        found = tuple(int(n) for n in reversed(tensors[gguf_name].shape))
        if found != shape:
            raise ModelError(
                f"{file}: tensor {gguf_name} is {list(found)}, but the metadata says {list(shape)}"
            )
    left = sorted(tensors.keys() - wanted.keys() - {"rope_freqs.weight"})
    if left:
        raise ModelError(f"{file}: tensor {left[0]} has no place in this architecture")


def _gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in _GLOBAL:
        return f"{_GLOBAL[stem]}.{kind}"
    layer, rest = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{_LAYER[rest]}.{kind}"


def _expanded(
    file: Path, tensors: Mapping[str, Any], config: DecoderConfig, *, permuted: bool
) -> Iterator[Tensor]:
    """Every tensor in bfloat16, in the order of `tensor_shapes`, a bounded part at a time."""
    from gguf.quants import dequantize

    for name, shape in config.tensor_shapes().items():
        tensor = tensors[_gguf_name(name)]
        rows = np.asarray(tensor.data)
        if permuted and ".q_proj." in name:
            rows = _halves_from_pairs(rows, config.heads)
        if permuted and ".k_proj." in name:
            rows = _halves_from_pairs(rows, config.kv_heads)
        step = max(_ROWS_AT_ONCE_NUMBERS // int(np.prod(shape[1:])), 1)
        for start in range(0, len(rows), step):
            try:
                wide = dequantize(rows[start : start + step], tensor.tensor_type)
            except NotImplementedError:
                raise ModelError(
                    f"{file}: tensor {tensor.name} is quantised as {tensor.tensor_type.name}, "
                    "which can't be expanded"
                ) from None
            yield torch.from_numpy(np.array(wide, dtype=np.float32)).bfloat16()


def _halves_from_pairs(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Undo llama.cpp's order of rows: within a head, rows (0, 1), (2, 3) .. become i and i + E/2.

    Whole rows move, so this works on quantised rows as well.
    """
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed * 1.02:
        raise ModelError(
            f"the converted model needs {needed / 1e9:.1f} GB in {folder.parent}, where "
            f"{free / 1e9:.1f} GB are free"
        )
