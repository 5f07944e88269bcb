"""State as plain data, and back: what a journal's files begin with, and what verbs take and give.

    atom          int, float, str, bytes, bool, None: itself
    ("t", items)  a tuple          ("v", class, fields)              a frozen record, by value
    ("s", kind, items)  a set, sorted          ("e", class, value)   an enum
    ("l", n, items)  a list        ("o", n, class, (name, value...)) a machine, or a part of one
    ("d", n, class, (key, value...))   a dict in its order       ("q", n, maxlen, items)   a deque
    ("r", n)      what was numbered `n` before: things that change keep who shares them
    ("b", bytes)  a hash that `sealed` leaves as it is
    ("h", kind, length)   token ids that are not shown; they come back as `HIDDEN_TOKEN`s

The same state gives the same data, so two states are equal iff their data are.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from enum import Enum
from operator import attrgetter
from typing import Any

from fabric.core.prefix import Hasher
from fabric.core.request import TokenLogprobs

HIDDEN_TOKEN = -1
ATOMS = frozenset((int, float, str, bytes, bool, type(None)))
DICTS = (dict, OrderedDict, Counter)
# Attributes that hold token ids, wherever they are; in `EMPTIED` ones not even their number counts.
HIDDEN = frozenset(("tokens", "prompt", "generated"))
EMPTIED = frozenset(("logit_bias",))
# Hashes of what is no secret.
OPEN = frozenset(("root", "salt"))
NO_LOGPROBS = TokenLogprobs(token=HIDDEN_TOKEN, logprob=0.0, rank=1)

Plain = Any
Resolve = Callable[[str], type]


def name_of(kind: type) -> str:
    """As `thaw` will ask for it: module:Class."""
    return f"{kind.__module__}:{kind.__qualname__}"


class _Shape:
    """What is known of a class of records: its name, a getter of all fields, the odd ones."""

    __slots__ = ("emptied", "get", "hidden", "name", "open")

    def __init__(self, kind: type) -> None:
        names = [one.name for one in fields(kind)]
        self.name = name_of(kind)
        self.get: Callable[[Any], tuple[Any, ...]] = lambda value: tuple(
            [getattr(value, name) for name in names]
        )
        if len(names) > 1:  # of one it would not make a tuple
            self.get = attrgetter(*names)
        self.hidden = [index for index, name in enumerate(names) if name in HIDDEN]
        self.emptied = [index for index, name in enumerate(names) if name in EMPTIED]
        self.open = [index for index, name in enumerate(names) if name in OPEN]


class Freezer:
    """Makes plain data. `hide`: token ids are replaced by how many there are.

    One for each tree of things that change; records alone may go through the same one for ever.
    """

    def __init__(self, *, hide: bool) -> None:
        self.hide = hide
        self._numbers: dict[int, int] = {}
        self._kept: list[object] = []  # an id is free again once its object is gone
        self._shapes: dict[type, _Shape] = {}

    def freeze(self, value: Any, hidden: bool = False) -> Plain:
        """`ValueError`: it holds something that is no state, such as a function."""
        kind = type(value)
        if kind in ATOMS:
            return value
        if kind is tuple:
            if hidden and _is_flat(value):
                return ("h", "t", len(value))
            return ("t", self._items(value, hidden))
        if isinstance(value, Enum):
            return ("e", name_of(kind), value.value)
        if is_dataclass(kind) and kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            return self._record(kind, value)
        if kind in (frozenset, set):
            return ("s", kind.__name__, sorted(value))
        if kind is list and hidden and _is_flat(value):
            return ("h", "l", len(value))
        number = self._numbers.get(id(value))
        if number is not None:
            return ("r", number)
        number = self._numbers[id(value)] = len(self._numbers)
        self._kept.append(value)
        if kind is list:
            return ("l", number, self._items(value, hidden))
        if kind is deque:
            return ("q", number, value.maxlen, self._items(value, hidden))
        if kind in DICTS:
            flat = [part for pair in value.items() for part in pair]
            return ("d", number, kind.__name__, self._items(flat, hidden))
        if isinstance(value, Hasher):  # how hashes are come by is no state
            return ("o", number, name_of(Hasher), [])
        return ("o", number, name_of(kind), self._attributes(value))

    def forget(self) -> None:
        """The next thing has nothing to do with those before."""
        if self._kept:
            self._numbers.clear()
            self._kept.clear()

    def _items(self, values: Iterable[Any], hidden: bool) -> list[Plain]:
        found = list(values)
        if ATOMS.issuperset(map(type, found)):
            return found
        freeze = self.freeze
        return [freeze(value, hidden) for value in found]

    def _record(self, kind: type, value: Any) -> Plain:
        shape = self._shapes.get(kind)
        if shape is None:
            shape = self._shapes[kind] = _Shape(kind)
        if not self.hide:
            return ("v", shape.name, self._items(shape.get(value), False))
        if kind is TokenLogprobs:
            value = NO_LOGPROBS
        values = list(shape.get(value))
        for index in shape.emptied:
            values[index] = ()
        for index in shape.hidden:
            values[index] = self.freeze(values[index], True)
            if type(values[index]) is tuple:
                values[index] = _Frozen(values[index])
        for index in shape.open:
            values[index] = _Frozen(("b", values[index]))
        return ("v", shape.name, [self._thing(one) for one in values])

    def _thing(self, value: Any) -> Plain:
        return value.data if type(value) is _Frozen else self.freeze(value)

    def _attributes(self, value: Any) -> list[Plain]:
        kind = type(value)
        if not kind.__module__.startswith("fabric.core."):
            raise ValueError(f"{kind.__module__}.{kind.__qualname__} is no state of the core")
        found: list[Plain] = []
        for name in _names(value):
            try:
                part = getattr(value, name)
            except AttributeError:  # a slot that is not set (yet)
                continue
            if name in OPEN and type(part) is bytes:
                found += (name, ("b", part))
            else:
                found += (name, self.freeze(part, self.hide and name in HIDDEN))
        return found


class _Frozen:
    """Plain data among values that are not."""

    __slots__ = ("data",)

    def __init__(self, data: Plain) -> None:
        self.data = data


class Thawer:
    """The inverse of `Freezer`, for one tree. `resolve` finds a class by its name; `hasher` is put
    wherever one was."""

    def __init__(self, resolve: Resolve, hasher: Hasher) -> None:
        self._resolve = resolve
        self._hasher = hasher
        self._numbered: dict[int, Any] = {}

    def thaw(self, data: Plain) -> Any:
        """`ValueError`: this is not what a `Freezer` makes."""
        if type(data) is not tuple:
            return data
        tag = data[0]
        if tag == "t":
            return tuple(map(self.thaw, data[1]))
        if tag == "v":
            return self._record(data[1], data[2])
        if tag == "e":
            return self._resolve(data[1])(data[2])
        if tag == "s":
            return (set if data[1] == "set" else frozenset)(data[2])
        if tag == "h":
            tokens = (HIDDEN_TOKEN,) * data[2]
            return tokens if data[1] == "t" else list(tokens)
        if tag == "b":
            return data[1]
        if tag == "r":
            return self._numbered[data[1]]
        return self._changing(tag, data)

    def _record(self, name: str, values: list[Plain]) -> Any:
        kind = self._resolve(name)
        names = [one.name for one in fields(kind)]
        value: Any = object.__new__(kind)
        for field, part in zip(names, values, strict=True):
            object.__setattr__(value, field, self.thaw(part))
        return value

    def _changing(self, tag: str, data: Plain) -> Any:
        """It is known by its number before what it holds is made: that may refer to it."""
        number = data[1]
        if tag == "l":
            items: list[Any] = []
            self._numbered[number] = items
            items.extend(map(self.thaw, data[2]))
            return items
        if tag == "q":
            queue: deque[Any] = deque(maxlen=data[2])
            self._numbered[number] = queue
            queue.extend(map(self.thaw, data[3]))
            return queue
        if tag == "d":
            made: dict[Any, Any] = next(kind for kind in DICTS if kind.__name__ == data[2])()
            self._numbered[number] = made
            parts = [self.thaw(part) for part in data[3]]
            for key, value in zip(parts[::2], parts[1::2], strict=True):
                made[key] = value
            return made
        if tag != "o":
            raise ValueError(f"no such thing: {tag!r}")
        kind = self._resolve(data[2])
        machine: Any = self._hasher if issubclass(kind, Hasher) else object.__new__(kind)
        self._numbered[number] = machine
        for name, part in zip(data[3][::2], data[3][1::2], strict=True):
            object.__setattr__(machine, name, self.thaw(part))
        return machine


def sealed(data: Plain, seal: Callable[[bytes], bytes]) -> Plain:
    """The same with all `bytes` sealed: they are hashes of tokens."""
    if type(data) is bytes:
        return seal(data)
    if type(data) is tuple and data[:1] != ("b",):
        return tuple([sealed(part, seal) for part in data])
    if type(data) is list:
        return [sealed(part, seal) for part in data]
    return data


def _is_flat(values: Iterable[Any]) -> bool:
    return all(type(one) is int for one in values)


def _names(value: Any) -> list[str]:
    """Of its attributes: slots of all its classes, then what else it was given."""
    kinds = reversed(type(value).__mro__)
    names = [slot for kind in kinds for slot in getattr(kind, "__slots__", ())]
    return [*names, *getattr(value, "__dict__", {})]
