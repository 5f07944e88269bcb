"""`make test`: the test folders one after the other, each in its own process, with its time budget.

    python tests/suite.py [FOLDER ...] [-- PYTEST ARGUMENT ...]

A folder over its budget is named, not failed: the machine may be busy. The last line adds up
all folders in pytest's own words.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# In the order of cost, so that what breaks often breaks early. Seconds on two cores.
BUDGETS_S = {
    "law": 5,
    "core": 20,
    "sim": 40,
    "gateway": 20,
    "bench": 20,
    "model": 90,
    "kernels": 180,
    "worker": 60,
    "cluster": 240,
    "cluster/faults": 200,
    "e2e": 180,
}
# One process of these keeps about one core busy and starts no others: two at a time.
IN_TWO = ("core", "sim", "gateway", "bench")
NO_TESTS_PICKED = 5  # pytest's exit code: `-k` matched nothing in this folder
# Daemons are not on every user's PATH.
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
# Program that tests run, and the Debian package that brings it.
PROGRAMS = {
    "g++": "g++",
    "ip": "iproute2",
    "redis-server": "redis-server",
    "rsync": "rsync",
    "ssh": "openssh-client",
    "sshd": "openssh-server",
}


def main(words: list[str]) -> int:
    """Run the folders named in `words` (all without any); 0 when every test passed."""
    split = words.index("--") if "--" in words else len(words)
    folders, arguments = words[:split], words[split + 1 :]
    if unknown := [folder for folder in folders if folder not in BUDGETS_S]:
        print(f"no such folder: {', '.join(unknown)}; there are {', '.join(BUDGETS_S)}")
        return 2
    _say_what_is_missing()
    began = time.monotonic()
    totals: Counter[str] = Counter()
    failed = []
    for folder in folders or BUDGETS_S:
        if not list((ROOT / "tests" / folder).glob("test_*.py")):
            continue
        code = _run(folder, arguments, totals)
        if code not in (0, NO_TESTS_PICKED):
            failed.append(folder)
    if failed:
        print(f"failed: {', '.join(failed)}")
    _print_closing_line(totals, time.monotonic() - began)
    return 1 if failed or not totals["passed"] else 0


def _run(folder: str, arguments: list[str], totals: Counter[str]) -> int:
    print(f"--- tests/{folder} (budget {BUDGETS_S[folder]} s)", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", f"tests/{folder}", "-q", f"--junitxml={report}"]
        inner = [one for one in BUDGETS_S if one.startswith(f"{folder}/")]  # have their own turn
        command += [f"--ignore=tests/{one}" for one in inner]
        if folder in IN_TWO:
            command += ["-n", "2", "--dist", "worksteal"]
        pick = [] if "-m" in arguments else ["-m", "not nightly"]
        command += [*pick, *arguments]
        code = subprocess.run(command, cwd=ROOT, env=_environment(), check=False).returncode
        if report.exists():
            totals.update(_counts(report))
        else:
            totals["errors"] += 1  # the process died before it could report
    seconds = time.monotonic() - began
    if seconds > BUDGETS_S[folder]:
        print(f"tests/{folder} took {seconds:.0f} s, over its budget of {BUDGETS_S[folder]} s")
    return code


def _environment() -> dict[str, str]:
    """With bytecode kept: without, every process of a server compiles fabric anew."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def _counts(report: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        number = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
        counts["failed"] += number["failures"]
        counts["errors"] += number["errors"]
        counts["skipped"] += number["skipped"]
        rest = number["failures"] + number["errors"] + number["skipped"]
        counts["passed"] += number["tests"] - rest
    return counts


def _say_what_is_missing() -> None:
    missing = [
        package for program, package in PROGRAMS.items() if not shutil.which(program, path=PATH)
    ]
    if missing:
        print(
            f"missing system packages: {', '.join(missing)}; tests that need them are skipped or "
            f"fail (Debian, Ubuntu: apt-get install {' '.join(missing)})"
        )


def _print_closing_line(totals: Counter[str], seconds: float) -> None:
    order = ("failed", "passed", "skipped", "errors")
    counts = ", ".join(f"{totals[key]} {key}" for key in order if totals[key]) or "no tests ran"
    minutes, rest = divmod(round(seconds), 60)
    print(f"===== {counts} in {seconds:.2f}s ({minutes // 60}:{minutes % 60:02}:{rest:02}) =====")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
