"""`install`: a folder built once, whole or not at all, however many processes ask for it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "manifest.json"


def install(target: Path, build: Callable[[Path], None]) -> Path:
    """Return `target`, letting `build` fill it first if it is not there or was damaged.

    `build` fills a private folder beside it, which is renamed into place when it is done: an
    interrupted build leaves nothing that looks finished, and the next one clears its remains.
    """
    if is_complete(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _locked(target.with_name(f".{target.name}.lock")):
        if is_complete(target):  # another process built it while this one waited
            return target
        for remains in target.parent.glob(f".{target.name}.partial-*"):
            shutil.rmtree(remains, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        try:
            build(folder)
            _seal(folder)
            if target.exists():
                shutil.rmtree(target)
            folder.rename(target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return target


def is_complete(folder: Path) -> bool:
    """True if every file of the manifest is there in its size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in manifest.items())
    except (OSError, ValueError):
        return False


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(folder: Path) -> None:
    """Make every file private and durable, and list them in the manifest (written last)."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(sizes, indent=1))
    for path in folder.iterdir():
        path.chmod(0o600)
        with path.open("rb") as file:
            os.fsync(file.fileno())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock; the system releases it if the process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
