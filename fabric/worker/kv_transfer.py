"""KV between two replicas: blocks in some worker's own layout <-> groups in one canonical form.

    pool ──EXPORT──> rows ──collect──> group ~~ store ~~> group ──stage──> rows ──IMPORT──> pool
          in a step        other thread                         other thread       in a step

A group is one run of bytes: a header, then blocks as the worker that sends them has them, of its
layers and heads. A worker with the same layout takes them as they are; one with another packing or
another share of the model brings each into the one canonical form in between,

    [layers, K and V, kv heads, positions, head_dim]

and takes out of that what it needs. Nothing of a group is believed before its checksum (CRC-32,
over the header too) and its layout are right; positions that the prompt has not reached are zero.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fabric.core.engine.plan import BlockCopy, CopyKind, KvExport
from fabric.kernels.program import KvLayout

Bytes = NDArray[np.uint8]
COLLECT_TIMEOUT_S = 10.0
# Memory kept for the next group: to touch it for the first time costs more than the copy.
SPARE_ROWS = 64
SPARE_GROUPS = 2
ALIGNMENT = 64
# Two elements as one word, by the bytes of an element.
_PAIR: Mapping[int, type[np.unsignedinteger[Any]]] = {2: np.uint32, 4: np.uint64}
_PREFIX_BYTES = 8  # length of the header, checksum of all that follows


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Which of the model's layers and KV heads: [begin, end) of so many."""

    layers: tuple[int, int]
    heads: tuple[int, int]
    all_layers: int
    all_heads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupHeader:
    """What a group says of itself. `salt` and `digest` in hex; see `KvExport` for the others."""

    request_id: str
    epoch: int
    first: int
    end: int
    salt: str
    digest: str
    dtype: str
    packing: str
    page: int
    head_dim: int
    part: Part

    def layout(self) -> KvLayout:
        """Of the worker that sent it."""
        layers, heads = self.part.layers, self.part.heads
        return KvLayout(
            dtype=self.dtype,
            packing=self.packing,
            layers=layers[1] - layers[0],
            kv_heads=heads[1] - heads[0],
            head_dim=self.head_dim,
            page=self.page,
        )


