"""`Weights`: the tensors of a model folder, memory-mapped, checked against its config first.

Only safetensors is read. A file's header says everything needed for the check, so `validate` costs
milliseconds for a model of any size.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from fabric.core.errors import ModelError
from fabric.model.config import DecoderConfig, load_config, read_json

DTYPES: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
_FLOATS = frozenset({torch.bfloat16, torch.float16, torch.float32})
MAX_HEADER_BYTES = 100 << 20  # the format's own limit

# Old checkpoints carry these; rotary frequencies come from the config.
# So do quantised ones carry scales for a KV cache in fp8, which is not used.
_IGNORED = re.compile(r".*\.(rotary_emb\.inv_freq|[kv]_scale)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlace:
    """Where one tensor lies: `begin` and `end` are byte offsets into `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Weights:
    """The weights of a validated folder. Raises `ModelError` (see `validate`).

    Tensors are views of the mapped files: they cost page cache, which the system may drop.
    """

    def __init__(self, folder: Path) -> None:
        self.config = validate(folder)
        self._places = index_tensors(folder)
        self._maps: dict[Path, tuple[mmap.mmap, Tensor]] = {}

    def __getitem__(self, name: str) -> Tensor:
        """One tensor in the dtype it is stored in. Don't write to it."""
        place = self._places[name]
        if place.file not in self._maps:
            with place.file.open("rb") as file:
                # ACCESS_COPY: torch wants writable memory; what is written stays private.
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._maps[place.file] = mapped, torch.frombuffer(mapped, dtype=torch.uint8)
        data = self._maps[place.file][1][place.begin : place.end]
        if place.begin % place.dtype.itemsize:
            data = data.clone()  # the format allows unaligned tensors, torch views do not
        return data.view(place.dtype).view(place.shape)

    def release(self, name: str) -> None:
        """Let the pages of a tensor go, in this process; reading it again reads the file again."""
        place = self._places[name]
        if place.file in self._maps:
            page = mmap.PAGESIZE
            begin = place.begin // page * page
            self._maps[place.file][0].madvise(mmap.MADV_DONTNEED, begin, place.end - begin)


def validate(folder: Path) -> DecoderConfig:
    """Check config and weight headers; reads no weights. Returns the config.

    Raises `ModelError` naming tensor and file if a tensor is missing, left over, of a wrong shape
    or dtype, or if a file is truncated or not safetensors.
    """
    config = load_config(folder)
    places = index_tensors(folder)
    expected = _expected(config)
    for name, (shapes, dtypes) in expected.items():
        if name not in places:
            raise ModelError(f"{folder}: tensor {name} is missing; the config asks for it")
        place = places[name]
        if place.shape not in shapes:
            said = " or ".join(str(list(shape)) for shape in sorted(shapes))
            raise ModelError(
                f"{place.file}: tensor {name} is {list(place.shape)}, but the config says {said}"
            )
        if place.dtype not in dtypes:
            said = ", ".join(name for name, dtype in DTYPES.items() if dtype in dtypes)
            kind = next(name for name, dtype in DTYPES.items() if dtype == place.dtype)
            raise ModelError(
                f"{place.file}: tensor {name} has dtype {kind}; supported here: {said}"
            )
    optional = {"lm_head.weight"} if config.tied_embeddings else set()
    for name, place in places.items():
        if name not in expected and name not in optional and not _IGNORED.match(name):
            raise ModelError(
                f"{place.file}: tensor {name} has no place in this config ({config.architecture})"
            )
    return config


def _expected(
    config: DecoderConfig,
) -> dict[str, tuple[set[tuple[int, ...]], frozenset[torch.dtype]]]:
    """Shapes and dtypes that each tensor may have."""
    expected: dict[str, tuple[set[tuple[int, ...]], frozenset[torch.dtype]]] = {}
    for name, shape in config.tensor_shapes().items():
        module = name.removesuffix(".weight")
        storage = config.storage_of(module)
        if storage is None or len(shape) != 2:
            expected[name] = {shape}, _FLOATS
            continue
        for part, (shapes, kinds) in storage.parts((shape[0], shape[1])).items():
            expected[f"{module}.{part}"] = shapes, frozenset(DTYPES[kind] for kind in kinds)
    return expected


def index_tensors(folder: Path) -> dict[str, TensorPlace]:
    """Where every tensor of the folder lies. Raises `ModelError`."""
    places: dict[str, TensorPlace] = {}
    for file in weight_files(folder):
        places.update(read_header(file))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        for name, file_name in read_json(index)["weight_map"].items():
            if name not in places or places[name].file.name != file_name:
                raise ModelError(f"{index} promises tensor {name} in {file_name}; it is not there")
    return places


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in a fixed order. Raises `ModelError` without any."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index} has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ModelError(f"{index} names {name!r}, which is no safetensors file beside it")
            if not (folder / name).is_file():
                raise ModelError(f"{index} names {name}, which is missing")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1 and folder / "model.safetensors" in files:
        return [folder / "model.safetensors"]
    if len(files) > 1:
        raise ModelError(
            f"{folder} holds several safetensors files and no model.safetensors.index.json"
        )
    if not files:
        refuse_pickles(folder)
        raise ModelError(f"{folder} holds no safetensors weights")
    return files


def refuse_pickles(path: Path) -> None:
    """Raise `ModelError` if `path` is, or holds, weights that could only be read by unpickling."""
    endings = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
    names = sorted(p.name for p in path.iterdir()) if path.is_dir() else [path.name]
    pickles = [name for name in names if name.lower().endswith(endings)]
    if pickles:
        raise ModelError(
            f"{pickles[0]} is a pickle: reading it can run any code hidden in the file, so it is "
            "never opened. Convert the model to safetensors, or take a repository that has them"
        )


def read_header(file: Path) -> dict[str, TensorPlace]:
    """The tensors of one safetensors file (8 bytes of header length, a JSON header, the data).

    Raises `ModelError` if the file is truncated, over-long, or breaks the format.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ModelError(f"{file} is truncated or no safetensors file ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            places = {
                name: _place(file, name, entry, 8 + length) for name, entry in entries.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(f"{file} has a damaged safetensors header") from None
    end = max((place.end for place in places.values()), default=8 + length)
    if end != size:
        last = max(places, key=lambda name: places[name].end, default="none")
        state = "truncated" if size < end else "too long"
        raise ModelError(
            f"{file} is {state}: {size} bytes, but its header ends tensor {last} at {end}"
        )
    return places


def middle_page(place: TensorPlace) -> bytes:
    """Up to 4 KB from the middle of a tensor."""
    size = place.end - place.begin
    with place.file.open("rb") as file:
        file.seek(place.begin + max(size - 4096, 0) // 2)
        return file.read(min(size, 4096))


def _place(file: Path, name: str, entry: Mapping[str, object], data_start: int) -> TensorPlace:
    kind = str(entry["dtype"])
    if kind not in DTYPES:
        raise ModelError(
            f"{file}: tensor {name} has dtype {kind}; supported are {', '.join(DTYPES)}"
        )
    shape = tuple(int(n) for n in entry["shape"])  # type: ignore[attr-defined]
    begin, end = (int(n) for n in entry["data_offsets"])  # type: ignore[attr-defined]
    if min((begin, *shape)) < 0 or end - begin != prod(shape) * DTYPES[kind].itemsize:
        raise ModelError(f"{file}: tensor {name} has offsets that do not fit its shape and dtype")
    return TensorPlace(
        file=file,
        dtype=DTYPES[kind],
        shape=shape,
        begin=data_start + begin,
        end=data_start + end,
    )
