"""`Quantization`: what config.json says about quantised weights, and the tensors that follow.

Three methods are read: `compressed-tensors` (fp8, int8 with int8 activations, packed int8 and int4
that leave activations as they are; int4 with zero points too), `fp8` (per tensor, or in blocks of
128 x 128), and our own `fabric`: what compressed-tensors says, and int4 groups with a minimum that
is no multiple of the scale, `weight_minimum`. What is not supported is refused here, by name. A
scheme for the KV cache is not used: keys and values stay in the model's dtype.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fabric.core.errors import ModelError
from fabric.kernels.quantized import Activations, Scheme, WeightFormat

OWN_METHOD = "fabric"
PACKED_BITS = 32
_FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """How one matrix lies in the files. `by_tensor`: one scale for all of it. `packed`: several
    values an int32. `zero_points`: packed levels that stand for zero, instead of minimums.
    `scale_name`: what stands behind the matrix's name."""

    scheme: Scheme
    packed: bool = False
    by_tensor: bool = False
    zero_points: bool = False
    scale_name: str = "weight_scale"

    def parts(self, shape: tuple[int, int]) -> dict[str, tuple[set[tuple[int, ...]], set[str]]]:
        """For each tensor behind the matrix's name: allowed shapes, allowed dtypes."""
        rows, columns = shape
        static = self.scheme.activations is Activations.STATIC
        blocks = (-(-rows // self.scheme.rows), -(-columns // (self.scheme.columns or columns)))
        one: set[tuple[int, ...]] = {(), (1,)}
        found: dict[str, tuple[set[tuple[int, ...]], set[str]]] = {
            self.scale_name: (one if self.by_tensor else {blocks}, set(_FLOATS))
        }
        if self.packed:
            words = -(-columns * self.bits // PACKED_BITS)
            found["weight_packed"] = ({(rows, words)}, {"I32"})
            found["weight_shape"] = ({(2,)}, {"I64", "I32"})
        else:
            kind = "F8_E4M3" if self.scheme.format is WeightFormat.FP8 else "I8"
            found["weight"] = ({shape}, {kind})
        if self.zero_points:
            words = -(-rows * self.bits // PACKED_BITS)
            found["weight_zero_point"] = ({(words, blocks[1])}, {"I32"})
        elif self.scheme.minimum:
            found["weight_minimum"] = ({blocks}, set(_FLOATS))
        if static:
            found["input_scale"] = (one, set(_FLOATS))
        return found

    @property
    def bits(self) -> int:
        """Of one value."""
        return 4 if self.scheme.format is WeightFormat.INT4 else 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """Which matrices are quantised, and how: the first group that names one decides.

    A name in `targets` or `ignored` is a module's, "Linear" (all of them) or "re:" and a pattern.
    """

    groups: tuple[tuple[tuple[str, ...], Storage], ...]
    ignored: tuple[str, ...]

    def storage_of(self, module: str) -> Storage | None:
        """For "model.layers.0.mlp.up_proj" and the like; None: it is not quantised."""
        if any(_names(pattern, module) for pattern in self.ignored):
            return None
        for targets, storage in self.groups:
            if any(pattern == "Linear" or _names(pattern, module) for pattern in targets):
                return storage
        return None


def parse_quantization(data: Mapping[str, Any]) -> Quantization | None:
    """The quantization_config of a config.json, None without one. Raises `ModelError`."""
    given = data.get("quantization_config")
    if not given:
        return None
    if not isinstance(given, Mapping):
        raise ModelError(f"config.json: quantization_config must be an object, not {given!r}")
    method = given.get("quant_method")
    if method in ("compressed-tensors", OWN_METHOD):
        return _compressed_tensors(given)
    if method == "fp8":
        return _fp8(given)
    raise ModelError(
        f"config.json: the weights are quantised by {method!r}; supported are compressed-tensors "
        "and fp8, beside bfloat16, float16 and float32 safetensors and GGUF files"
    )


def _compressed_tensors(given: Mapping[str, Any]) -> Quantization:
    if given.get("quantization_status", "compressed") != "compressed":
        raise _refused(f"quantization_status {given['quantization_status']!r}")
    for key in ("sparsity_config", "transform_config"):
        if given.get(key) and given[key].get("format") != "dense":
            raise _refused(key)
    groups = given.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _refused("an empty config_groups")
    return Quantization(
        groups=tuple(
            (_strings(group, "targets"), _storage(group, group.get("format") or given["format"]))
            for group in groups.values()
            if isinstance(group, Mapping)
        ),
        ignored=_strings(given, "ignore"),
    )


def _storage(group: Mapping[str, Any], layout: str) -> Storage:
    weights, inputs = group.get("weights"), group.get("input_activations")
    if group.get("output_activations"):
        raise _refused("output_activations")
    if not isinstance(weights, Mapping):
        raise _refused("a group without weights")
    kind, bits = str(weights.get("type", "int")), weights.get("num_bits", 8)
    found = {("float", 8): WeightFormat.FP8, ("int", 8): WeightFormat.INT8}
    found[("int", 4)] = WeightFormat.INT4
    weight_format = found.get((kind, bits))
    if weight_format is None:
        raise _refused(f"weights of {bits}-bit {kind}")
    minimum = weights.get("minimum", False) is True
    zero_points = not weights.get("symmetric", True) and not minimum
    if (minimum or zero_points) and weight_format is not WeightFormat.INT4:
        raise _refused(f"asymmetric weights of {weight_format}")
    layouts = {"float-quantized", "int-quantized", "naive-quantized", "pack-quantized"}
    packed = layout == "pack-quantized"
    if layout not in layouts or (packed and weight_format is WeightFormat.FP8):
        raise _refused(f"{weight_format} in the format {layout!r}")
    if weight_format is WeightFormat.INT4 and not packed:
        raise _refused(f"int4 in the format {layout!r}")
    strategy = weights.get("strategy") or "tensor"
    rows, columns = 1, None
    if strategy == "group":
        columns = weights.get("group_size")
        if not isinstance(columns, int) or columns < 32 or columns % 32:
            raise _refused(f"groups of {columns}")
    elif strategy == "block":
        rows, columns = _block(weights.get("block_structure"))
    elif strategy not in ("tensor", "channel"):
        raise _refused(f"the strategy {strategy!r} for weights")
    scheme = Scheme(
        format=weight_format,
        activations=_activations(inputs, kind, columns),
        rows=rows,
        columns=columns,
        minimum=minimum or zero_points,
    )
    by_tensor = strategy == "tensor"
    if zero_points and by_tensor:
        raise _refused("one zero point for all of a matrix")
    return Storage(scheme=scheme, packed=packed, by_tensor=by_tensor, zero_points=zero_points)


def _activations(inputs: object, kind: str, columns: int | None) -> Activations:
    if not inputs:
        return Activations.KEPT
    assert isinstance(inputs, Mapping)
    if (inputs.get("type", "int"), inputs.get("num_bits", 8)) != (kind, 8):
        raise _refused(f"activations of {inputs.get('num_bits')}-bit {inputs.get('type')}")
    if not inputs.get("symmetric", True):
        raise _refused("asymmetric activations")
    strategy, dynamic = inputs.get("strategy"), bool(inputs.get("dynamic"))
    if strategy == "tensor" and not dynamic:
        return Activations.STATIC
    if strategy == "group" and dynamic and columns and inputs.get("group_size") == columns:
        return Activations.GROUP
    if strategy in ("token", "tensor") and dynamic:
        # A scale for a whole batch would make a request's tokens depend on its neighbours.
        return Activations.TOKEN
    raise _refused(f"activations by {strategy}, {'dynamic' if dynamic else 'static'}")


def _fp8(given: Mapping[str, Any]) -> Quantization:
    if given.get("fmt", "e4m3") != "e4m3":
        raise _refused(f"the number format {given['fmt']!r}")
    activation = given.get("activation_scheme", "dynamic")
    if activation not in ("dynamic", "static"):
        raise _refused(f"the activation_scheme {activation!r}")
    ignored = (*_strings(given, "modules_to_not_convert"), *_strings(given, "ignored_layers"))
    if given.get("weight_block_size"):
        if activation == "static":
            raise _refused("static activations beside blocks")
        rows, columns = _block(given["weight_block_size"])
        scheme = Scheme(
            format=WeightFormat.FP8, activations=Activations.GROUP, rows=rows, columns=columns
        )
        storage = Storage(scheme=scheme, scale_name="weight_scale_inv")
    else:
        kind = Activations.STATIC if activation == "static" else Activations.TOKEN
        storage = Storage(scheme=Scheme(format=WeightFormat.FP8, activations=kind), by_tensor=True)
    return Quantization(groups=((("Linear",), storage),), ignored=(*ignored, "lm_head"))


def _block(value: object) -> tuple[int, int]:
    if not isinstance(value, list) or value != [128, 128]:
        raise _refused(f"blocks of {value}; only 128 x 128 are")
    return 128, 128


def _names(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return pattern == module or module.endswith(f".{pattern}")


def _strings(data: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = data.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ModelError(f"config.json: quantization_config.{key} must be a list of names")
    return tuple(value)


def _refused(what: str) -> ModelError:
    return ModelError(f"config.json: quantization_config: {what}: not supported")
