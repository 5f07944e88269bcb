"""The README's API table lists the routes that the app has."""

from __future__ import annotations

import re

from fastapi.routing import APIRoute
from kit.source import ROOT

from fabric.gateway.api import create_app


def test_the_readme_lists_every_route() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`((?:GET|POST) /[^`]*)`", text))
    app = create_app(None)  # type: ignore[arg-type]  # no request is made
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    served = {
        f"{method} {route.path.replace(':path', '')}"
        for route in routes
        for method in route.methods
    }
    assert listed == served | {f"GET {app.openapi_url}"}
