"""`fabric profile`: what an engine step takes on this machine, for `fabric simulate --costs`."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fabric.bench.front import serve
from fabric.bench.front_costs import FrontCosts, measure_front
from fabric.bench.report import align
from fabric.bench.server import Server, ServerError
from fabric.bench.step_table import Facts, Loaded, Table, facts_of, measure

HELP = """\
Measures what a step of this machine's engine takes, and writes the table that
`fabric simulate --costs FILE` reads. Takes about a minute; nothing else should run. With --front a
server is started, too, and asked what HTTP and Ray Serve add; another minute.

examples:
  fabric profile
  fabric profile --front
  fabric profile path/to/model --output costs.json"""


def run(words: Sequence[str], load: Callable[[str | None], Loaded]) -> int:
    """Measure, print, write. The exit code."""
    arguments = profile_parser().parse_args(words)
    model: str | None = arguments.model
    subject = load(model)
    facts, found = facts_of(subject, model or "demo"), measure(subject)
    print(render(found))
    front = None
    if arguments.front:
        kv = {"device_bytes": facts.kv_bytes * facts.block_size * facts.num_blocks}
        try:
            with Server(serve(arguments.output.parent, kv, model)) as server:
                front = measure_front(server, found)
        except ServerError as problem:
            print(f"fabric profile: {problem}", file=sys.stderr)
            return 1
        print(front.render())
    write(arguments.output, facts, found, front)
    print(f"written to {arguments.output}")
    return 0


def render(found: Table) -> str:
    """For a terminal."""
    rows = [["tokens", "step ms"], *([str(n), f"{ns / 1e6:.2f}"] for n, ns in found.table)]
    return (
        f"{align(rows)}\n"
        f"a token of context: {found.ns_per_context / 1e3:.2f} µs; "
        f"a pair of a prompt: {found.ns_per_pair:.1f} ns"
    )


def write(path: Path, facts: Facts, found: Table, front: FrontCosts | None) -> None:
    """The file that `fabric simulate --costs` reads."""
    record: dict[str, Any] = {
        "name": f"{facts.model} on {platform.node()}",
        "machine": platform.processor() or platform.machine(),
        "costs": asdict(found),
        "engine": asdict(facts),
        "front": None if front is None else asdict(front),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read(path: Path) -> tuple[Facts, Table, FrontCosts]:
    """What `write` wrote, with a front. Raises `ValueError`, `OSError`."""
    record = json.loads(path.read_text(encoding="utf-8"))
    try:
        costs, front = record["costs"], record["front"]
        table = tuple((int(tokens), int(ns)) for tokens, ns in costs["table"])
        return (
            Facts(**record["engine"]),
            Table(**{**costs, "table": table}),
            FrontCosts(**front),
        )
    except (KeyError, TypeError):
        raise ValueError(f"{path}: not what `fabric profile --front` writes") from None


def profile_parser() -> argparse.ArgumentParser:
    """Its flags; tests/law/test_cli.py freezes them."""
    parser = argparse.ArgumentParser(
        prog="fabric profile",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="(default: the demo model)")
    parser.add_argument("--front", action="store_true", help="what a server adds, too")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path.home() / ".cache" / "fabric" / "costs.json",
        metavar="FILE",
        help="(default: %(default)s)",
    )
    return parser
