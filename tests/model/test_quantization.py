"""Quantised checkpoints: read strictly, written by `quantize_model`, judged by `evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.paged import PagedRun, Piece
from kit.tiny_models import make_tiny_model, write_weights
from safetensors.torch import load_file

from fabric.core.errors import ConfigError, ModelError
from fabric.kernels.executor import create_executor
from fabric.kernels.program import Linear, Program
from fabric.kernels.quantized import (
    Activations,
    QuantizedWeight,
    Scheme,
    WeightFormat,
    dequantize,
    quantize_weight,
)
from fabric.kernels.quantized_program import SCHEMES
from fabric.kernels.torch_executor import TorchExecutor
from fabric.model.command import Surroundings, evaluation, quantize
from fabric.model.config import load_config
from fabric.model.decoder import build_program, matrix_modules
from fabric.model.evaluate import evaluate
from fabric.model.flags import SCHEME_NAMES, WISHES
from fabric.model.quantization import parse_quantization
from fabric.model.quantize import CANDIDATES, Candidate, quantize_model
from fabric.model.quantized_checkpoint import parts_of
from fabric.model.weights import Weights, validate

TEXT = [(i * 7919 + i * i) % 300 + 3 for i in range(1024)]

CHANNEL = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}


def compressed(layout: str, weights: dict[str, Any], inputs: object = None) -> dict[str, Any]:
    """A quantization_config as llm-compressor writes it."""
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": inputs,
                "output_activations": None,
            }
        },
    }


def fp8(kind: str) -> dict[str, Any]:
    return CHANNEL | {"type": "float", "strategy": kind}


FORMATS: dict[str, tuple[dict[str, Any], Scheme]] = {
    "int8 by int8": (
        compressed("int-quantized", CHANNEL, TOKEN),
        Scheme(format=WeightFormat.INT8, activations=Activations.TOKEN),
    ),
    "int8": (
        compressed("pack-quantized", CHANNEL),
        Scheme(format=WeightFormat.INT8, activations=Activations.KEPT),
    ),
    "int4": (
        compressed(
            "pack-quantized", CHANNEL | {"num_bits": 4, "strategy": "group", "group_size": 32}
        ),
        Scheme(format=WeightFormat.INT4, activations=Activations.KEPT, columns=32),
    ),
    "fp8 by channel": (
        compressed("float-quantized", fp8("channel"), TOKEN | {"type": "float"}),
        Scheme(format=WeightFormat.FP8, activations=Activations.TOKEN),
    ),
    "fp8 in blocks": (
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
        Scheme(format=WeightFormat.FP8, activations=Activations.GROUP, rows=128, columns=128),
    ),
}


def checkpoint(folder: Path, name: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """A tiny model whose matrices but the head are stored in a format; its plain tensors too."""
    config, scheme = FORMATS[name]
    make_tiny_model(folder, tie_word_embeddings=False)
    plain = load_file(folder / "model.safetensors")
    stored = {}
    for key, tensor in plain.items():
        module = key.removesuffix(".weight")
        if tensor.dim() != 2 or module in ("lm_head", "model.embed_tokens"):
            stored[key] = tensor
            continue
        for part, value in parts_of(quantize_weight(tensor, scheme)).items():
            named = "weight_scale_inv" if config["quant_method"] == "fp8" else "weight_scale"
            stored[f"{module}.{named if part == 'weight_scale' else part}"] = value
    write_weights(folder, stored)
    declare(folder, config)
    return folder, plain


def declare(folder: Path, config: dict[str, Any]) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | {"quantization_config": config}))


def program_of(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Program:
    weights = Weights(folder)
    return build_program(weights.config, weights, dtype)


def matrices(program: Program) -> list[Linear]:
    return [op for op in program.ops if isinstance(op, Linear)]


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
    bound = {"int4": 0.5, "int8": 0.08, "int8 by int8": 0.12}.get(name, 0.25)
    assert 0 < (got - exact).norm() / exact.norm() < bound


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


@pytest.mark.parametrize("wish", CANDIDATES)
@pytest.mark.parametrize("tied", [True, False])
def test_what_quantize_writes_is_what_it_measured(tmp_path: Path, wish: str, tied: bool) -> None:
    source = make_tiny_model(tmp_path / "source", tie_word_embeddings=tied)
    target = tmp_path / "target"
    rounded = quantize_model(source, target, wish, tokens=TEXT)
    assert {r.name for r in rounded} <= {"bfloat16", *(c.name for c in CANDIDATES[wish])}
    assert load_config(target).tied_embeddings is (tied and rounded[-1].weight is None)
    for op, one in zip(matrices(program_of(target)), rounded, strict=True):
        if one.weight is None:
            assert isinstance(op.weight_NK, torch.Tensor)
        else:
            assert isinstance(op.weight_NK, QuantizedWeight)
            assert torch.equal(dequantize(op.weight_NK), dequantize(one.weight))
            assert op.weight_NK.activations is one.weight.activations
    assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_sensitive_matrices_stay_wider_by_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_tiny_model(tmp_path / "source")
    strict = {
        "int8": tuple(
            Candidate(name=c.name, scheme=c.scheme, tolerance=t)
            for c, t in zip(CANDIDATES["int8"], (0.0, 1.0), strict=True)
        )
    }
    monkeypatch.setattr("fabric.model.quantize.CANDIDATES", strict)
    rounded = quantize_model(source, tmp_path / "wider", "int8", tokens=TEXT)
    assert {r.name for r in rounded} == {"int8"}
    assert all(len(r.tried) == 2 and r.tried[1] < r.tried[0] for r in rounded)
    none = {
        "int8": tuple(Candidate(name="x", scheme=c.scheme, tolerance=0) for c in strict["int8"])
    }
    monkeypatch.setattr("fabric.model.quantize.CANDIDATES", none)
    rounded = quantize_model(source, tmp_path / "plain", "int8", tokens=TEXT)
    assert {r.name for r in rounded} == {"bfloat16"}
    assert load_config(tmp_path / "plain").quantization is None


def test_gptq_errs_less_than_rounding_to_the_nearest(tmp_path: Path) -> None:
    """On inputs that depend on each other, as activations do; judged on inputs it has not seen."""
    from fabric.kernels.quantized import quantized_linear_reference
    from fabric.model.rounding import round_by_error

    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 96, generator=generator) / 8
    x, unseen = (torch.randn(n, 64, generator=generator) @ mixing for n in (1024, 200))
    weight = torch.randn(80, 96, generator=generator)
    scheme = FORMATS["int4"][1]
    exact = unseen @ weight.T
    by_error = quantized_linear_reference(unseen, round_by_error(weight, x, scheme)) - exact
    nearest = quantized_linear_reference(unseen, quantize_weight(weight, scheme)) - exact
    assert by_error.norm() < 0.7 * nearest.norm()


def test_a_model_is_quantised_once_and_into_a_new_folder(tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path / "model", "int8")
    with pytest.raises(ModelError, match="already"):
        quantize_model(folder, tmp_path / "again", "int8", tokens=TEXT)
    source = make_tiny_model(tmp_path / "source")
    with pytest.raises(ModelError, match="exists"):
        quantize_model(source, source, "int8", tokens=TEXT)
    with pytest.raises(ValueError, match="512"):
        quantize_model(source, tmp_path / "short", "int8", tokens=TEXT[:100])


def test_evaluation_against_itself_and_against_a_rounded_one(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    base = TorchExecutor(program_of(folder, torch.float32))
    same = evaluate(base, TEXT[:300], base=base, window=200)
    assert (same.tokens, same.agreement) == (298, 1.0)
    assert same.divergence == pytest.approx(0, abs=1e-6)
    assert (
        same.perplexity == same.base_perplexity == evaluate(base, TEXT[:300], window=200).perplexity
    )
    rounded = checkpoint(tmp_path / "int4", "int4")[0]
    other = evaluate(
        TorchExecutor(program_of(rounded, torch.float32)), TEXT[:300], base=base, window=200
    )
    assert other.divergence is not None
    assert other.divergence > 1e-4
    with pytest.raises(ValueError, match="two tokens"):
        evaluate(base, [1], base=base)


def test_perplexity_is_that_of_transformers_loss(tmp_path: Path) -> None:
    """The mean negative log-probability, by a plain forward pass of the whole window."""
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model(tmp_path / "model", dtype=torch.float32)
    ids = torch.tensor([TEXT[:150]])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loss = model(ids, labels=ids).loss
    found = evaluate(TorchExecutor(program_of(folder, torch.float32)), TEXT[:150], window=150)
    assert found.perplexity == pytest.approx(loss.exp().item(), rel=1e-4)


def test_configs_without_quantised_weights_have_none() -> None:
    assert parse_quantization({}) is None
    assert parse_quantization({"quantization_config": None}) is None


def test_ignored_and_targeted_modules() -> None:
    config = compressed("int-quantized", CHANNEL) | {"ignore": ["re:.*down_proj", "lm_head"]}
    config["config_groups"]["group_0"]["targets"] = ["re:model.layers.0.*", "up_proj"]
    found = parse_quantization({"quantization_config": config})
    assert found is not None
    named = {
        "model.layers.0.mlp.down_proj": False,
        "model.layers.0.mlp.gate_proj": True,
        "model.layers.1.mlp.gate_proj": False,
        "model.layers.1.mlp.up_proj": True,
        "lm_head": False,
    }
    for module, quantised in named.items():
        assert (found.storage_of(module) is not None) is quantised, module


def test_flags_name_what_there_is() -> None:
    assert sorted(WISHES) == sorted(CANDIDATES)
    assert sorted(SCHEME_NAMES) == sorted(SCHEMES)


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """quantize, then eval against the source, by their words."""
    source, target = make_tiny_model(tmp_path / "source"), tmp_path / "target"
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over lazy dogs and hello world " * 40)
    around = Surroundings(_encode, tmp_path / "cache", lambda *_: None)
    words = [str(source), "--format", "int8", "--text", str(text), "-o", str(target)]
    assert quantize(words, around) == 0
    assert "model.layers.1.mlp.down_proj" in capsys.readouterr().out
    assert evaluation([str(target), "--against", str(source), "--text", str(text)], around) == 0
    shown = capsys.readouterr().out
    assert "same likeliest token" in shown
    with pytest.raises(ConfigError, match="can't read"):
        evaluation([str(source), "--text", str(tmp_path / "none")], around)
    with pytest.raises(ModelError, match="already"):
        evaluation([str(target), "--format", "int8", "--text", str(text)], around)


def _encode(folder: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids)
