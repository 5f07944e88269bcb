"""Weights are checked against the config from their headers alone, before anything starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.tiny_models import make_tiny_model, write_weights
from safetensors.torch import load_file, save_file

from fabric.core.errors import ModelError
from fabric.model.weights import Weights, read_header, validate

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "tiny")


def test_tensors_are_those_of_the_file(folder: Path) -> None:
    weights = Weights(folder)
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(weights[name], tensor), name


def test_shards_are_one_model(folder: Path, tmp_path: Path) -> None:
    sharded = Weights(make_tiny_model(tmp_path / "sharded", shards=3))
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(sharded[name], tensor), name


def test_mapped_weights_are_private(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    Weights(folder)["model.norm.weight"].fill_(0)
    assert (folder / "model.safetensors").read_bytes() == before


def _drop(weights: dict[str, torch.Tensor]) -> None:
    del weights[DOWN]


def _add(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.2.mlp.down_proj.weight"] = weights[DOWN].clone()


def _transpose(weights: dict[str, torch.Tensor]) -> None:
    weights[DOWN] = weights[DOWN].t().contiguous()


def _quantise(weights: dict[str, torch.Tensor]) -> None:
    weights[DOWN] = weights[DOWN].to(torch.int8)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_drop, f"{DOWN} is missing"),
        (_add, "layers.2.mlp.down_proj.weight has no place"),
        (_transpose, rf"{DOWN} is \[96, 64\], but the config says \[64, 96\]"),
        (_quantise, f"{DOWN} has dtype I8"),
    ],
)
def test_a_misfit_names_the_tensor_and_the_place(
    folder: Path, damage: Callable[[dict[str, torch.Tensor]], None], said: str
) -> None:
    weights = load_file(folder / "model.safetensors")
    damage(weights)
    write_weights(folder, weights)
    with pytest.raises(ModelError, match=said) as refused:
        validate(folder)
    assert str(folder) in str(refused.value)


def test_what_old_checkpoints_carry_is_left_alone(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    write_weights(folder, weights)
    validate(folder)


def test_a_tied_model_may_carry_its_head(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    write_weights(folder, weights)
    validate(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -1000])
def test_a_truncated_file_is_named(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors.* (is truncated|has a damaged)"):
        validate(folder)


def test_a_file_with_a_tail_is_refused(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ModelError, match="too long"):
        validate(folder)


@settings(max_examples=150)
@given(st.data())
def test_a_damaged_header_is_an_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever bytes the header holds: `ModelError`, or tensors that lie inside of the file."""
    file = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    save_file({"a": torch.zeros(4, 2), "b": torch.zeros(3, dtype=torch.bfloat16)}, file)
    content = bytearray(file.read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        places = read_header(file)
    except ModelError:
        return
    for place in places.values():
        assert 8 <= place.begin <= place.end <= len(content)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({}, "no weight_map"),
        ({"weight_map": {"a": "gone.safetensors"}}, "missing"),
        ({"weight_map": {"a": "../model.safetensors"}}, "no safetensors file beside it"),
        ({"weight_map": {"a": "model.bin"}}, "no safetensors file beside it"),
        ({"weight_map": {"a": "model.safetensors"}}, "promises tensor a"),
    ],
)
def test_a_wrong_index_is_named(folder: Path, index: dict[str, object], said: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=said):
        validate(folder)


def test_several_files_need_an_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    validate(folder)  # a single file may have any name
    (folder / "two.safetensors").write_bytes((folder / "one.safetensors").read_bytes())
    with pytest.raises(ModelError, match="index"):
        validate(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_with_the_reason(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"\x80\x02")
    with pytest.raises(ModelError, match=f"{name} is a pickle: reading it can run any code"):
        validate(folder)


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no safetensors weights"):
        validate(folder)
