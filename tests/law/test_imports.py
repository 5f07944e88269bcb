"""Rule 2: the import law is one table. Imports inside functions count like any other."""

from __future__ import annotations

import subprocess
import sys

import pytest
from kit.imports import imports
from kit.source import ROOT, Source, planted, sources, uphold

# Who may import what, beside the standard library, its own part and `EVERYONE`.
# A name covers what lies below it. "anything": inside functions only, or where only types need it.
LAW = {
    "fabric.core": (),
    "fabric.workload": ("fabric.core.request",),
    "fabric.config": ("fabric.core", "pydantic", "yaml"),
    "fabric.kernels": ("torch", "triton", "numpy"),
    "fabric.model": (
        "fabric.kernels",
        "fabric.core.shard",
        "torch",
        "numpy",
        "safetensors",
        "transformers",
        "tokenizers",
        "huggingface_hub",
        "gguf",
    ),
    "fabric.worker": (
        "fabric.core.request",
        "fabric.core.engine.plan",
        "fabric.core.engine.constraint",
        "fabric.core.shard",
        "fabric.model",
        "fabric.kernels",
        "torch",
        "numpy",
        "llguidance",
        "tokenizers",
    ),
    "fabric.gateway": (
        "fabric.core.request",
        "fabric.core.snapshot",
        "fabric.core.tenants",
        "fabric.core.tiers",
        "fastapi",
        "starlette",
        "pydantic",
        "orjson",
        "jinja2",
        "transformers",
        "tokenizers",
    ),
    "fabric.journal": ("fabric.core",),
    "fabric.sim": ("fabric.core", "fabric.journal", "fabric.workload", "fabric.config", "numpy"),
    "fabric.bench": ("fabric.core.request", "fabric.workload", "httpx", "numpy"),
    "fabric.cluster": (
        "fabric.core",
        "fabric.journal",
        "fabric.worker",
        "fabric.gateway",
        "fabric.config",
        "ray",
        "sqlalchemy",
        "prometheus_client",
    ),
    "fabric.driver": ("anything",),
    "fabric.cli": ("anything",),
    "fabric": (),
}

# The exception tree is drawn once and raised everywhere; kernels know nothing of fabric.
EVERYONE = ("fabric.core.errors",)
KNOW_NOTHING = ("fabric.kernels",)

# Three loops that meet only in the records of `core` itself.
SIBLINGS = ("fabric.core.engine", "fabric.core.traffic", "fabric.core.control")

# Named for what it holds when a part is imported: `from fabric import __version__`.
VERSION = "fabric.__version__"


def test_the_import_law() -> None:
    uphold(line for source in sources("fabric") for line in import_violations(source))


def test_engine_traffic_and_control_never_import_each_other() -> None:
    uphold(line for source in sources("fabric/core") for line in sibling_violations(source))


@pytest.mark.parametrize("module", ["fabric.core.engine.plan", "fabric.config", "fabric.cli"])
def test_light_modules_start_neither_ray_nor_torch(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{'ray', 'torch'}} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert not run.stdout.strip(), f"import {module} pulled in {run.stdout}"


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("fabric.core.blocks", "import numpy"),
        ("fabric.core.blocks", "from fabric.config import FabricConfig"),
        ("fabric.kernels.norm", "from fabric.core.errors import ModelError"),
        ("fabric.kernels.norm", "def f():\n    import fabric.model.decoder"),
        ("fabric.gateway.api", "def f():\n    import ray"),
        ("fabric.gateway.api", "import torch.nn as nn"),
        ("fabric.gateway.api", "from ..worker import worker"),
        ("fabric.worker.runner", "import importlib\nimportlib.import_module('ray')"),
        ("fabric.worker.runner", "from fabric.core.engine import scheduler"),
        ("fabric.bench.client", "if True:\n    import ray"),
        ("fabric.cluster.app", "import fastapi"),
        ("fabric.gateway.api", "if TYPE_CHECKING:\n    import torch"),
        ("fabric.cli", "import ray"),
        ("fabric.driver", "from fabric.worker.worker import Worker"),
        ("fabric.novel", "import json, yaml"),
    ],
)
def test_a_planted_import_is_caught(module: str, text: str) -> None:
    assert len(import_violations(planted(text, module))) == 1


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (
            "fabric.core.engine.engine",
            "import dataclasses\nimport fabric.core.configs",
        ),
        ("fabric.worker.runner", "from fabric.core.engine.plan import StepPlan\nimport torch.nn"),
        ("fabric.gateway.api", "from fabric import __version__\nfrom fabric.gateway import text"),
        ("fabric.worker.runner", "from fabric.core.engine import plan"),
        ("fabric.model.source", "from fabric.core.errors import ModelError"),
        ("fabric.cli", "from fabric.core.errors import FabricError\ndef f():\n    import ray"),
        ("fabric.core.engine.engine", "from . import plan"),
        ("fabric.cli", "if TYPE_CHECKING:\n    import ray"),
    ],
)
def test_a_lawful_import_passes(module: str, text: str) -> None:
    assert not import_violations(planted(text, module))


@pytest.mark.parametrize(
    "text",
    [
        "from fabric.core.traffic.router import Choice",
        "def f():\n    from fabric.core import traffic",
    ],
)
def test_a_planted_sibling_import_is_caught(text: str) -> None:
    assert len(sibling_violations(planted(text, "fabric.core.engine.engine"))) == 1


def import_violations(source: Source) -> list[str]:
    """One line for each import that the law does not allow."""
    part = _part(source.module)
    allowed = LAW[part]
    if part not in KNOW_NOTHING:
        allowed = (*allowed, *EVERYONE, VERSION)
    broken = []
    for node, name, inside in imports(source):
        if _lawful(name, part, allowed, inside=inside):
            continue
        where = "outside a function " if "anything" in allowed else ""
        may = ", ".join(allowed)
        broken.append(f"{source.at(node)}: {part} imports {name} {where}(may import: {may})")
    return broken


def sibling_violations(source: Source) -> list[str]:
    """One line for each import of one of the three loops by another."""
    others = [loop for loop in SIBLINGS if not _below(source.module, loop)]
    if len(others) == len(SIBLINGS):
        return []  # a record that all of them share
    return [
        f"{source.at(node)}: {source.module} imports {name}; what both need belongs in fabric/core"
        for node, name, _ in imports(source)
        if any(_below(name, loop) for loop in others)
    ]


def _part(module: str) -> str:
    """The longest key of the law that covers `module`; `fabric`, which may nothing, covers all."""
    return max((part for part in LAW if _below(module, part)), key=len)


def _lawful(name: str, part: str, allowed: tuple[str, ...], *, inside: bool) -> bool:
    if name.split(".", maxsplit=1)[0] in sys.stdlib_module_names:
        return True
    if "anything" in allowed and (inside or _below(name, "fabric.core")):
        return True
    own = part != "fabric" and _below(name, part)
    return own or any(_below(name, permitted) for permitted in allowed)


def _below(name: str, ancestor: str) -> bool:
    return name == ancestor or name.startswith(ancestor + ".")
