"""Quantised checkpoints: read strictly, run near what they were rounded from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kit.paged import PagedRun, Piece
from kit.quantized_models import (
    CHANNEL,
    FORMATS,
    TEXT,
    TOKEN,
    checkpoint,
    compressed,
    declare,
    matrices,
    program_of,
)
from kit.tiny_models import make_tiny_model, write_weights
from safetensors.torch import load_file

from fabric.core.errors import ModelError
from fabric.kernels.executor import create_executor
from fabric.kernels.quantized import (
    Activations,
    QuantizedWeight,
    dequantize,
    quantize_weight,
)
from fabric.model.config import load_config
from fabric.model.decoder import matrix_modules
from fabric.model.quantization import parse_quantization
from fabric.model.quantized_weights import read_quantized
from fabric.model.weights import DTYPES, validate


@pytest.mark.parametrize("name", FORMATS)
def test_a_stored_matrix_is_read_as_it_was_rounded(tmp_path: Path, name: str) -> None:
    folder, plain = checkpoint(tmp_path / "model", name)
    program, scheme = program_of(folder), FORMATS[name][1]
    for op, modules in zip(matrices(program), matrix_modules(load_config(folder)), strict=True):
        whole = torch.cat([plain[f"{module}.weight"] for module in modules])
        if modules == ["lm_head"]:
            assert isinstance(op.weight_NK, torch.Tensor)
            assert torch.equal(op.weight_NK, whole)
            continue
        assert isinstance(op.weight_NK, QuantizedWeight)
        assert op.weight_NK.activations is scheme.activations
        parts = [quantize_weight(plain[f"{module}.weight"], scheme) for module in modules]
        assert torch.equal(dequantize(op.weight_NK), torch.cat([dequantize(p) for p in parts]))


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_folder_runs_near_its_plain_one(tmp_path: Path, name: str) -> None:
    """Through the executor that serves. Weights of a tiny random model are noise: the formats err
    by about 1 % (int8), 4 % (fp8), 9 % (int4) a product."""
    folder, plain = checkpoint(tmp_path / "quantised", name)
    other = make_tiny_model(tmp_path / "plain", tie_word_embeddings=False)
    write_weights(other, plain)
    piece = Piece(row=0, first=0, tokens=TEXT[:50])
    (exact,) = PagedRun(create_executor(program_of(other), device="cpu", threads=1)).step(piece)
    (got,) = PagedRun(create_executor(program_of(folder), device="cpu", threads=1)).step(piece)
    bound = {"int8": 0.08, "int8 by int8": 0.12}.get(name, 0.5 if name.startswith("int4") else 0.25)
    assert 0 < (got - exact).norm() / exact.norm() < bound


@pytest.mark.parametrize("rows", [8, 12])
def test_zero_points_are_read_as_compressed_tensors_packs_them(rows: int) -> None:
    """Eight of them, 8 added, down a column in an int32; the lowest four bits are the first."""
    generator = torch.Generator().manual_seed(rows)
    values = torch.randint(-8, 8, (rows, 64), generator=generator)
    zeros = torch.randint(-8, 8, (rows, 2), generator=generator)
    scale = torch.rand(rows, 2, generator=generator) + 0.5

    def packed(numbers: torch.Tensor) -> torch.Tensor:
        words = torch.zeros(len(numbers), -(-numbers.shape[1] // 8), dtype=torch.int64)
        for column in range(numbers.shape[1]):
            words[:, column // 8] |= (numbers[:, column] + 8) << 4 * (column % 8)
        return words.to(torch.int32)

    stored = {
        "m.weight_packed": packed(values),
        "m.weight_shape": torch.tensor([rows, 64]),
        "m.weight_scale": scale,
        "m.weight_zero_point": packed(zeros.T).T.contiguous(),
    }
    weights = CHANNEL | {"num_bits": 4, "strategy": "group", "group_size": 32}
    config = compressed("pack-quantized", weights | {"symmetric": False})
    quantization = parse_quantization({"quantization_config": config})
    assert quantization is not None
    storage = quantization.storage_of("m")
    assert storage is not None
    for name, (shapes, dtypes) in storage.parts((rows, 64)).items():
        assert tuple(stored[f"m.{name}"].shape) in shapes
        assert stored[f"m.{name}"].dtype in {DTYPES[kind] for kind in dtypes}
    weight = read_quantized(stored.__getitem__, "m", (rows, 64), storage)
    assert weight.activations is Activations.KEPT
    wide = values.view(rows, 2, 32) - zeros[..., None]
    # Levels * scale and minimum are rounded apart: 2^-24 of numbers below 15 * 1.5.
    expected = (wide * scale[..., None]).flatten(1)
    assert (dequantize(weight) - expected).abs().max() <= 22.5 * 2.0**-23


def test_scales_for_a_whole_tensor_and_static_inputs(tmp_path: Path) -> None:
    """The fp8 format without blocks. Stacked projections take the largest input scale."""
    folder = make_tiny_model(tmp_path / "model", tie_word_embeddings=False)
    plain, stored = load_file(folder / "model.safetensors"), {}
    scales = {"q_proj": 0.02, "k_proj": 0.03, "v_proj": 0.01}
    for key, tensor in plain.items():
        module = key.removesuffix(".weight")
        if tensor.dim() != 2 or module in ("lm_head", "model.embed_tokens"):
            stored[key] = tensor
            continue
        scale = tensor.float().abs().max() / 448
        stored[key] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        stored[f"{module}.weight_scale"] = scale
        stored[f"{module}.input_scale"] = torch.tensor(scales.get(module.split(".")[-1], 0.05))
    write_weights(folder, stored)
    declare(folder, {"quant_method": "fp8", "activation_scheme": "static"})
    first = matrices(program_of(folder))[0].weight_NK
    assert isinstance(first, QuantizedWeight)
    assert first.input_scale == pytest.approx(0.03)
    key = "model.layers.0.self_attn.k_proj"
    rows = first.rows(64, 96)
    assert torch.equal(
        dequantize(rows), stored[f"{key}.weight"].float() * stored[f"{key}.weight_scale"]
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "gptq"}, "gptq"),
        ("awq", "awq"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "blocks"),
        ({"quant_method": "fp8", "activation_scheme": "odd"}, "odd"),
        (compressed("int-quantized", CHANNEL | {"symmetric": False}), "asymmetric"),
        (compressed("int-quantized", CHANNEL | {"num_bits": 3}), "3-bit"),
        (compressed("marlin-24", CHANNEL), "marlin-24"),
        (compressed("int-quantized", CHANNEL | {"num_bits": 4}), "int4"),
        (compressed("pack-quantized", CHANNEL | {"strategy": "group", "group_size": 16}), "16"),
        (compressed("int-quantized", CHANNEL, TOKEN | {"num_bits": 4}), "4-bit"),
        (compressed("int-quantized", CHANNEL, TOKEN | {"symmetric": False}), "asymmetric"),
        (compressed("int-quantized", CHANNEL) | {"config_groups": {}}, "config_groups"),
        (compressed("int-quantized", CHANNEL) | {"quantization_status": "frozen"}, "frozen"),
        (compressed("int-quantized", CHANNEL) | {"ignore": "lm_head"}, "ignore"),
        (compressed("int-quantized", CHANNEL) | {"transform_config": {"a": 1}}, "transform"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config: object, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        parse_quantization({"quantization_config": config})


def test_a_missing_or_wrong_part_is_named(tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path / "model", "int4")
    stored = load_file(folder / "model.safetensors")
    key = "model.layers.1.mlp.up_proj"
    scale = stored.pop(f"{key}.weight_scale")
    write_weights(folder, stored)
    with pytest.raises(ModelError, match=rf"{key}\.weight_scale is missing"):
        validate(folder)
    write_weights(folder, stored | {f"{key}.weight_scale": scale[:, :1].contiguous()})
    with pytest.raises(ModelError, match=rf"{key}\.weight_scale is \[96, 1\]"):
        validate(folder)
    write_weights(folder, stored | {f"{key}.weight_scale": scale.to(torch.int32)})
    with pytest.raises(ModelError, match="has dtype I32"):
        validate(folder)
    write_weights(folder, stored | {f"{key}.weight_scale": scale * torch.nan})
    with pytest.raises(ModelError, match="not a number"):
        tuple(program_of(folder).ops)  # a walk reads the weights
