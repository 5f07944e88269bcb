"""`MixtureConfig`: the experts of a mixture-of-experts model, and what its tensors are called."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertNames:
    """Below `model.layers.N.`; `expert` ends with the place of the expert's number."""

    router: str
    expert: str
    gate: str
    up: str
    down: str


MIXTRAL_NAMES = ExpertNames(
    router="block_sparse_moe.gate",
    expert="block_sparse_moe.experts.{}.",
    gate="w1",
    up="w3",
    down="w2",
)
QWEN3_NAMES = ExpertNames(
    router="mlp.gate",
    expert="mlp.experts.{}.",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureConfig:
    """`experts` of which `chosen` work on each token, `intermediate` columns each.

    `renormalise`: the chosen ones' weights are scaled to sum 1. `layers`: which layers are mixtures
    (the others have an ordinary MLP).
    """

    experts: int
    chosen: int
    intermediate: int
    renormalise: bool
    layers: tuple[bool, ...]
    names: ExpertNames

    def tensor_shapes(self, hidden: int, layer: int) -> dict[str, tuple[int, ...]]:
        """The tensors of one mixture layer, by their Hugging Face names."""
        at, names = f"model.layers.{layer}.", self.names
        shapes: dict[str, tuple[int, ...]] = {f"{at}{names.router}.weight": (self.experts, hidden)}
        for expert in range(self.experts):
            each = at + names.expert.format(expert)
            shapes[f"{each}{names.gate}.weight"] = (self.intermediate, hidden)
            shapes[f"{each}{names.up}.weight"] = (self.intermediate, hidden)
            shapes[f"{each}{names.down}.weight"] = (hidden, self.intermediate)
        return shapes
