"""`DecoderConfig`: what a Hugging Face config.json says, checked, with every default filled in.

Architectures are one table; what differs between them is data. A field that would change the
numbers and is not built yet is refused here, before anything is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from fabric.core.errors import ModelError
from fabric.model.moe import MIXTRAL_NAMES, QWEN3_NAMES, ExpertNames, MixtureConfig
from fabric.model.quantization import Quantization, Storage, parse_quantization
from fabric.model.rope import RopeConfig, parse_rope

LAYERS_MAX = 1024  # far above any model: a damaged config must not make us list tensors for ever


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A decoder-only transformer: pre-norm, rotary positions, grouped queries, SwiGLU.

    `windows` has one entry a layer: how many last positions a query sees, itself included (None:
    all). `mixture` is None where every layer has an ordinary MLP. `eos_token_ids` end a generation.
    `bos_token_id` is None where the model has none, as is
    `quantization` where no weight is quantised.
    """

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context_limit: int
    norm_eps: float
    rope: RopeConfig
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    mixture: MixtureConfig | None = None
    quantization: Quantization | None = None

    def is_mixture(self, layer: int) -> bool:
        """Does this layer have experts?"""
        return self.mixture is not None and self.mixture.layers[layer]

    def matrix_shape(self, module: str) -> tuple[int, int]:
        """Rows and columns of a projection of this share's model, or of the head."""
        rows, columns = self.tensor_shapes()[f"{module}.weight"]
        return rows, columns

    def storage_of(self, module: str) -> Storage | None:
        """How the matrix `module` (a name without ".weight") is quantised; None: it is not."""
        if self.quantization is None or module == "model.embed_tokens":
            return None
        return self.quantization.storage_of(module)

    def parameters(self) -> int:
        """How many numbers the weights are (a tied embedding counts once)."""
        return sum(prod(shape) for shape in self.tensor_shapes().values())

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that this config asks for, by its Hugging Face name."""
        hidden, intermediate, head_dim = self.hidden, self.intermediate, self.head_dim
        query, key_value = self.heads * head_dim, self.kv_heads * head_dim
        projections = {  # name: (rows, columns, has a bias)
            "self_attn.q_proj": (query, hidden, self.qkv_bias),
            "self_attn.k_proj": (key_value, hidden, self.qkv_bias),
            "self_attn.v_proj": (key_value, hidden, self.qkv_bias),
            "self_attn.o_proj": (hidden, query, self.output_bias),
            "mlp.gate_proj": (intermediate, hidden, self.mlp_bias),
            "mlp.up_proj": (intermediate, hidden, self.mlp_bias),
            "mlp.down_proj": (hidden, intermediate, self.mlp_bias),
        }
        norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
        if self.qk_norm:
            norms |= {"self_attn.q_norm": head_dim, "self_attn.k_norm": head_dim}
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab, hidden),
            "model.norm.weight": (hidden,),
        }
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocab, hidden)
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            if self.mixture is not None and self.is_mixture(layer):
                shapes |= self.mixture.tensor_shapes(hidden, layer)
            for name, (rows, columns, bias) in projections.items():
                if name.startswith("mlp.") and self.is_mixture(layer):
                    continue
                shapes[f"{at}{name}.weight"] = (rows, columns)
                if bias:
                    shapes[f"{at}{name}.bias"] = (rows,)
            for name, size in norms.items():
                shapes[f"{at}{name}.weight"] = (size,)
        return shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How one architecture differs. Defaults are those of its class in transformers.

    `attention_bias_key`: config.json decides on a bias of q, k, v and o (else `qkv_bias` does, and
    o has none). `windowed`: "never"; "all" (every layer, if sliding_window is set); "switched"
    (every layer, if use_sliding_window is on, too); "layers" (if use_sliding_window, those that
    layer_types or max_window_layers name). `experts`: the names of its experts' tensors.
    """

    model_type: str
    kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: hidden / heads
    qkv_bias: bool = False
    attention_bias_key: bool = False
    mlp_bias_key: bool = False
    qk_norm: bool = False
    windowed: str = "never"
    window: int | None = 4096
    experts: ExpertNames | None = None


ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        model_type="llama", attention_bias_key=True, mlp_bias_key=True
    ),
    "MistralForCausalLM": Architecture(model_type="mistral", kv_heads=8, windowed="all"),
    "Qwen2ForCausalLM": Architecture(
        model_type="qwen2", kv_heads=32, qkv_bias=True, windowed="layers"
    ),
    "Qwen3ForCausalLM": Architecture(
        model_type="qwen3",
        kv_heads=32,
        head_dim=128,
        attention_bias_key=True,
        qk_norm=True,
        windowed="layers",
    ),
    "MixtralForCausalLM": Architecture(
        model_type="mixtral", kv_heads=8, windowed="all", window=None, experts=MIXTRAL_NAMES
    ),
    "Qwen3MoeForCausalLM": Architecture(
        model_type="qwen3_moe",
        kv_heads=4,
        attention_bias_key=True,
        qk_norm=True,
        windowed="switched",
        experts=QWEN3_NAMES,
    ),
}