class GroupError(Exception):
    """The group is not what it should be. `reason`: one word, for a counter."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Staging:
    """A worker's blocks on their way, by slot. Steps move them from and to the pool (`copy`); the
    other verbs may come from any thread."""

    def __init__(self, layout: KvLayout, part: Part) -> None:
        self.layout = layout
        self.part = part
        self._rows: dict[int, Tensor] = {}
        self._dropped: set[int] = set()  # a step under way will fill them, for nobody
        self._spare: list[Tensor] = []
        self._spare_groups: list[Bytes] = []
        self._changed = threading.Condition()

    def copy(self, copies: Iterable[BlockCopy], blocks_XB: Tensor) -> None:
        """One memcpy a block: between the pool and a slot."""
        for copy in copies:
            if copy.kind is CopyKind.EXPORT:
                row_B = self._new_row()
                row_B.copy_(blocks_XB[copy.source])
                with self._changed:
                    wanted = copy.target not in self._dropped
                    self._dropped.discard(copy.target)
                    if wanted:
                        self._rows[copy.target] = row_B
                        self._changed.notify_all()
                if not wanted:
                    self._give_back([row_B])
            else:
                with self._changed:
                    row_B = self._rows.pop(copy.source)
                blocks_XB[copy.target].copy_(row_B)
                self._give_back([row_B])

    def collect(self, export: KvExport) -> Bytes:
        """The group that a plan has put into the slots of `export`, which are free again. Waits for
        a step that is under way. `TimeoutError`: it takes too long, and the export is dropped."""
        slots = range(export.slot, export.slot + export.blocks)
        with self._changed:
            here = self._changed.wait_for(
                lambda: all(slot in self._rows for slot in slots), COLLECT_TIMEOUT_S
            )
            rows = [self._rows.pop(slot) for slot in slots] if here else []
        if not here:
            self.drop(export)
            raise TimeoutError(f"slots {slots} were not filled in time")
        try:
            return pack_group(export, rows, self.layout, self.part, self._group_memory)
        finally:
            self._give_back(rows)

    def release(self, group: Bytes) -> None:
        """What `collect` returned is in the store: its memory is for the next one."""
        memory = group if group.base is None else group.base
        with self._changed:
            if len(self._spare_groups) < SPARE_GROUPS:
                self._spare_groups.append(memory)

    def drop(self, export: KvExport) -> None:
        """Nobody collects this: its slots are free, those that are still to be filled as well."""
        slots = range(export.slot, export.slot + export.blocks)
        with self._changed:
            self._dropped.update(slot for slot in slots if slot not in self._rows)
            rows = [self._rows.pop(slot) for slot in slots if slot in self._rows]
        self._give_back(rows)

    def stage(self, slot: int, group: Bytes) -> None:
        """`open_group` and `place`. Raises `GroupError`."""
        self.place(slot, *open_group(group))

    def place(self, slot: int, header: GroupHeader, content: Bytes) -> None:
        """Put what this worker needs of a group into its slots, from `slot` on. The same slots may
        get several groups: other layers, other heads. Raises `GroupError`."""
        layout = self.layout
        same = header.dtype == layout.dtype and header.page == layout.page
        whole = (header.part.all_layers, header.part.all_heads)
        if not same or header.head_dim != layout.head_dim:
            raise GroupError("layout")
        if whole != (self.part.all_layers, self.part.all_heads):
            raise GroupError("layout")
        count = len(content)
        as_they_are = header.packing == layout.packing and header.part == self.part
        with self._changed:
            rows = [self._rows.get(slot + index) for index in range(count)]
        new = self._new_row if as_they_are else self._blank_row
        filled = [new() if row is None else row for row in rows]
        for row_B, block_B in zip(filled, content, strict=True):
            if as_they_are:
                np.copyto(row_B.numpy(), block_B)
            else:
                _convert(header, block_B, row_B.numpy(), layout, self.part)
        with self._changed:
            self._rows.update((slot + index, row) for index, row in enumerate(filled))

    def discard(self, slot: int, count: int) -> None:
        """Nobody wants what is in these slots, if there is something."""
        with self._changed:
            rows = [self._rows.pop(slot + index, None) for index in range(count)]
        self._give_back([row for row in rows if row is not None])

    @property
    def used(self) -> int:
        """Slots in use."""
        return len(self._rows)

    def _new_row(self) -> Tensor:
        with self._changed:
            if self._spare:
                return self._spare.pop()
        return torch.empty(self.layout.block_bytes(), dtype=torch.uint8)

    def _blank_row(self) -> Tensor:
        return self._new_row().zero_()

    def _group_memory(self, size: int) -> Bytes:
        """Of `size` bytes, with anything in it."""
        with self._changed:
            for index, memory in enumerate(self._spare_groups):
                if len(memory) >= size:
                    return self._spare_groups.pop(index)[:size]
            self._spare_groups.clear()  # prompts with larger groups come
        return np.empty(size, dtype=np.uint8)

    def _give_back(self, rows: list[Tensor]) -> None:
        with self._changed:
            self._spare.extend(rows[: SPARE_ROWS - len(self._spare)])


def pack_group(
    export: KvExport,
    rows: Sequence[Tensor],
    layout: KvLayout,
    part: Part,
    memory: Callable[[int], Bytes] = lambda size: np.empty(size, dtype=np.uint8),
) -> Bytes:
    """Blocks of one worker (uint8 [block_bytes] each) as a group, in `memory` of its size."""
    header = GroupHeader(
        request_id=export.request_id,
        epoch=export.epoch,
        first=export.first,
        end=export.end,
        salt=export.salt.hex(),
        digest=export.digest.hex(),
        dtype=layout.dtype,
        packing=layout.packing,
        page=layout.page,
        head_dim=layout.head_dim,
        part=part,
    )
    text = json.dumps(asdict(header)).encode()
    begin = -(-(_PREFIX_BYTES + len(text)) // ALIGNMENT) * ALIGNMENT
    size = layout.block_bytes()
    group = memory(begin + len(rows) * size)
    group[_PREFIX_BYTES : _PREFIX_BYTES + len(text)] = np.frombuffer(text, dtype=np.uint8)
    group[_PREFIX_BYTES + len(text) : begin] = 0
    content = group[begin:].reshape(len(rows), size)
    for block_B, row_B in zip(content, rows, strict=True):
        np.copyto(block_B, row_B.numpy())
    if written := (export.end - export.first) % layout.page:
        for kind in (0, 1):
            for strip in _strips(content[-1], layout, kind):
                strip.view[:, :, -(-(written - strip.first) // strip.step) :] = 0
    group[:4] = np.frombuffer(len(text).to_bytes(4, "little"), dtype=np.uint8)
    group[4:8] = np.frombuffer(_checksum(group).to_bytes(4, "little"), dtype=np.uint8)
    return group


def open_group(group: Bytes) -> tuple[GroupHeader, Bytes]:
    """Header and blocks (uint8 [blocks, block_bytes] of its own layout) of a group that is whole.

    Raises `GroupError`: "checksum" for anything that is not exactly what was packed."""
    if len(group) < ALIGNMENT or _checksum(group) != int.from_bytes(group[4:8].tobytes(), "little"):
        raise GroupError("checksum")
    header, begin = read_header(group)
    size = header.layout().block_bytes()
    count = -(-(header.end - header.first) // header.page)
    if len(group) - begin != count * size:
        raise GroupError("layout")
    return header, group[begin:].reshape(count, size)


def read_header(group: Bytes) -> tuple[GroupHeader, int]:
    """The header, not checked yet, and where the content begins. Raises `GroupError`."""
    length = int.from_bytes(group[:4].tobytes(), "little")
    try:
        fields = json.loads(group[_PREFIX_BYTES : _PREFIX_BYTES + length].tobytes())
        part: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.pop("part").items()
        }
        header = GroupHeader(**fields, part=Part(**part))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise GroupError("checksum") from None
    return header, -(-(_PREFIX_BYTES + length) // ALIGNMENT) * ALIGNMENT


def _convert(
    header: GroupHeader, block_B: Bytes, row_B: Bytes, layout: KvLayout, part: Part
) -> None:
    """Write what is in both the group's part and `part` into the block of a worker that has the
    latter. What else is in it stays."""
    layers = _overlap(header.part.layers, part.layers)
    heads = _overlap(header.part.heads, part.heads)
    if not layers or not heads:
        return
    from_layers, to_layers = _slices(layers, header.part.layers, part.layers)
    from_heads, to_heads = _slices(heads, header.part.heads, part.heads)
    source = header.layout()
    shape = (source.layers, source.kv_heads, source.page, source.head_dim)
    canonical_LGTE = np.empty(shape, dtype=_element(layout.dtype))
    for kind in (0, 1):
        for strip in _strips(block_B, source, kind):
            target = canonical_LGTE[:, :, strip.first :: strip.step]
            target.view(strip.view.dtype)[...] = strip.view
        wanted_LGTE = canonical_LGTE[from_layers, from_heads]
        for strip in _strips(row_B, layout, kind):
            found = wanted_LGTE[:, :, strip.first :: strip.step]
            strip.view[to_layers, to_heads] = found.view(strip.view.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Strip:
    """Every `step`-th position of a block, from `first` on: a view [layers, heads, positions, a
    position's elements in order]. Writing to it writes to the block. Elements that stay together
    are one word: a loop over pairs took ten times as long."""

    first: int
    step: int
    view: NDArray[Any]


def _strips(block_B: Bytes, layout: KvLayout, kind: int) -> list[_Strip]:
    """K (kind 0) or V of a block, in as few views as its packing allows."""
    size, width = layout.page, layout.head_dim
    pages = block_B.view(_element(layout.dtype))
    outer = (layout.layers, layout.kv_heads)
    one = pages.reshape(layout.layers, 2, layout.kv_heads, size * width)[:, kind]
    if layout.packing == "plain":
        return [_Strip(first=0, step=1, view=_split(one, (*outer, size, width)))]
    if kind == 0:
        words = _split(one.view(_PAIR[one.dtype.itemsize]), (*outer, width // 2, size))
        return [_Strip(first=0, step=1, view=words.transpose(0, 1, 3, 2))]
    pairs = _split(one, (*outer, size // 2, width, 2))
    return [_Strip(first=odd, step=2, view=pairs[..., odd]) for odd in (0, 1)]


def _split(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """`reshape` that is never a copy: the last axis becomes several."""
    view = array.view()
    view.shape = shape
    return view


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> range:
    return range(max(one[0], other[0]), min(one[1], other[1]))


def _slices(common: range, source: tuple[int, int], target: tuple[int, int]) -> tuple[slice, slice]:
    """Where a common run lies in each of two."""
    return (
        slice(common.start - source[0], common.stop - source[0]),
        slice(common.start - target[0], common.stop - target[0]),
    )


def _element(dtype: str) -> np.dtype[Any]:
    """Bits are copied, never numbers: bfloat16 has no numpy type, and NaNs stay what they are."""
    return np.dtype({"bfloat16": np.uint16, "float32": np.uint32}[dtype])


def _checksum(group: Bytes) -> int:
    """Of all but the checksum itself."""
    return crc32(group[_PREFIX_BYTES:].data, crc32(group[:4].data))
