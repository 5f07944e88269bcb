"""What each worker holds: everything once, as evenly as it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit.tiny_models import make_tiny_model, random_weights

from fabric.core.errors import ModelError
from fabric.core.shard import Place, ShardSpec
from fabric.kernels.program import tensors_of
from fabric.model.config import DecoderConfig, parse_config
from fabric.model.decoder import Member, build_program
from fabric.model.parallel import Share, share_of
from fabric.model.weights import Weights

SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
MIXTRAL = SMOLLM2 | {
    "architectures": ["MixtralForCausalLM"],
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_local_experts": 7,
}


def shares(data: dict[str, Any], spec: ShardSpec) -> list[Share]:
    config = parse_config(data)
    return [share_of(config, Place.of(spec, worker)) for worker in range(spec.workers)]


def test_two_workers_of_smollm2() -> None:
    first, second = shares(SMOLLM2, ShardSpec(tp=2))
    assert (first.kv_heads, second.kv_heads) == (range(2), range(2, 3))
    assert (first.heads, second.heads) == (range(6), range(6, 9))
    assert (first.mlp_columns, second.mlp_columns) == (range(768), range(768, 1536))
    assert first.vocab_runs == (range(24576), range(24576, 49152))
    assert "KV heads 0 to 1" in first.describe()


def test_kv_heads_are_replicated_where_there_are_too_few() -> None:
    kv_heads = [share.kv_heads for share in shares(SMOLLM2, ShardSpec(tp=5))]
    assert kv_heads == [range(1), range(1), range(1, 2), range(1, 2), range(2, 3)]
    heads = [share.heads for share in shares(SMOLLM2, ShardSpec(tp=5))]
    assert heads == [range(2), range(2, 3), range(3, 5), range(5, 6), range(6, 9)]


def test_the_head_counts_for_the_last_stage() -> None:
    """It is as large as eight layers."""
    layers = [len(share.layers) for share in shares(SMOLLM2, ShardSpec(pp=2))]
    assert layers == [19, 11]
    assert sum(len(share.layers) for share in shares(SMOLLM2, ShardSpec(pp=3))) == 30


def test_experts_over_ep_and_their_columns_over_tp() -> None:
    found = shares(MIXTRAL, ShardSpec(tp=2, ep=2))
    assert [share.experts for share in found] == [range(4), range(4), range(4, 7), range(4, 7)]
    assert [share.expert_columns.start for share in found] == [0, 768, 0, 768]
    assert [share.kv_heads.start for share in found] == [0, 1, 2, 3]  # dense parts over all four


@given(tp=st.integers(1, 6), pp=st.integers(1, 4), heads=st.integers(1, 4), kv=st.integers(1, 4))
def test_nothing_is_left_out_or_held_twice(tp: int, pp: int, heads: int, kv: int) -> None:
    data = SMOLLM2 | {
        "num_attention_heads": heads * kv,
        "num_key_value_heads": kv,
        "head_dim": 32,
        "num_hidden_layers": 5,
    }
    spec = ShardSpec(tp=tp, pp=pp)
    try:
        found = shares(data, spec)
    except ModelError:
        assert tp > kv  # or the groups could have been shared out
        return
    for stage in range(pp):
        of_stage = found[stage * tp : (stage + 1) * tp]
        assert [head for share in of_stage for head in share.heads] == list(range(heads * kv))
        assert [c for share in of_stage for c in share.mlp_columns] == list(range(1536))
        for share in of_stage:
            assert {head // heads for head in share.heads} == set(share.kv_heads)
    assert [n for share in found[::tp] for n in share.layers] == list(range(5))


@pytest.mark.parametrize(
    ("data", "spec", "said"),
    [
        (SMOLLM2, ShardSpec(tp=10), "9 heads"),
        (SMOLLM2, ShardSpec(pp=31), "30 layers"),
        (SMOLLM2, ShardSpec(ep=2), "0 experts"),
        (MIXTRAL, ShardSpec(ep=8), "7 experts"),
    ],
)
def test_what_cannot_be_spread_is_refused(data: dict[str, Any], spec: ShardSpec, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        shares(data, spec)


def test_a_worker_loads_its_slices_only(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", tie_word_embeddings=False)
    weights = Weights(folder)
    config: DecoderConfig = weights.config
    whole = sum(each.numel() for each in random_weights(_config(folder)).values())
    held = 0
    for rank in range(2):
        place = Place.of(ShardSpec(tp=2), rank)
        program = build_program(config, weights, torch.bfloat16, member=Member(place=place))
        held += sum(t.numel() for op in program.ops for t in tensors_of(op).values())
    norms = 2 * config.layers * config.hidden + config.hidden  # every worker has them
    assert held == whole + norms


def _config(folder: Path) -> dict[str, Any]:
    import json

    loaded: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return loaded
