"""Tiny models whose matrices are stored in a number format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from kit.tiny_models import make_tiny_model, write_weights
from safetensors.torch import load_file

from fabric.kernels.program import Linear, Program
from fabric.kernels.quantized import (
    Activations,
    Scheme,
    WeightFormat,
    quantize_weight,
)
from fabric.kernels.quantized_program import SCHEMES
from fabric.model.decoder import build_program
from fabric.model.quantized_checkpoint import parts_of
from fabric.model.weights import Weights

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
    "int4 in 64s": (
        compressed(
            "pack-quantized", CHANNEL | {"num_bits": 4, "strategy": "group", "group_size": 64}
        ),
        Scheme(format=WeightFormat.INT4, activations=Activations.KEPT, columns=64),
    ),
    "int4 with minimums": (
        compressed(
            "pack-quantized",
            CHANNEL
            | {"num_bits": 4, "strategy": "group", "group_size": 32}
            | {"symmetric": False, "minimum": True},
            TOKEN | {"strategy": "group", "group_size": 32},
        )
        | {"quant_method": "fabric"},
        SCHEMES["int4"],
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


def checkpoint(folder: Path, name: str, **overrides: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """A tiny model whose matrices but the head are stored in a format; its plain tensors too.
    `overrides` are fields of config.json."""
    config, scheme = FORMATS[name]
    make_tiny_model(folder, tie_word_embeddings=False, **overrides)
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
