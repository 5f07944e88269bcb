"""Rotary position tables (Su et al. 2021, "RoFormer"), with every context scaling folded in.

Row p of the tables is what position p is rotated by, so the executors know nothing of scalings.
Shape legend: P positions, E head_dim, E2 = E / 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fabric.core.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """One model's rotary embedding. `kind` is a key of `SCALINGS`; unused fields are neutral.

    `context` is config.json's max_position_embeddings; `original` the length trained before the
    context was extended; `context_limit` the length that can be served.
    """

    kind: str
    theta: float
    context: int
    context_limit: int
    original: int
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


def rope_tables(rope: RopeConfig, head_dim: int, positions: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine, float32 [positions, head_dim / 2] each, scaled by the attention factor.

    Angles are float32 products of position and frequency, as transformers computes them: a model
    was trained with that rounding.
    """
    position_P = torch.arange(positions, dtype=torch.float32)
    frequency = SCALINGS[rope.kind](rope, head_dim)
    if rope.kind == "dynamic":
        frequency = frequency[:positions]
    angle_PE2 = position_P[:, None] * frequency
    return (
        (angle_PE2.cos() * rope.attention_factor).contiguous(),
        (angle_PE2.sin() * rope.attention_factor).contiguous(),
    )


def rope_frequencies(data: Mapping[str, Any], head_dim: int) -> Tensor:
    """Angle per position of each pair, float32 [head_dim / 2], for a config.json's rope fields
    (not for dynamic scaling, which has no single set)."""
    rope = parse_rope(data, context=1)
    return SCALINGS[rope.kind](rope, head_dim)


def _default(rope: RopeConfig, head_dim: int) -> Tensor:
    return 1.0 / _inverse_frequencies(rope.theta, head_dim)


def _linear(rope: RopeConfig, head_dim: int) -> Tensor:
    """Position interpolation (Chen et al. 2023): positions are divided by the factor."""
    return _default(rope, head_dim) / rope.factor


def _dynamic(rope: RopeConfig, head_dim: int) -> Tensor:
    """Dynamic NTK (bloc97 and emozilla 2023): the base grows with the length. [context_limit, E2].

    Row p takes the base for length max(p + 1, original): what transformers computes token by token.
    A prompt longer than the original context gives other numbers there when it is prefilled at
    once (all its rows then take the base of the last one), so only this reading lets chunked
    prefill, prefix hits and decode agree.
    """
    length_P = torch.arange(1, rope.context_limit + 1, dtype=torch.int64).clamp(min=rope.context)
    growth_P = (rope.factor * length_P / rope.context) - (rope.factor - 1)
    base_P = rope.theta * growth_P ** (head_dim / (head_dim - 2))
    return 1.0 / base_P[:, None] ** _exponents(head_dim)


def _llama3(rope: RopeConfig, head_dim: int) -> Tensor:
    """Llama 3.1's scaling (Grattafiori et al. 2024): divide low frequencies, keep high ones,
    a ramp between.
    """
    frequency = _default(rope, head_dim)
    wavelength = 2 * math.pi / frequency
    longest = rope.original / rope.low_freq_factor
    shortest = rope.original / rope.high_freq_factor
    smooth = (rope.original / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    ramp = (1 - smooth) * frequency / rope.factor + smooth * frequency
    scaled = torch.where(wavelength > longest, frequency / rope.factor, frequency)
    between = (wavelength >= shortest) & (wavelength <= longest)
    return torch.where(between, ramp, scaled)


def _yarn(rope: RopeConfig, head_dim: int) -> Tensor:
    """YaRN (Peng et al. 2023): interpolate slow dimensions, keep fast ones, a ramp between."""
    inverse = _inverse_frequencies(rope.theta, head_dim)
    low = _yarn_dimension(rope, rope.beta_fast, head_dim)
    high = _yarn_dimension(rope, rope.beta_slow, head_dim)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # no division by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    return (1 / (rope.factor * inverse)) * (1 - keep) + (1 / inverse) * keep


def _yarn_dimension(rope: RopeConfig, rotations: float, head_dim: int) -> float:
    """The dimension that turns `rotations` times over the original context."""
    turns = math.log(rope.original / (rotations * 2 * math.pi))
    return head_dim * turns / (2 * math.log(rope.theta))


def _exponents(head_dim: int) -> Tensor:
    return torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim


def _inverse_frequencies(theta: float, head_dim: int) -> Tensor:
    return torch.as_tensor(theta ** _exponents(head_dim))


# Angle per position of each pair, float32 [E2].
SCALINGS: Mapping[str, Callable[[RopeConfig, int], Tensor]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}

# Keys that config.json may hold for each kind: (must be there, may be there). Any other key could
# change the numbers, so it is refused.
_COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_ORIGINAL = "original_max_position_embeddings"
_KEYS: Mapping[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, {_ORIGINAL}),
    "dynamic": ({"factor"}, {_ORIGINAL}),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {_ORIGINAL}),
    "yarn": (
        {"factor"},
        {_ORIGINAL, "attention_factor", "beta_fast", "beta_slow"}
        | {"mscale", "mscale_all_dim", "truncate"},
    ),
}


