"""The README's tables say what the code says."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterable
from typing import Any, get_args

import pytest
from kit.source import ROOT
from pydantic import BaseModel
from suite import BUDGETS_S

from fabric.config import FabricConfig

README = ROOT / "README.md"
REWRITE = "PYTHONPATH=.:tests .venv/bin/python tests/law/test_readme.py writes them anew"
LAW_FILE = ROOT / "tests" / "law" / "test_imports.py"


def config_table() -> list[str]:
    """Every key of FabricConfig: path, type, default, meaning."""
    rows = ["| key | type | default | |", "|---|---|---|---|"]
    for path, field in _keys(FabricConfig):
        default = _default(field)
        rows.append(f"| `{path}` | {_type(field.annotation)} | `{default}` | {field.description} |")
    return rows


def law_table() -> list[str]:
    """The import law, one part a row."""
    rows = ["| part | may import |", "|---|---|"]
    for part, allowed in _law().items():
        if part != "fabric":
            names = ", ".join(f"`{name.removeprefix('fabric.')}`" for name in allowed)
            if allowed == ("anything",):
                names = "anything, inside functions"
            rows.append(f"| `{part.removeprefix('fabric.')}` | {names or 'nothing'} |")
    return rows


def budget_table() -> list[str]:
    """The test folders, their budgets and what they hold."""
    rows = ["| folder | budget | holds |", "|---|---|---|"]
    for folder, seconds in BUDGETS_S.items():
        rows.append(f"| `tests/{folder}` | {seconds} s | {FOLDERS[folder]} |")
    return rows


FOLDERS = {
    "law": "import law, limits, annotations, frozen flags, this file's tables",
    "core": "state machines, property tests",
    "sim": "the core's objects under a virtual clock: whole systems, scenarios",
    "gateway": "HTTP and text against an engine in the process",
    "bench": "load generator and statistics",
    "model": "every architecture against `transformers`, file formats",
    "kernels": "every kernel against its reference",
    "worker": "plans executed: batch invariance, sampling, swapping; models over processes",
    "cluster": "Ray: replicas, dispatcher, draining, failures",
    "cluster/faults": "kills under a crowd of streams, against an undisturbed run",
    "e2e": "the demo model over HTTP",
}


@pytest.mark.parametrize("table", [config_table, law_table, budget_table])
def test_a_table_is_in_the_readme_as_the_code_has_it(table: Any) -> None:
    missing = _missing(table(), README.read_text(encoding="utf-8"))
    assert not missing, REWRITE


def test_a_table_that_lags_behind_is_caught() -> None:
    text = README.read_text(encoding="utf-8").replace("`server.port`", "`server.door`")
    assert _missing(config_table(), text)


def _missing(table: Iterable[str], text: str) -> bool:
    return "\n".join(["", *table, ""]) not in text


def _keys(section: type[BaseModel], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += _keys(inner, f"{prefix}{name}.")
            continue
        found.append((prefix + name, field))
        item = next(iter(get_args(inner)), None)
        if isinstance(item, type) and issubclass(item, BaseModel):
            many = "[]" if Ellipsis in get_args(inner) else ""
            found += _keys(item, f"{prefix}{name}{many}.")
    return found


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, tuple):
        values = [getattr(one, "name", one) for one in field.default]
        return json.dumps(values)
    return json.dumps(field.default)


def _type(annotation: Any) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
    if annotation in names:
        return names[annotation]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    choices = get_args(annotation)
    if all(isinstance(choice, str | int) for choice in choices):
        return ", ".join(str(choice) for choice in choices)
    if Ellipsis in choices:
        item = choices[0]
        sections = isinstance(item, type) and issubclass(item, BaseModel)
        return "list" if sections else "list of strings"
    return " or ".join(_type(choice) for choice in choices)


def _law() -> dict[str, tuple[str, ...]]:
    tree = ast.parse(LAW_FILE.read_text(encoding="utf-8"))
    values = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    law: dict[str, tuple[str, ...]] = ast.literal_eval(values["LAW"])
    return law


def _rewrite() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    for table in (config_table(), law_table(), budget_table()):
        begin = lines.index(table[0])
        end = next(i for i in range(begin, len(lines)) if not lines[i].startswith("|"))
        lines[begin:end] = table
    README.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(_rewrite())
