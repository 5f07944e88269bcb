"""Rules 6 and 7: no hidden state, no environment, and nothing that runs what it reads."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from kit.source import Source, planted, sources, uphold

ENVIRONMENT_READERS = ("fabric.cli", "fabric.cluster.app")
ENVIRONMENT_NAMES = ("environ", "environb", "getenv", "putenv", "unsetenv")
# A table that is only read says so in its type; mypy then refuses to change it.
READ_ONLY = ("Mapping", "Sequence", "Set", "AbstractSet", "frozenset", "tuple")
MUTABLE_CALLS = (
    "list dict set bytearray defaultdict deque Counter OrderedDict count Queue Gauge "
    "Histogram Summary"
).split()
# Weights and messages are data. Unpickling is running a stranger's program.
RUNS_WHAT_IT_READS = ("torch.load", "pickle.load", "pickle.loads", "Unpickler", "eval", "exec")
LAST_NAMES = tuple(name.split(".")[-1] for name in RUNS_WHAT_IT_READS)


def test_modules_hold_no_mutable_globals() -> None:
    uphold(line for source in sources("fabric") for line in global_violations(source))


def test_the_environment_is_read_at_the_doors_only() -> None:
    uphold(line for source in sources("fabric") for line in environment_violations(source))


def test_nothing_runs_what_it_reads() -> None:
    uphold(line for source in sources("fabric") for line in execution_violations(source))


@pytest.mark.parametrize(
    "text",
    [
        "cache = {}",
        "cache: dict[str, int] = {}",
        "seen = set()",
        "rows = [n for n in range(3)]",
        "class A:\n    seen = []",
        "import collections\nwaiting = collections.deque()",
        "from prometheus_client import Counter\nsteps = Counter('a', 'b')",
        "x = 1\ndef f():\n    global x",
        "if True:\n    cache = {}",
    ],
)
def test_a_planted_global_is_caught(text: str) -> None:
    assert len(global_violations(planted(text))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "__all__ = ['f']",
        "SIZES: Mapping[str, int] = {'a': 1}",
        "NAMES: Final[Sequence[str]] = ['a']",
        "NAMES = ('a', 'b')",
        "NAMES = frozenset({'a'})",
        "class A:\n    __slots__ = ['a']",
        "def f():\n    seen = set()",
    ],
)
def test_a_constant_table_passes(text: str) -> None:
    assert not global_violations(planted(text))


@pytest.mark.parametrize(
    "text",
    [
        "import os\nos.environ['A']",
        "import os\nx = os.getenv('A')",
        "from os import environ",
        "import os as system\nsystem.environ.get('A')",
    ],
)
def test_a_planted_look_at_the_environment_is_caught(text: str) -> None:
    assert len(environment_violations(planted(text, "fabric.cluster.launcher"))) == 1
    assert not environment_violations(planted(text, "fabric.cli"))


@pytest.mark.parametrize(
    "text",
    ["import torch\ntorch.load('a')", "import pickle\npickle.loads(b'')", "eval('1')"],
)
def test_a_planted_execution_is_caught(text: str) -> None:
    assert len(execution_violations(planted(text))) == 1


def global_violations(source: Source) -> list[str]:
    """One line for each name of a module or class that holds something mutable."""
    broken = [
        f"{source.at(node)}: `global {', '.join(node.names)}`; pass it, or make it an attribute"
        for node in source.nodes
        if isinstance(node, ast.Global)
    ]
    for node in _module_level(source.tree):
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        name = ast.unparse(target)
        annotation = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ""
        if name.startswith("__") or _says_read_only(annotation) or not _is_mutable(node.value):
            continue
        broken.append(
            f"{source.at(node)}: {name} is a mutable global; a tuple, or the type Mapping[...] or "
            "Sequence[...] if it is a constant table"
        )
    return broken


def environment_violations(source: Source) -> list[str]:
    """One line for each use of the environment outside `cli.py` and `cluster/app.py`."""
    if source.module in ENVIRONMENT_READERS:
        return []
    broken = []
    for node in source.nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            found = any(alias.name in ENVIRONMENT_NAMES for alias in node.names)
        else:
            found = isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT_NAMES
        if found:
            doors = " and ".join(ENVIRONMENT_READERS)
            broken.append(f"{source.at(node)}: the environment is read in {doors} only; pass it in")
    return broken


def execution_violations(source: Source) -> list[str]:
    """One line for each call that runs code found in data."""
    return [
        f"{source.at(node)}: {ast.unparse(node.func)} runs what it reads"
        for node in source.nodes
        if isinstance(node, ast.Call)
        and _last_name(node.func) in LAST_NAMES
        and ast.unparse(node.func) in RUNS_WHAT_IT_READS
    ]


def _module_level(tree: ast.AST) -> Iterator[ast.stmt]:
    """Statements that run at import: also those inside classes, `if` and `try`, never functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.stmt):
            yield node
            yield from _module_level(node)
        elif isinstance(node, ast.ExceptHandler):
            yield from _module_level(node)


def _says_read_only(annotation: str) -> bool:
    words = annotation.removeprefix("Final[").removeprefix("ClassVar[")
    return words.split("[")[0].split(".")[-1] in READ_ONLY


def _is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp):
        return True
    if not isinstance(value, ast.Call):
        return False
    return _last_name(value.func) in MUTABLE_CALLS


def _last_name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""