def parse_rope(data: Mapping[str, Any], *, context: int) -> RopeConfig:
    """From a config.json: `rope_parameters` (transformers 5) or `rope_theta`, `rope_scaling` (4).

    Raises `ModelError` on an unknown scaling, an unknown key of it, or a value out of range.
    """
    given = data.get("rope_scaling") or data.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise ModelError(f"config.json: rope_scaling must be an object, not {given!r}")
    kind = str(given.get("rope_type", given.get("type", "default")))
    if kind not in SCALINGS:
        raise ModelError(
            f"config.json: rope scaling {kind!r} is not supported; supported: {', '.join(SCALINGS)}"
        )
    _check_keys(kind, given)
    partial = given.get("partial_rotary_factor", data.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ModelError(
            f"config.json: partial_rotary_factor {partial} is not supported; only 1 is"
        )
    top_level = data.get(_ORIGINAL) if kind in ("llama3", "yarn") else None
    original = int(_positive(_first(top_level, given.get(_ORIGINAL), context), _ORIGINAL))
    factor = _positive(_first(given.get("factor"), context / original), "factor")
    rope = RopeConfig(
        kind=kind,
        theta=_positive(_first(given.get("rope_theta"), data.get("rope_theta"), 1e4), "theta"),
        context=context,
        context_limit=_context_limit(kind, context, original, factor),
        original=original,
        factor=factor,
        low_freq_factor=_positive(given.get("low_freq_factor", 1.0), "low_freq_factor"),
        high_freq_factor=_positive(given.get("high_freq_factor", 4.0), "high_freq_factor"),
        attention_factor=_attention_factor(given, factor) if kind == "yarn" else 1.0,
        beta_fast=_positive(given.get("beta_fast") or 32.0, "beta_fast"),
        beta_slow=_positive(given.get("beta_slow") or 1.0, "beta_slow"),
        truncate=bool(given.get("truncate", True)),
    )
    if rope.high_freq_factor <= rope.low_freq_factor:
        raise ModelError("config.json: rope high_freq_factor must be above low_freq_factor")
    return rope


def _check_keys(kind: str, given: Mapping[str, Any]) -> None:
    required, optional = _KEYS[kind]
    if missing := sorted(required - given.keys()):
        raise ModelError(f"config.json: rope scaling {kind!r} lacks {', '.join(missing)}")
    if unknown := sorted(given.keys() - required - optional - _COMMON):
        raise ModelError(
            f"config.json: rope scaling {kind!r} has keys that are not supported: "
            f"{', '.join(unknown)}"
        )


def _context_limit(kind: str, context: int, original: int, factor: float) -> int:
    """Dynamic and yarn reach beyond max_position_embeddings; the others are within it."""
    if kind == "dynamic":
        return int(context * factor)
    if kind == "yarn":
        return max(context, int(original * factor))
    return context


def _attention_factor(given: Mapping[str, Any], factor: float) -> float:
    """How much yarn scales cosine and sine (its section 3.4: attention temperature)."""

    def temperature(scale: float, mscale: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0

    if given.get("attention_factor") is not None:
        return _positive(given["attention_factor"], "attention_factor")
    mscale, mscale_all_dim = given.get("mscale"), given.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return temperature(factor, mscale) / temperature(factor, mscale_all_dim)
    return temperature(factor)


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _positive(value: Any, key: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ModelError(f"config.json: rope {key} must be a positive number, not {value!r}")
    return float(value)
