"""Hosts as `ray up` finds them: an SSH server on each, and processes, home and /tmp of its own.

The process numbers are a namespace's own, so that the `ray stop` of a cluster's start commands ends
what runs on that host, as it does on a real one, and nothing else on this machine.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from kit.hosts import Host, need
from kit.source import ROOT

PACKAGES = {"sshd": "openssh-server", "ssh": "openssh-client", "rsync": "rsync"}


class SshHost:
    """`folder`: short-named, not below /tmp; the host's home and /tmp lie in it."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.host = host
        self.home = folder / host.address
        self.home.mkdir(mode=0o700)
        (self.home / "tmp").mkdir(mode=0o1777)
        self._passwd = folder / f"{host.address}.passwd"
        lines = Path("/etc/passwd").read_text().splitlines()
        self._passwd.write_text("\n".join(self._moved(line) for line in lines) + "\n")

    def serve(self, keys: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start the SSH server; sessions get `environment`. `keys`: see `make_keys`."""
        config = self.home / "sshd_config"
        pairs = " ".join(f'{name}="{value}"' for name, value in environment.items())
        config.write_text(
            f"ListenAddress {self.host.address}\nHostKey {keys / 'host'}\n"
            f"AuthorizedKeysFile {keys / 'user.pub'}\nStrictModes no\nUsePAM no\n"
            f"PasswordAuthentication no\nPidFile none\nSetEnv {pairs}\n"
        )
        Path("/run/sshd").mkdir(exist_ok=True)
        words = self._isolated(f"exec {need('sshd', PACKAGES['sshd'])} -D -e -f {config}")
        return self.host.start(*words, log=self.home / "sshd.log")

    def run(
        self, *words: str, environment: Mapping[str, str] | None = None, timeout_s: float = 300.0
    ) -> str:
        """A command here; what it says."""
        environment = {"HOME": str(self.home), **(environment or {})}
        script = self._isolated(f"exec {shlex.join(words)}")
        return self.host.run(*script, environment=environment, timeout_s=timeout_s).stdout

    def _isolated(self, command: str) -> list[str]:
        tmp = self.home / "tmp"
        mounts = [f"mount --rbind {tmp} /tmp", f"mount --bind {self._passwd} /etc/passwd"]
        # A checkout below /tmp stays in sight.
        for path in {ROOT, Path(sys.prefix)}:
            if path.is_relative_to("/tmp"):
                inside = tmp / path.relative_to("/tmp")
                mounts.insert(0, f"mkdir -p {inside} && mount --bind {path} {inside}")
        shell = " && ".join([*mounts, command])
        return ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", shell]

    def _moved(self, line: str) -> str:
        """An entry of /etc/passwd, with root's home here."""
        fields = line.split(":")
        return ":".join([*fields[:5], str(self.home), *fields[6:]]) if fields[2] == "0" else line


def make_keys(folder: Path) -> Path:
    """The folder of an SSH host key and of a user's, without passphrases."""
    keys = folder / "keys"
    keys.mkdir(mode=0o700)
    for name in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)]
        subprocess.run(command, check=True)
    return keys


def install_fabric(home: Path) -> None:
    """`$HOME/fabric/.venv`, as deployments/local_cluster.yaml has it: this very environment."""
    (home / "fabric").mkdir()
    (home / "fabric" / ".venv").symlink_to(Path(sys.prefix))
    assert (home / "fabric" / ".venv" / "bin" / "fabric").exists()


def session_environment(cache: Path) -> dict[str, str]:
    """What stands for an installed fabric and its model."""
    return {
        "PYTHONPATH": str(ROOT),
        "FABRIC_CACHE": str(cache),
        # A busy machine is no broken one.
        "RAY_raylet_start_wait_time_s": "300",
        "RAY_health_check_initial_delay_ms": "20000",
    }