def load_config(folder: Path) -> DecoderConfig:
    """Read config.json and, if it is there, generation_config.json. Raises `ModelError`."""
    data = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    return parse_config(data, read_json(generation) if generation.is_file() else {})


def parse_config(
    data: Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> DecoderConfig:
    """Check plain data of a config.json (transformers 4 or 5 spelling). Raises `ModelError`.

    `generation`: the data of generation_config.json, whose end-of-sequence ids win.
    """
    name, architecture = _architecture(data)
    _refuse_unsupported(data)
    hidden = _size(data, "hidden_size")
    heads = _size(data, "num_attention_heads")
    layers = _size(data, "num_hidden_layers")
    if layers > LAYERS_MAX:
        raise ModelError(f"config.json: num_hidden_layers ({layers}) is above {LAYERS_MAX}")
    kv_heads = _optional_size(data, "num_key_value_heads", architecture.kv_heads) or heads
    head_dim = _optional_size(data, "head_dim", architecture.head_dim) or hidden // heads
    if heads % kv_heads:
        raise ModelError(
            f"config.json: num_attention_heads ({heads}) is not a multiple of "
            f"num_key_value_heads ({kv_heads})"
        )
    if head_dim < 2 or head_dim % 2:
        raise ModelError(f"config.json: head_dim ({head_dim}) must be even: positions turn pairs")
    rope = parse_rope(data, context=_size(data, "max_position_embeddings"))
    attention_bias = architecture.attention_bias_key and _flag(data, "attention_bias")
    config = DecoderConfig(
        architecture=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=_size(data, "intermediate_size"),
        vocab=_size(data, "vocab_size"),
        context_limit=rope.context_limit,
        norm_eps=_number(data, "rms_norm_eps", 1e-6),
        rope=rope,
        tied_embeddings=_flag(data, "tie_word_embeddings"),
        qkv_bias=architecture.qkv_bias or attention_bias,
        output_bias=attention_bias,
        mlp_bias=architecture.mlp_bias_key and _flag(data, "mlp_bias"),
        qk_norm=architecture.qk_norm,
        windows=_windows(data, architecture, layers),
        eos_token_ids=_token_ids("eos_token_id", generation or {}, data),
        bos_token_id=next(iter(_token_ids("bos_token_id", data)), None),
        mixture=_mixture(data, architecture, layers),
        quantization=parse_quantization(data),
    )
    _refuse_quantised_experts(config)
    return config


def _refuse_quantised_experts(config: DecoderConfig) -> None:
    if config.quantization is not None and config.mixture is not None:
        raise ModelError("config.json: quantised mixtures of experts are not supported yet")


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file. Raises `ModelError` naming it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"can't read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return data


def _architecture(data: Mapping[str, Any]) -> tuple[str, Architecture]:
    names = data.get("architectures")
    if isinstance(names, list) and names:
        name = names[0]
    else:
        name = next(
            (n for n, a in ARCHITECTURES.items() if a.model_type == data.get("model_type")),
            data.get("model_type"),
        )
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ModelError(
            f"config.json: architecture {name!r} is not supported; supported: "
            f"{', '.join(ARCHITECTURES)}"
        )
    return name, ARCHITECTURES[name]


def _refuse_unsupported(data: Mapping[str, Any]) -> None:
    activation = data.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(f"config.json: hidden_act {activation!r} is not supported; only silu is")
    if data.get("is_encoder_decoder"):
        raise ModelError("config.json: is_encoder_decoder is set; only decoders are supported")


def _windows(
    data: Mapping[str, Any], architecture: Architecture, layers: int
) -> tuple[int | None, ...]:
    """One attention window a layer, as the architecture's config class in transformers says."""
    types = data.get("layer_types")
    window = _optional_size(data, "sliding_window", architecture.window)
    if architecture.windowed == "never":
        return (None,) * layers
    if architecture.windowed != "layers":
        if architecture.windowed == "switched" and not _flag(data, "use_sliding_window"):
            window = None
        is_windowed = window is not None and data.get("sliding_window")
        if set(types or ()) - {"sliding_attention" if is_windowed else "full_attention"}:
            raise ModelError("config.json: layer_types is not supported for this architecture")
        return (window,) * layers
    if not _flag(data, "use_sliding_window") or window is None:
        if types and set(types) != {"full_attention"}:
            raise ModelError(
                "config.json: layer_types asks for sliding attention, but use_sliding_window is off"
            )
        return (None,) * layers
    if types is None:
        first = _optional_size(data, "max_window_layers", 28) or 0
        types = ["full_attention"] * min(first, layers) + ["sliding_attention"] * (layers - first)
    if len(types) != layers or set(types) - {"full_attention", "sliding_attention"}:
        raise ModelError(
            f"config.json: layer_types must name full_attention or sliding_attention for each of "
            f"the {layers} layers"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _mixture(
    data: Mapping[str, Any], architecture: Architecture, layers: int
) -> MixtureConfig | None:
    """The experts, as the architecture's config class in transformers says."""
    names = architecture.experts
    if names is None:
        return None
    mixtral = names is MIXTRAL_NAMES
    experts_key = "num_local_experts" if mixtral else "num_experts"
    if experts_key not in data:  # the classes take either spelling
        experts_key = "num_experts" if mixtral else "num_local_experts"
    experts = _optional_size(data, experts_key, 8 if mixtral else 128)
    chosen = _optional_size(data, "num_experts_per_tok", 2 if mixtral else 8)
    assert experts is not None and chosen is not None
    if chosen > experts:
        raise ModelError(f"config.json: {chosen} of {experts} experts can't be chosen")
    step = 1 if mixtral else _optional_size(data, "decoder_sparse_step", 1) or 1
    dense = () if mixtral else data.get("mlp_only_layers") or ()
    return MixtureConfig(
        experts=experts,
        chosen=chosen,
        intermediate=_size(data, "intermediate_size" if mixtral else "moe_intermediate_size"),
        renormalise=mixtral or _flag(data, "norm_topk_prob"),
        layers=tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers)),
        names=names,
    )


def _token_ids(key: str, *sources: Mapping[str, Any]) -> tuple[int, ...]:
    for source in sources:
        value = source.get(key)
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise ModelError(f"{key} must be a token id or a list of them, not {value!r}")
        return tuple(ids)
    return ()


def _size(data: Mapping[str, Any], key: str) -> int:
    value = _optional_size(data, key, None)
    if value is None:
        raise ModelError(f"config.json: {key} is missing")
    return value


def _optional_size(data: Mapping[str, Any], key: str, default: int | None) -> int | None:
    value = data.get(key, default)
    if value is None:
        return None
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or value < (key != "max_window_layers")
    ):
        raise ModelError(f"config.json: {key} must be a positive integer, not {value!r}")
    return value


def _number(data: Mapping[str, Any], key: str, default: float) -> float:
    value = data.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ModelError(f"config.json: {key} must be a positive number, not {value!r}")
    return float(value)


def _flag(data: Mapping[str, Any], key: str) -> bool:
    value = data.get(key)
    if value is not None and not isinstance(value, bool):
        raise ModelError(f"config.json: {key} must be true or false, not {value!r}")
    return bool(value)
