"""local_cluster.yaml, really launched: `ray up` over SSH into two hosts of their own."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from kit.fabric_server import eventually
from kit.hosts import Host, missing, need, network, tool
from kit.ray_cluster import ask_at
from kit.source import ROOT
from kit.ssh_hosts import PACKAGES, SshHost, install_fabric, make_keys, session_environment

from fabric.cli import cache_folder
from fabric.cluster.processes import PROC

DEMO = "kv: {device_bytes: 67108864, host_bytes: 0}\nmodel: {name: demo, threads: 1}\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """`ray up` has returned. Commands of `ray` run on the operator's host."""

    operator: SshHost
    nodes: list[SshHost]
    config: Path

    def ray(self, *words: str) -> str:
        environment = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
        return self.operator.run(tool("ray"), *words, environment=environment)

    def on_head(self, command: str) -> str:
        """In the environment of the start commands, as the file's own comment says."""
        prefix = "export RAY_AUTH_MODE=token PATH=$HOME/fabric/.venv/bin:$PATH; "
        return self.ray("exec", str(self.config), prefix + command)

    def wait_for_both(self) -> None:
        """Until the head knows of the other node. Asking is slow: not before Ray runs there."""
        worker = self.nodes[1].host
        eventually(lambda: any(b"raylet/raylet" in one for one in commands(worker)), within_s=120)
        eventually(lambda: self.alive() == 2, within_s=60)

    def alive(self) -> int:
        """Rows of nodes in the table; SSH says addresses too."""
        table = self.on_head("fabric status --address auto || true")
        return len(re.findall(r"(?m)^[0-9a-f]{8} +10\.77\.0\.\d+ +(?!dead)", table))


def commands(host: Host) -> list[bytes]:
    """What runs there; what has ended meanwhile is left out."""
    found = []
    for pid in host.pids():
        with suppress(OSError):
            found.append((PROC / str(pid) / "cmdline").read_bytes())
    return found


@pytest.fixture
def launched(demo_model: object) -> Iterator[Launched]:
    if os.getuid():
        missing("hosts of their own need root")
    for program, package in PACKAGES.items():
        need(program, package)
    folder = Path(tempfile.mkdtemp(prefix="fu", dir="/var/tmp"))
    try:
        with network(2) as (gateway, members):
            keys = make_keys(folder)
            operator = SshHost(gateway, folder)
            nodes = [SshHost(host, folder) for host in members]
            for node in nodes:
                install_fabric(node.home)
                node.serve(keys, session_environment(cache_folder()))
            config = _config(folder, keys, nodes)
            launched = Launched(operator=operator, nodes=nodes, config=config)
            launched.ray("get-auth-token", "--generate")
            launched.ray("up", "--yes", "--no-config-cache", str(config))
            yield launched
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _config(folder: Path, keys: Path, nodes: list[SshHost]) -> Path:
    """The file as it is, with these hosts for those of the example."""
    config = yaml.safe_load((ROOT / "deployments" / "local_cluster.yaml").read_text())
    head, *workers = [node.host.address for node in nodes]
    config["provider"] |= {"head_ip": head, "worker_ips": workers}
    config["auth"] |= {"ssh_user": "root", "ssh_private_key": str(keys / "user")}
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.timeout(300)
def test_ray_up_and_who_may_come_in(launched: Launched) -> None:
    """The head starts the other node. Without the token nobody gets an answer, and dashboard and
    HTTP are on loopback."""
    launched.wait_for_both()
    stranger = launched.operator.run(
        "sh",
        "-c",
        f"{tool('ray')} status --address {launched.nodes[0].host.address}:6379 2>&1 || true",
        environment={"RAY_AUTH_MODE": "disabled"},
    )
    assert re.search("(?i)token|authent", stranger), stranger
    assert "Active" not in stranger, stranger
    lines = launched.nodes[0].host.run("ss", "-Hltn").stdout.splitlines()
    outside = [line.split()[3] for line in lines if not line.split()[3].startswith("127.")]
    assert not any(one.endswith((":8265", ":8000")) for one in outside), outside


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_deploy_on_it(launched: Launched) -> None:
    """As README says: the file goes up, `fabric deploy` on the head."""
    launched.wait_for_both()
    head = launched.nodes[0]
    (head.home / "config.yaml").write_text(DEMO)
    assert "fabric: new" in launched.on_head("fabric deploy config.yaml")
    body = {"model": "demo", "prompt": "The capital of France is", "max_tokens": 8}
    answer = ask_at(head.host, "/v1/completions", body | {"temperature": 0})
    assert answer.status == 200, answer.text
    assert "Paris" in answer.json()["choices"][0]["text"]
    assert "nothing to change" in launched.on_head("fabric deploy config.yaml")
