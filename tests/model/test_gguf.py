"""GGUF files: the way back from llama.cpp's names, order of rows, quantisation and tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from kit.gguf_files import QUANTISATION, write_gguf
from kit.tiny_models import make_tiny_model
from tokenizers import Tokenizer

from fabric.core.errors import ModelError
from fabric.model.config import load_config
from fabric.model.gguf_import import convert_gguf
from fabric.model.gguf_tokenizer import PRE_TOKENIZERS, write_tokenizer
from fabric.model.rope import rope_tables
from fabric.model.weights import Weights, validate

TEXTS = [
    "Hello the quick fox",
    "naïve 12345 it's\n\n  日本語 🎉 <|im_start|>x<|im_end|>",
    "",
    "  a  ",
]


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("LlamaForCausalLM", {}),
        ("LlamaForCausalLM", {"tie_word_embeddings": True, "head_dim": 32}),
        ("Qwen2ForCausalLM", {}),
        ("Qwen3ForCausalLM", {}),
    ],
)
def test_the_way_there_and_back(tmp_path: Path, architecture: str, fields: dict[str, Any]) -> None:
    source = make_tiny_model(tmp_path / "source", architecture, **fields)
    file = write_gguf(source, tmp_path / "tiny.gguf")
    folder = tmp_path / "back"
    folder.mkdir()
    seen: list[tuple[int, int]] = []
    convert_gguf(file, folder, lambda _what, done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == load_config(folder).parameters() * 2
    there, back = Weights(source), Weights(folder)
    assert _numbers(back.config) == _numbers(there.config)
    for name in there.config.tensor_shapes():
        assert torch.equal(back[name], there[name]), name
    before, after = (Tokenizer.from_file(str(f / "tokenizer.json")) for f in (source, folder))
    for text in TEXTS:
        assert after.encode(text).ids == before.encode(text).ids
        assert after.decode(after.encode(text).ids, skip_special_tokens=False) == text
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|im_end|>"
    assert config["chat_template"] == "{{ messages[0]['content'] }}"


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_quantised_tensors_are_expanded(tmp_path: Path, kind: str) -> None:
    source = make_tiny_model(tmp_path / "source")
    quantisation = QUANTISATION[kind]
    folder = _converted(source, tmp_path, quantisation=quantisation)
    there, back = Weights(source), Weights(folder)
    for name, shape in there.config.tensor_shapes().items():
        exact = there[name].float().numpy()
        if len(shape) == 2:
            # Rows are quantised one by one, so their order (q and k) does not matter here.
            packed = gguf.quants.quantize(exact, quantisation)
            exact = gguf.quants.dequantize(packed, quantisation)
        assert torch.equal(back[name], torch.from_numpy(np.array(exact)).bfloat16()), name


def test_llama3_scaling_is_recognised_from_its_divisors(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    source = make_tiny_model(
        tmp_path / "source", rope_theta=5e5, rope_scaling=scaling, max_position_embeddings=16384
    )
    rope = load_config(source).rope
    plain = 5e5 ** -(np.arange(0, 16, 2, dtype=np.float32) / 16)
    scaled = np.arctan2(*(table[1].numpy() for table in reversed(rope_tables(rope, 16, 2))))
    divisors = (plain / scaled).astype(np.float32)
    folder = _converted(source, tmp_path, extra={"rope_freqs.weight": divisors})
    found = load_config(folder).rope
    assert found.kind == "llama3"
    for ours, theirs in zip(rope_tables(found, 16, 64), rope_tables(rope, 16, 64), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
    with pytest.raises(ModelError, match="rope_freqs"):
        _converted(source, tmp_path, extra={"rope_freqs.weight": divisors[::-1].copy()})


def test_yarn_and_linear_scaling_come_along(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "source", "Qwen2ForCausalLM")
    folder = _converted(
        source,
        tmp_path,
        qwen2__rope__scaling__type="yarn",
        qwen2__rope__scaling__factor=4.0,
        qwen2__rope__scaling__original_context_length=64,
    )
    rope = load_config(folder).rope
    assert (rope.kind, rope.factor, rope.original) == ("yarn", 4.0, 64)
    folder = _converted(
        source,
        tmp_path,
        qwen2__rope__scaling__type="linear",
        qwen2__rope__scaling__factor=2.0,
    )
    assert load_config(folder).rope.kind == "linear"


@pytest.mark.parametrize(
    ("metadata", "extra", "said"),
    [
        ({"general__architecture": "gemma3"}, {}, "gemma3"),
        ({"split__count": 3}, {}, "split"),
        ({"llama__block_count": 3}, {}, "blk.2.* is missing"),
        ({"llama__block_count": None}, {}, "block_count is missing"),
        ({"llama__feed_forward_length": 128}, {}, "the metadata says"),
        ({"llama__rope__dimension_count": 8}, {}, "part of each head"),
        ({"llama__attention__sliding_window": 64}, {}, "sliding_window"),
        (
            {"llama__rope__scaling__type": "longrope", "llama__rope__scaling__factor": 2.0},
            {},
            "longrope",
        ),
        ({"tokenizer__ggml__pre": "tekken"}, {}, "tekken"),
        ({"tokenizer__ggml__model": "t5"}, {}, "t5"),
        ({}, {"blk.0.ffn_gate_inp.weight": np.zeros((4, 64), np.float32)}, "ffn_gate_inp"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    tmp_path: Path, metadata: dict[str, Any], extra: dict[str, Any], said: str
) -> None:
    source = make_tiny_model(tmp_path / "source")
    with pytest.raises(ModelError, match=said):
        _converted(source, tmp_path, extra=extra, **metadata)


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama__attention__head_count": 0, "llama__attention__key_length": 0},
        {"llama__attention__head_count": "four", "llama__attention__key_length": 0},
        {"tokenizer__ggml__model": "llama", "tokenizer__ggml__unknown_token_id": 99_999},
        {"tokenizer__ggml__token_type": [1, 2]},
        {"tokenizer__ggml__merges": ["nospace"]},
        {"tokenizer__ggml__merges": ["zz yy"]},
    ],
)
def test_damaged_metadata_is_one_error(tmp_path: Path, metadata: dict[str, Any]) -> None:
    source = make_tiny_model(tmp_path / "source")
    with pytest.raises(ModelError, match=r"tiny\.gguf has damaged metadata"):
        _converted(source, tmp_path, **metadata)


@pytest.mark.parametrize("keep", [0, 3, 64, 5000, -1, -10_000])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    file = write_gguf(make_tiny_model(tmp_path / "source"), tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"tiny\.gguf is truncated or no GGUF file"):
        convert_gguf(file, tmp_path)


def test_sentencepiece_vocabularies(tmp_path: Path) -> None:
    """Llama 2's kind: merges from scores, bytes for what is not in the vocabulary, <s> in front."""
    pieces = ["▁", "a", "b", "l", "o", "h", "e", "▁h", "el", "lo", "▁hel", "▁hello", "ab"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    write_tokenizer(metadata, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("hello ab").tokens == ["<s>", "▁hello", "▁", "ab"]
    assert tokenizer.encode("é").tokens == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    for text in ("hello hello", "ab  ba", "naïve 🎉", " leading"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    metadata["tokenizer.ggml.add_bos_token"] = False
    write_tokenizer(metadata, tmp_path)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("ab").ids[0] != 1


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["ab", "Ġ1234", "'s", "ĠX"]),
        ("smollm", ["ab", "Ġ", "1", "2", "3", "4", "'s", "ĠX"]),
        ("llama-bpe", ["ab", "Ġ", "123", "4", "'s", "ĠX"]),
        ("qwen2", ["ab", "Ġ", "1", "2", "3", "4", "'s", "ĠX"]),
    ],
)
def test_text_is_cut_as_the_vocabulary_was_learned(pre: str, words: list[str]) -> None:
    cut = PRE_TOKENIZERS[pre]().pre_tokenize_str("ab 1234's X")
    assert [word for word, _ in cut] == words


def _converted(source: Path, root: Path, **options: Any) -> Path:
    folder = root / f"converted-{len(list(root.iterdir()))}"
    folder.mkdir()
    convert_gguf(write_gguf(source, root / "tiny.gguf", **options), folder)
    validate(folder)
    return folder


def _numbers(config: Any) -> dict[str, Any]:
    return {
        name: getattr(config, name)
        for name in config.__slots__
        if name not in ("norm_eps", "rope")  # float32 in the file
    }
