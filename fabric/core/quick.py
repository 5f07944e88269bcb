"""Frozen records at the price of plain ones, where a step makes one for each of its sequences.

A frozen dataclass sets each field through `object.__setattr__`, which takes five times as long as
plain slots do. So the record is made as its twin, a class of the same slots that is not frozen, and
then told what it is: two classes of equal slots have one layout, and Python lets an object change
between them. From then on it is frozen like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, make_dataclass
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


def halves(kind: type[Any]) -> tuple[Callable[[], Any], Callable[..., None]]:
    """What makes an empty twin, and what fills it: by keywords, with every field.

    Whoever makes most of all calls them, then says `made.__class__ = kind`: keywords that go
    straight to the function that wants them are not put into a dict, which is half the price.
    """
    twin = _twin(kind)
    return partial(object.__new__, twin), twin.__init__


def quick(kind: type[T]) -> Callable[..., T]:
    """What makes records of this kind, by keywords and with every field: defaults are not known."""
    twin = _twin(kind)

    def make(**values: Any) -> T:
        made = twin(**values)
        made.__class__ = kind
        record: T = made
        return record

    return make


def _twin(kind: type[Any]) -> Any:
    names = [(one.name, Any) for one in fields(kind)]
    return make_dataclass(kind.__name__, names, slots=True)
