"""What the code imports is declared, and what it needs beside Python files is packaged."""

from __future__ import annotations

import fnmatch
import re
import sys
import tomllib
from collections.abc import Iterable
from typing import Any

from kit.imports import imports
from kit.source import ROOT, sources
from suite import BUDGETS_S

# Import name -> distribution, where they differ; starlette and pydantic are FastAPI's own parts.
DISTRIBUTIONS = {"yaml": "pyyaml", "starlette": "fastapi", "uvicorn": "ray"}


def test_every_import_is_a_declared_dependency() -> None:
    assert not undeclared(imported(), declared()), "add to [project] dependencies in pyproject.toml"


def test_an_undeclared_import_is_caught() -> None:
    assert undeclared({"yaml", "pandas", "json"}, declared()) == ["pandas"]


def test_every_native_source_is_packaged() -> None:
    patterns = project()["tool"]["setuptools"]["package-data"]
    left = []
    for path in (ROOT / "fabric").rglob("*"):
        if path.is_file() and path.suffix in (".cpp", ".h", ".jinja", ".html", ".yaml"):
            inside = [
                (ROOT / package.replace(".", "/"), pattern)
                for package, names in patterns.items()
                for pattern in names
            ]
            found = any(
                path.is_relative_to(folder)
                and fnmatch.fnmatch(str(path.relative_to(folder)), pattern)
                for folder, pattern in inside
            )
            left += [] if found else [str(path.relative_to(ROOT))]
    assert not left, "add to package-data in pyproject.toml"


def test_make_test_runs_every_folder() -> None:
    folders = {
        path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")
    }
    assert {str(folder) for folder in folders} <= set(BUDGETS_S), "add it to tests/suite.py"


def project() -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def declared() -> set[str]:
    """The distributions that fabric depends on."""
    lines = project()["project"]["dependencies"]
    return {re.split(r"[^\w-]", line, maxsplit=1)[0].lower() for line in lines}


def imported() -> set[str]:
    """Top-level names of every import in fabric."""
    return {name.split(".")[0] for source in sources("fabric") for _, name, _ in imports(source)}


def undeclared(names: Iterable[str], known: set[str]) -> list[str]:
    """Those of `names` that neither Python nor a declared distribution brings."""
    other = [n for n in names if n not in sys.stdlib_module_names and n != "fabric"]
    return sorted(name for name in other if DISTRIBUTIONS.get(name, name) not in known)
