"""FabricConfig: what is wrong is refused with its path and what would be valid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from kit.source import ROOT
from pydantic import BaseModel

from fabric.config import FabricConfig, load_config, override, parse_config, read_config
from fabric.core.configs import AdmissionConfig
from fabric.core.errors import ConfigError

# `local_cluster.yaml` is Ray's, not fabric's: tests/cluster checks it.
DEPLOYMENTS = sorted(
    set((ROOT / "deployments").glob("*.yaml")) - {ROOT / "deployments" / "local_cluster.yaml"}
)


@pytest.mark.parametrize("path", DEPLOYMENTS, ids=lambda path: path.stem)
def test_every_deployment_loads(path: Path) -> None:
    assert isinstance(load_config(path), FabricConfig)


def test_single_shows_every_key_with_its_default() -> None:
    shown = yaml.safe_load((ROOT / "deployments" / "single.yaml").read_text(encoding="utf-8"))
    assert shown == json.loads(FabricConfig().model_dump_json())


def test_every_key_says_what_it_is() -> None:
    silent = [path for path, field in keys(FabricConfig) if not field.description]
    assert not silent


@pytest.mark.parametrize(
    ("data", "path", "hint"),
    [
        ({"prot": 1}, "prot", "model, kv, engine, shard, admission, router, server, ray, replicas"),
        ({"server": {"prot": 1}}, "server.prot", "host, port, api_keys"),
        ({"server": {"port": "8000"}}, "server.port", "integer"),
        ({"server": {"port": True}}, "server.port", "integer"),
        ({"server": {"port": 70000}}, "server.port", "65535"),
        ({"server": {"api_keys": [1]}}, "server.api_keys.0", "string"),
        ({"server": {"api_keys": [""]}}, "server.api_keys.0", "at least 1"),
        ({"server": {"drain_timeout_s": float("inf")}}, "server.drain_timeout_s", "finite"),
        ({"server": None}, "server", "object"),
        ({"model": {"dtype": "float16"}}, "model.dtype", "'bfloat16' or 'float32'"),
        ({"kv": {"block_size": 8}}, "kv.block_size", "16 or 32"),
        ({"kv": {"prefix_cache": 1}}, "kv.prefix_cache", "boolean"),
        ({"replicas": 1.5}, "replicas", "integer"),
        ({"journal": {"path": "here"}}, "journal.path", "pattern"),
        ({"replicas": 0}, "replicas", "greater than or equal to 1"),
        ({"replicas": 10**6}, "replicas", "less than or equal to 1024"),
        ({"autoscaling": {"max_replicas": 10**6}}, "autoscaling.max_replicas", "less than"),
    ],
)
def test_a_wrong_value_is_refused_with_its_path(data: Any, path: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(data)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"{path}: ")
    assert hint in lines[0]


def test_every_wrong_value_gets_a_line() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"replicas": 0, "server": {"port": 0, "x": 1}})
    assert len(str(caught.value).splitlines()) == 3


def test_others_are_let_in_only_with_a_key() -> None:
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0.*api_keys"):
        parse_config({"server": {"host": "0.0.0.0"}})
    assert parse_config({"server": {"host": "0.0.0.0", "api_keys": ["k"]}}).server.host == "0.0.0.0"
    assert parse_config({"server": {"host": "localhost"}}).server.host == "localhost"


def test_keys_are_never_shown() -> None:
    config = parse_config({"server": {"api_keys": ["hush-hush"]}})
    assert config.server.api_keys == ("hush-hush",)
    assert "hush-hush" not in f"{config!r} {config} {config.server!r}"
    with pytest.raises(ConfigError) as caught:
        parse_config({"server": {"api_keys": "hush-hush", "port": 0}})
    assert "hush-hush" not in str(caught.value)


def test_a_config_never_changes() -> None:
    config = FabricConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.replicas = 2  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        config.server.port = 9  # type: ignore[misc]


def test_files_that_are_no_config_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    for text, hint in [
        ("- 1", "mapping"),
        ("a: [", "not YAML"),
        ("replicas: 1\nreplicas: 2", "given twice: replicas"),
        ("server: {port: 1, port: 2}", "given twice: port"),
        ("x: !!python/object/apply:os.getcwd []", "not YAML"),
        ("server: {host: 2024-01-01, port: x}", "server.port"),
    ]:
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=hint) as caught:
            load_config(path)
        assert str(path) in str(caught.value)
    with pytest.raises(ConfigError, match="can't read"):
        load_config(tmp_path / "absent.yaml")
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="can't read"):
        load_config(path)


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n", encoding="utf-8")
    assert load_config(path) == FabricConfig()


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("server: {port: 9000, host: localhost}\nreplicas: 3\n", encoding="utf-8")
    data = read_config(path)
    config = parse_config(override(data, {"server.port": 9001, "model.name": "m"}))
    assert (config.server.port, config.server.host) == (9001, "localhost")
    assert (config.replicas, config.model.name) == (3, "m")
    assert data == read_config(path)


def test_a_flag_does_not_hide_a_wrong_section() -> None:
    with pytest.raises(ConfigError, match="server: "):
        parse_config(override({"server": 3}, {"server.port": 9001}))


def test_the_core_gets_its_own_record() -> None:
    section = parse_config({"admission": {"queue_ttl_s": 5.0}}).admission
    assert section.core() == AdmissionConfig(queue_ttl_s=5.0)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.dictionaries(
                st.sampled_from(["model", "server", "port", "api_keys", "replicas", "kv", "x"]),
                inner,
            )
            | st.lists(inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_whatever_comes_is_a_config_or_a_config_error(data: Any) -> None:
    try:
        config = parse_config(data)
    except ConfigError as error:
        assert str(error)
    else:
        assert parse_config(json.loads(config.model_dump_json())) == config


def keys(section: type[BaseModel], prefix: str = "") -> list[tuple[str, Any]]:
    """Every (dotted path, field) below a section."""
    found: list[tuple[str, Any]] = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += keys(inner, f"{prefix}{name}.")
        else:
            found.append((prefix + name, field))
    return found


def test_weights_are_rounded_for_groups_of_workers_too() -> None:
    """And for those of one pool."""
    rounded = {"model": {"quantization": "int8"}}
    for spread in ({"shard": {"tp": 2}}, {"pools": {"decode": {"shard": {"tp": 2}}}}):
        assert parse_config(rounded | spread).model.quantization == "int8"


def test_pools_are_scaled_apart() -> None:
    scaled = {"autoscaling": {"min_replicas": 2, "max_replicas": 5}, "shard": {"tp": 2}}
    config = parse_config({"pools": {"prefill": scaled, "decode": {"replicas": 3}}})
    assert (config.first_replicas, config.most_replicas, config.most_workers) == (5, 8, 13)
    assert config.scaled_pools == ("prefill",)
    assert parse_config({"autoscaling": {}}).scaled_pools == ("mixed",)
    for wrong, why in (
        ({"replicas": 2, "autoscaling": {}}, "leave it out"),
        ({"autoscaling": {"min_replicas": 0}}, "keeps at least one"),
    ):
        with pytest.raises(ConfigError, match=why):
            parse_config({"pools": {"decode": wrong}})
    with pytest.raises(ConfigError, match="given in each of them"):
        parse_config({"autoscaling": {}, "pools": {}})
