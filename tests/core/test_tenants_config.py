"""Tiers and tenants in the configuration."""

from __future__ import annotations

from typing import Any

import pytest
from kit.source import ROOT

from fabric.config import FabricConfig, load_config, parse_config
from fabric.core.errors import ConfigError
from fabric.core.tenants import Tenant
from fabric.core.tiers import BUILT_IN

NAMES = ("interactive", "standard", "batch")
TIERS = [{"name": name, "ttft_ms": 1, "tpot_ms": 1} for name in NAMES]


def tenant(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, **fields}


def test_the_defaults_are_the_cores_tiers() -> None:
    assert tuple(tier.core() for tier in FabricConfig().tiers) == BUILT_IN


def test_a_tenant_becomes_the_cores_record_without_its_keys() -> None:
    config = load_config(ROOT / "deployments" / "tenants.yaml")
    assert config.tenants[1].core() == Tenant(
        name="reports", default_tier="batch", highest_tier="batch", max_concurrent=16
    )
    assert len(config.api_keys()) == 4
    for key in config.api_keys():
        assert key not in f"{config!r} {config} {config.tenants!r}"


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        ({"tiers": []}, "no interactive, standard, batch"),
        ({"tiers": TIERS[:2]}, "no batch"),
        ({"tiers": [*TIERS, TIERS[0]]}, "a name twice"),
        ({"tiers": [*TIERS, {**TIERS[0], "name": "priority"}]}, "'priority', a name with a"),
        ({"tiers": [*TIERS, {**TIERS[0], "name": "Fast"}]}, "tiers.3.name: "),
        ({"tiers": [{**TIERS[0], "ttft_ms": 0}, *TIERS[1:]]}, "tiers.0.ttft_ms: "),
        ({"tiers": [{**TIERS[0], "speed": 0}, *TIERS[1:]]}, "tiers.0.speed: unknown key"),
        ({"tiers": [{**t, "reserved_share": 0.4} for t in TIERS]}, "must be below 1"),
        ({"tenants": [tenant("a"), tenant("a")]}, "tenants has a name twice"),
        ({"tenants": [tenant("a b")]}, "tenants.0.name: "),
        ({"tenants": [tenant("a", default_tier="gold")]}, "tenants.0.default_tier: tiers has int"),
        ({"tenants": [tenant("a", highest_tier="batch")]}, "tenants.0.default_tier is above"),
        ({"tenants": [tenant("a", max_concurrent=0)]}, "tenants.0.max_concurrent: "),
        ({"tenants": [tenant("a", api_keys=["same"]), tenant("b", api_keys=["same"])]}, "twice"),
        ({"tenants": [tenant("a", api_keys=["k"])], "server": {"api_keys": ["k"]}}, "twice"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(data: Any, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(data)
    assert hint in str(caught.value)
    assert "same" not in str(caught.value)


def test_a_tenants_key_lets_others_in() -> None:
    config = parse_config({"server": {"host": "0.0.0.0"}, "tenants": [tenant("a", api_keys=["k"])]})
    assert config.api_keys() == ("k",)


@pytest.mark.parametrize(
    ("rung", "needs"),
    [
        ({"kind": "draft"}, "speculation"),
        ({"kind": "cheaper", "tier": "standard", "version": "small"}, "second version"),
    ],
)
def test_a_rung_that_nothing_serves_is_refused(rung: dict[str, object], needs: str) -> None:
    """It would be entered, take nothing from anybody, and hold up the next one."""
    with pytest.raises(ConfigError, match=f"{needs}.*leave that rung out"):
        parse_config({"slo": {"ladder": [rung, {"kind": "shed", "tier": "batch"}]}})
