"""cluster.yaml, local_cluster.yaml and the Dockerfile: what can be said without a cloud."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from kit.hosts import tool
from kit.source import ROOT
from ray.autoscaler._private.util import prepare_config, validate_config

from fabric.cluster.node import environment, shell_lines

CLOUD = ROOT / "cluster.yaml"
LOCAL = ROOT / "deployments" / "local_cluster.yaml"
DOCKERFILE = ROOT / "deployments" / "Dockerfile"
COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands")


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


@pytest.mark.parametrize("path", [CLOUD, LOCAL], ids=lambda path: path.name)
def test_ray_accepts_it(path: Path) -> None:
    config = prepare_config(read(path))
    validate_config(config)
    config["provider"]["kind"] = "aws"
    config["docker_image"] = "misspelt"
    with pytest.raises(Exception, match="docker_image"):
        validate_config(config)


@pytest.mark.parametrize("path", [CLOUD, LOCAL], ids=lambda path: path.name)
def test_its_nodes_start_with_fabrics_environment(path: Path) -> None:
    for commands in COMMANDS:
        start = next(one for one in read(path)[commands] if "ray start" in one)
        assert start.index('eval "$(fabric environment)"') < start.index("ray start")
        assert "0.0.0.0" not in start
        assert ("--dashboard-host=127.0.0.1" in start) == ("--head" in start)


def test_the_clouds_node_types() -> None:
    types = read(CLOUD)["available_node_types"]
    assert set(types) == {"head", "cpu", "prefill_gpu", "decode_gpu"}
    assert types["head"]["resources"] == {"CPU": 0}, "no engine on the head"
    for name in ("prefill_gpu", "decode_gpu"):
        assert types[name]["resources"]["GPU"] > 0
    text = CLOUD.read_text()
    assert not re.search(r"AKIA|aws_secret|BEGIN .*PRIVATE KEY", text)


def test_the_environment_of_a_node(tmp_path: Path) -> None:
    """What the shell makes of it: token authentication unless the operator says otherwise, health
    checks that notice a lost node within seconds, no port that unpickles what strangers send."""
    lines = shell_lines(environment(tmp_path / "node"))
    shown = _environment_after(lines)
    assert shown["RAY_AUTH_MODE"] == "token"
    periods = int(shown["RAY_health_check_period_ms"]) + int(shown["RAY_health_check_timeout_ms"])
    assert int(shown["RAY_health_check_failure_threshold"]) * periods <= 6_000
    assert shown["RAY_SERVE_USE_GRPC_BY_DEFAULT"] == "0"
    assert Path(shown["RAY_SERVE_HAPROXY_BINARY_PATH"]).stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "node").stat().st_mode & 0o777 == 0o700
    assert _environment_after(f"RAY_AUTH_MODE=disabled; {lines}")["RAY_AUTH_MODE"] == "disabled"


def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(PermissionError, match="somebody else"):
        environment(tmp_path / "link")


def test_the_dockerfile_is_clean() -> None:
    done = subprocess.run([tool("hadolint"), DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    text = DOCKERFILE.read_text()
    users = re.findall(r"(?m)^USER (\S+)", text)
    assert users and not users[-1].startswith(("0", "root")), "nothing runs as root"
    copied = [word for line in re.findall(r"(?m)^COPY (.*) \S+$", text) for word in line.split()]
    assert copied and all((ROOT / one).exists() for one in copied)
    assert not re.search(r"(?m)^ADD|:latest\s*$|curl|wget", text.partition("FROM")[2])


def test_hadolint_would_find_something(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text(DOCKERFILE.read_text().replace(" --no-install-recommends", ""))
    assert subprocess.run([tool("hadolint"), bad], capture_output=True).returncode == 1


def _environment_after(lines: str) -> dict[str, str]:
    done = subprocess.run(
        ["/bin/sh", "-c", f"{lines}\nenv -0"], env={}, capture_output=True, text=True, check=True
    )
    return dict(pair.split("=", 1) for pair in done.stdout.split("\0") if pair)
