"""Records made as their twins are records like any other."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest

from fabric.core.engine.plan import SequenceStep
from fabric.core.quick import halves, quick
from fabric.core.request import TokenChunk
from fabric.core.snapshot import ReplicaSnapshot


@pytest.mark.parametrize("kind", [SequenceStep, TokenChunk, ReplicaSnapshot])
def test_a_quick_record_is_the_record(kind: type) -> None:
    values = {one.name: number for number, one in enumerate(fields(kind))}
    made = quick(kind)(**values)
    assert made == kind(**values) and type(made) is kind
    assert hash(made) == hash(kind(**values)) and repr(made) == repr(kind(**values))
    with pytest.raises(FrozenInstanceError):
        setattr(made, fields(kind)[0].name, 1)
    with pytest.raises(TypeError):
        quick(kind)(**dict(list(values.items())[1:]))


@pytest.mark.parametrize("kind", [SequenceStep, TokenChunk])
def test_a_record_made_in_halves_is_the_record(kind: type) -> None:
    values = {one.name: number for number, one in enumerate(fields(kind))}
    blank, fill = halves(kind)
    made = blank()
    fill(made, **values)
    made.__class__ = kind
    assert made == kind(**values) and hash(made) == hash(kind(**values))
    with pytest.raises(FrozenInstanceError):
        setattr(made, fields(kind)[0].name, 1)
    with pytest.raises(TypeError):
        fill(blank(), **dict(list(values.items())[1:]))
