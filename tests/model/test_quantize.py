"""Checkpoints written by `quantize_model` and models judged by `evaluate`: the two commands."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kit.quantized_models import (
    CHANNEL,
    TEXT,
    checkpoint,
    compressed,
    matrices,
    program_of,
)
from kit.tiny_models import make_tiny_model

from fabric.core.errors import ConfigError, ModelError
from fabric.kernels.cpu.build import default_cache_folder
from fabric.kernels.program import Linear, Op
from fabric.kernels.quantized import (
    Activations,
    QuantizedWeight,
    dequantize,
    quantize_weight,
)
from fabric.kernels.quantized_linear import quantized_linear_reference
from fabric.kernels.quantized_program import SCHEMES
from fabric.kernels.torch_executor import TorchExecutor
from fabric.model.command import Surroundings, evaluation, quantize
from fabric.model.config import load_config
from fabric.model.evaluate import evaluate
from fabric.model.flags import SCHEME_NAMES, WISH_NAMES
from fabric.model.quantization import parse_quantization
from fabric.model.quantize import WISHES, Rounded, Wish, quantize_model
from fabric.model.rounding import round_by_error
from fabric.model.sensitivity import divergences, read_windows, widen


@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("narrow", [True, False])
def test_what_quantize_writes_is_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wish: str, tied: bool, narrow: bool
) -> None:
    """As the budget has it, and where the narrowest format may do as it likes."""
    candidates = WISHES[wish].candidates
    if narrow:
        endless = Wish(candidates=candidates, budget=1e9)
        monkeypatch.setattr("fabric.model.quantize.WISHES", {wish: endless})
    source = make_tiny_model(tmp_path / "source", tie_word_embeddings=tied)
    target = tmp_path / "target"
    rounded = quantize_model(source, target, wish, tokens=TEXT)
    names = {r.name for r in rounded}
    if narrow:
        assert names == {candidates[0].name}
    assert names <= {"bfloat16", *(c.name for c in candidates)}
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
    """The more they diverge for their size, the sooner; with nothing to spend none is rounded."""
    source = make_tiny_model(tmp_path / "source")
    candidates = WISHES["int8"].candidates

    def spending(budget: float, folder: str) -> list[Rounded]:
        wishes = {"int8": Wish(candidates=candidates, budget=budget)}
        monkeypatch.setattr("fabric.model.quantize.WISHES", wishes)
        return quantize_model(source, tmp_path / folder, "int8", tokens=TEXT)

    every = spending(1e9, "narrow")
    total = sum(one.divergence for one in every)
    assert all(0 < one.tried[1] < one.tried[0] for one in every)
    half = spending(total / 2, "half")
    widened = [one for one in half if one.name != "int8 x int8"]
    assert {one.name for one in widened} <= {"int8", "bfloat16"}
    assert 0 < len(widened) < len(half)
    assert max(every, key=lambda one: one.divergence).modules in [o.modules for o in widened]
    assert {one.name for one in spending(0, "plain")} == {"bfloat16"}
    assert load_config(tmp_path / "plain").quantization is None


def test_a_matrix_diverges_as_the_model_with_it_alone_does(tmp_path: Path) -> None:
    program = program_of(make_tiny_model(tmp_path / "model"), torch.float32)
    linears = [index for index, op in enumerate(program.ops) if isinstance(op, Linear)]
    ops = tuple(program.ops)
    weights = [quantize_weight(_weight(ops[index]), SCHEMES["int4"]) for index in linears]
    found = divergences(program, TEXT[:40], weights)
    assert len(found) == len(linears)
    for at in (0, 3, len(linears) - 1):
        other = list(ops)
        other[linears[at]] = replace(ops[linears[at]], weight_NK=weights[at])
        log, others = (
            read_windows(TorchExecutor(each), [TEXT[:40]]).log_softmax(dim=-1)
            for each in (program, replace(program, ops=tuple(other)))
        )
        alone = (log.exp() * (log - others)).sum(dim=1).mean().item()
        assert alone > 1e-6
        assert found[at] == pytest.approx(alone, rel=1e-2)


def test_what_saves_most_for_its_cost_is_widened_first() -> None:
    estimates = [[0.5, 0.1, 0.0], [0.3, 0.2, 0.0], [0.2, 0.0, 0.0]]
    costs = [[1, 1.2, 2], [1, 1.2, 2], [10, 12, 20]]
    assert widen(estimates, costs, 1.0) == [0, 0, 0]
    assert widen(estimates, costs, 0.61) == [1, 0, 0]
    assert widen(estimates, costs, 0.51) == [1, 1, 0]  # 0.5 a unit; all of it 0.3 a unit
    assert widen(estimates, costs, 0.0) == [2, 2, 1]


def _weight(op: Op) -> torch.Tensor:
    assert isinstance(op, Linear)
    assert isinstance(op.weight_NK, torch.Tensor)
    return op.weight_NK


@pytest.mark.parametrize("name", ["int4", "int8", "fp8"])
def test_gptq_errs_less_than_rounding_to_the_nearest(name: str) -> None:
    """On inputs that depend on each other, as activations do; judged on inputs it has not seen."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 96, generator=generator) / 8
    x, unseen = (torch.randn(n, 64, generator=generator) @ mixing for n in (1024, 200))
    weight = torch.randn(80, 96, generator=generator)
    scheme = replace(SCHEMES[name], activations=Activations.KEPT)  # the weight's error alone
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
    assert sorted(WISH_NAMES) == sorted(WISHES)
    assert sorted(SCHEME_NAMES) == sorted(SCHEMES)


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """quantize, then eval against the source, by their words."""
    source, target = make_tiny_model(tmp_path / "source"), tmp_path / "target"
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over lazy dogs and hello world " * 40)
    around = Surroundings(_encode, default_cache_folder().parent, lambda *_: None)
    words = [str(source), "--format", "int8", "--text", str(text), "-o", str(target)]
    assert quantize(words, around) == 0
    assert "model.layers.1.mlp.down_proj" in capsys.readouterr().out
    assert evaluation([str(target), "--against", str(source), "--text", str(text)], around) == 0
    shown = capsys.readouterr().out
    assert "same likeliest token" in shown
    assert "gate: 1 % for int8: met" in shown
    words = ["--against", str(source), "--format", "int4", "--text", str(text)]
    random = make_tiny_model(tmp_path / "random", hidden_size=96)  # another model: far away
    assert evaluation([str(random), *words], around) == 1
    assert "gate: 4 % for int4: MISSED" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="can't read"):
        evaluation([str(source), "--text", str(tmp_path / "none")], around)
    with pytest.raises(ModelError, match="already"):
        evaluation([str(target), "--format", "int8", "--text", str(text)], around)


def _encode(folder: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids)
