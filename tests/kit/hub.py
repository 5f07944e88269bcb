"""A small Hugging Face hub on the loopback: the three requests that a snapshot download makes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve_hub(repositories: dict[str, Path]) -> Iterator[str]:
    """Serve folders as repositories (owner/name -> folder) and give the hub's URL."""

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = self.path.split("?")[0].strip("/")
            for repository, folder in repositories.items():
                file = folder / path.rsplit("/", 1)[-1]
                if path == f"api/models/{repository}/revision/main":
                    self._json({"id": repository, "sha": COMMIT})
                    return
                if path == f"api/models/{repository}/tree/{COMMIT}":
                    self._json([_entry(entry) for entry in sorted(folder.iterdir())])
                    return
                if path.startswith(f"{repository}/resolve/{COMMIT}/") and file.is_file():
                    self._file(file)
                    return
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

        def _json(self, data: object) -> None:
            self._send(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

        def _file(self, file: Path) -> None:
            content = file.read_bytes()
            self._send(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{_hash(content)}"'})

        def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _entry(file: Path) -> dict[str, object]:
    content = file.read_bytes()
    return {"type": "file", "path": file.name, "size": len(content), "oid": _hash(content)}


def _hash(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
