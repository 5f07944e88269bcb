"""`fabric environment`: what a node of a cluster must have in its environment before `ray start`.

    eval "$(fabric environment)" && ray start --head ...

Ray's and Serve's processes inherit it. Without it `fabric deploy` works all the same, through
Serve's own proxy, which takes a multiple of HAProxy's CPU time for each item of a stream.
"""

from __future__ import annotations

import argparse
import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from fabric.cluster.app import serve_environment
from fabric.cluster.haproxy import AS_SERVE_SAYS, write_wrapper

HELP = """\
Prints what a node of a cluster must have in its environment before `ray start`:

  eval "$(fabric environment)" && ray start --head ...

Processes must then show a token (RAY_AUTH_MODE, unless it is set already), a node that is silent is
given up after about 6 s, and HTTP goes through HAProxy, on loopback."""

# A node is given up after about 6 s of silence: three checks, a second each and a second apart.
HEALTH_CHECK: Mapping[str, str] = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "5000",
}
# What may be there already, and then stays.
KEPT: Mapping[str, str] = {"RAY_AUTH_MODE": "token"}


def environment(folder: Path | None = None) -> dict[str, str]:
    """Of one node. Makes `folder` (by default one of this user's, in the folder for temporary
    files), which HAProxy keeps its things in."""
    folder = folder or Path(tempfile.gettempdir()) / f"fabric-node-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.is_symlink():
        raise PermissionError(f"{folder} belongs to somebody else")
    wrapper = write_wrapper(folder, host=AS_SERVE_SAYS, port=0)
    return {
        **serve_environment(folder, wrapper),
        **HEALTH_CHECK,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # 15 by default: the engine must not stand back
        # Serve would call replicas at a port that asks for no token and unpickles what comes; by
        # Ray's own calls, which do ask for one.
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": "0",
    }


def shell_lines(values: dict[str, str]) -> str:
    """For `eval` in any POSIX shell."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in sorted(values.items())]
    lines += [f'export {name}="${{{name}:-{value}}}"' for name, value in sorted(KEPT.items())]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Of `fabric environment`."""
    return argparse.ArgumentParser(
        prog="fabric environment",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def main(words: Sequence[str]) -> int:
    """Print it."""
    parser().parse_args(words)
    print(shell_lines(environment()))
    return 0
