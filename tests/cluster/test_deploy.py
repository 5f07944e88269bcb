"""`fabric deploy`, as far as it goes without a cluster: the form, the differences, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from kit.source import ROOT
from ray.serve.schema import ServeDeploySchema

from fabric.cli import main
from fabric.cluster.deploy import (
    _refuse_what_cannot_roll,
    config_of,
    differences,
    serve_config,
)
from fabric.config import load_config, parse_config
from fabric.core.errors import ConfigError

RAYS_OWN = ROOT / "deployments" / "local_cluster.yaml"
CONFIGS = sorted(set((ROOT / "deployments").glob("*.yaml")) - {RAYS_OWN})


def application(**settings: Any) -> dict[str, Any]:
    found: dict[str, Any] = serve_config(parse_config(settings))["applications"][0]
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_serve_accepts_the_form_and_it_holds_everything(path: Path) -> None:
    config = load_config(path)
    form = ServeDeploySchema(**serve_config(config)).model_dump(exclude_unset=True)
    assert config_of(form["applications"][0]) == config
    assert not differences(form["applications"][0], serve_config(config)["applications"][0])


def test_what_serve_deploy_takes_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["deploy", str(ROOT / "deployments" / "tensor_parallel.yaml"), "--serve-config"]) == 0
    )
    form = ServeDeploySchema(**yaml.safe_load(capsys.readouterr().out))
    assert form.http_options.host == "127.0.0.1"
    assert form.applications[0].import_path == "fabric.driver:application"


def test_differences_are_told_by_path() -> None:
    before = application(replicas=2, engine={"max_sequences": 32})
    after = application(replicas=3, engine={"step_tokens": 512}, autoscaling=None)
    assert [str(one).strip() for one in differences(before, after)] == [
        "engine.max_sequences: 32 -> 64",
        "engine.step_tokens: 1024 -> 512",
        "replicas: 2 -> 3",
    ]
    assert differences(after, after) == []


def test_what_another_version_left_there_is_no_obstacle() -> None:
    """Its keys may be gone: they are told as differences."""
    before = application(replicas=2)
    before["args"]["config"]["slo"] = {"gone": 1}
    told = [str(one).strip() for one in differences(before, application(replicas=2))]
    assert any(one.startswith("slo.gone: 1 -> ") for one in told)


def test_replicas_alone_leave_the_application_as_it_is() -> None:
    """Its arguments are the same, so Serve starts or stops replicas and restarts none."""
    two, three = application(replicas=2), application(replicas=3)
    assert two["args"] == three["args"]
    assert two["deployments"] != three["deployments"]


def test_a_pools_size_alone_restarts_nothing() -> None:
    one, two = ({"decode": {"replicas": number}} for number in (1, 2))
    before, after = (application(pools=pools) for pools in (one, two))
    assert before["args"] == after["args"] == application(pools={})["args"]
    assert [str(each).strip() for each in differences(before, after)] == [
        "pools.decode.replicas: 1 -> 2"
    ]
    scaled = application(pools={"decode": {"autoscaling": {}}})
    assert [each["name"] for each in scaled["deployments"]] == ["prefill"]
    assert config_of(scaled).scaled_pools == ("decode",)


def test_a_key_is_never_shown() -> None:
    before = application(server={"api_keys": ["sesame-1"]})
    after = application(server={"api_keys": ["sesame-2"]}, tenants=[_tenant("sesame-3")])
    told = "\n".join(map(str, differences(before, after)))
    assert "server.api_keys: 1 keys" in told
    assert "sesame" not in told


def _tenant(key: str) -> dict[str, Any]:
    return {"name": "acme", "api_keys": [key]}


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"model": {"source": "/models/other"}}, "model.source"),
        ({"server": {"port": 9000}}, "server.port"),
    ],
)
def test_what_cannot_roll_is_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=f"{word}.*serve shutdown"):
        _refuse_what_cannot_roll(differences(application(), application(**settings)))
    _refuse_what_cannot_roll(differences(application(), application(replicas=4)))


def test_a_wrong_file_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("replicas: none\n")
    assert main(["deploy", str(path)]) == 2
    assert f"{path}: replicas" in capsys.readouterr().err
