"""HAProxy's configuration after our edit: where it listens, what it says while Serve starts."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from jinja2 import Environment
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

from fabric.cluster.haproxy import LOADING, edited, error_page, find_binary


def written_by_serve(folder: Path, host: str, port: int) -> str:
    """Serve's own template with what fabric sets; unknown settings are empty."""

    class Settings(dict[str, object]):
        def __getattr__(self, name: str) -> object:
            return self.get(name)

    settings = Settings(
        log_target="127.0.0.1:514",
        socket_path=str(folder / "a.sock"),
        maxconn=64,
        nbthread=1,
        bufsize=16384,
        retry_on="conn-failure",
        balance_algorithm="leastconn",
        metrics_port=9101,
        metrics_uri="/metrics",
        stats_port=8404,
        stats_uri="/stats",
        frontend_host=host,
        frontend_port=port,
        timeout_connect_s=5,
        timeout_client_s=60,
        timeout_server_s=60,
    )
    route = Settings(status=200, routes_content_type="text/plain", routes_message="none")
    templates = Environment()
    templates.filters["haproxy_fmt"] = str
    template = templates.from_string(HAPROXY_CONFIG_TEMPLATE)
    return template.render(config=settings, route_info=route) + "\n"


@pytest.mark.parametrize(
    ("host", "address"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "0.0.0.0"), ("::1", "[::1]")]
)
def test_only_the_clients_port_can_be_outside(tmp_path: Path, host: str, address: str) -> None:
    before = written_by_serve(tmp_path, "127.0.0.1", 8000)
    assert "bind *:8404" in before, "Serve's template has changed"
    after = edited(before, host=host, port=8000)
    binds = re.findall(r"(?m)^\s*bind (\S+)", after)
    assert sorted(binds) == sorted(["127.0.0.1:9101", "127.0.0.1:8404", f"{address}:8000"])
    assert "mode 600 level admin" in after
    assert edited(after, host=host, port=8000) == after, "a reload edits it again"


def test_haproxy_itself_accepts_the_edit(tmp_path: Path) -> None:
    config = tmp_path / "haproxy.cfg"
    config.write_text(edited(written_by_serve(tmp_path, "127.0.0.1", 8000), host="::1", port=8000))
    run = subprocess.run([find_binary(), "-c", "-f", str(config)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "return status 503" in config.read_text()


def test_the_error_page_is_an_openai_error() -> None:
    head, body = error_page().split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert f"content-length: {len(body)}".encode() in head
    assert json.loads(body) == LOADING
