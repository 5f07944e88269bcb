"""Writing quantised weights as compressed-tensors lays them out (read by vLLM and by us).

int4 weights have minimums, which compressed-tensors does not know: a folder that holds some says
that it is by the method `fabric`, so that nobody reads it without them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fabric.kernels.quantized import Activations, QuantizedWeight, WeightFormat
from fabric.model.config import read_json
from fabric.model.quantization import OWN_METHOD
from fabric.model.weights import Weights

SHARD_BYTES = 2 << 30

Stacked = tuple[tuple[str, ...], QuantizedWeight]  # modules of one input, and their rows


def write_checkpoint(folder: Path, weights: Weights, matrices: Sequence[Stacked]) -> None:
    """Weights in shards of 2 GB, and `folder`/config.json (already there) completed."""
    quantized = {module for modules, _ in matrices for module in modules}
    _write_shards(folder, _tensors(weights, matrices, quantized))
    data = read_json(folder / "config.json")
    if "lm_head" in quantized:
        data["tie_word_embeddings"] = False
    if quantized:
        data["quantization_config"] = _config(weights, matrices, quantized)
    (folder / "config.json").write_text(json.dumps(data, indent=2) + "\n")


def _tensors(
    weights: Weights, matrices: Sequence[Stacked], quantized: set[str]
) -> Iterator[tuple[str, Tensor]]:
    shapes = weights.config.tensor_shapes()
    for name in shapes:
        if name.removesuffix(".weight") not in quantized:
            yield name, weights[name].to(torch.bfloat16)
    for modules, stacked in matrices:
        first = 0
        for module in modules:
            rows = _rows(weights, module)
            for suffix, tensor in parts_of(stacked.rows(first, first + rows)).items():
                yield f"{module}.{suffix}", tensor
            first += rows


def parts_of(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors that stand behind the name of its module."""
    # Scales keep their dtype, so that a checkpoint read back is the very one that was measured.
    parts = {"weight_scale": weight.scales_AC}
    if weight.minimums_AC is not None:
        parts["weight_minimum"] = weight.minimums_AC
    if not _packed(weight):
        return parts | {"weight": weight.values}
    values = weight.values
    if weight.format is WeightFormat.INT8:
        values = values.view(torch.uint8) ^ 0x80
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % 4))
    parts["weight_packed"] = padded.contiguous().view(torch.int32)
    parts["weight_shape"] = torch.tensor(weight.shape)
    return parts


def _packed(weight: QuantizedWeight) -> bool:
    kept = weight.activations is Activations.KEPT
    return weight.format is WeightFormat.INT4 or (kept and weight.format is WeightFormat.INT8)


def _rows(weights: Weights, module: str) -> int:
    shapes = weights.config.tensor_shapes()
    tied = module == "lm_head" and weights.config.tied_embeddings
    return shapes["model.embed_tokens.weight" if tied else f"{module}.weight"][0]


def _write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    shards: list[Path] = []
    places: dict[str, int] = {}
    held: dict[str, Tensor] = {}

    def flush() -> None:
        if held:
            shards.append(folder / f"shard-{len(shards)}.safetensors")
            save_file(held, shards[-1], metadata={"format": "pt"})
            held.clear()

    total = 0
    for name, tensor in tensors:
        if sum(t.nbytes for t in held.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        held[name] = tensor.contiguous()
        places[name] = len(shards)
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        shards[0].rename(folder / "model.safetensors")
        return
    names = [
        f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" for index in range(len(shards))
    ]
    for shard, name in zip(shards, names, strict=True):
        shard.rename(folder / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: names[shard] for name, shard in places.items()},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _config(weights: Weights, matrices: Sequence[Stacked], quantized: set[str]) -> dict[str, Any]:
    groups: dict[str, tuple[QuantizedWeight, list[str]]] = {}
    for modules, weight in matrices:
        key = f"{weight.format} {weight.activations}"
        groups.setdefault(key, (weight, []))[1].extend(modules)
    described = {
        f"group_{index}": _group(weight, sorted(modules))
        for index, (weight, modules) in enumerate(groups.values())
    }
    own = any(weight.minimums_AC is not None for _, weight in matrices)
    layouts = {group["format"] for group in described.values()}
    linear = {
        name.removesuffix(".weight")
        for name, shape in weights.config.tensor_shapes().items()
        if len(shape) == 2 and name != "model.embed_tokens.weight"
    }
    return {
        "quant_method": OWN_METHOD if own else "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": described,
        "ignore": sorted((linear | {"lm_head"}) - quantized),
        "kv_cache_scheme": None,
    }


def _group(weight: QuantizedWeight, modules: list[str]) -> dict[str, Any]:
    fp8 = weight.format is WeightFormat.FP8
    kind: dict[str, Any] = {"type": "float" if fp8 else "int", "symmetric": True}
    grouped = weight.format is WeightFormat.INT4
    inputs = None
    if weight.activations is Activations.GROUP:
        inputs = {**kind, "num_bits": 8, "strategy": "group", "dynamic": True}
        inputs["group_size"] = weight.block[1]
    elif weight.activations is not Activations.KEPT:
        inputs = {**kind, "num_bits": 8, "strategy": "token", "dynamic": True}
    minimum = {"symmetric": False, "minimum": True} if weight.minimums_AC is not None else {}
    return {
        "targets": modules,
        "weights": {
            **kind,
            **minimum,
            "num_bits": 4 if grouped else 8,
            "strategy": "group" if grouped else "channel",
            "group_size": weight.block[1] if grouped else None,
            "dynamic": False,
        },
        "input_activations": inputs,
        "output_activations": None,
        "format": (
            "float-quantized" if fp8 else "pack-quantized" if _packed(weight) else "int-quantized"
        ),
    }
