"""What must hold of an engine whenever nobody is in the middle of a verb."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fabric.core.engine.sequence import Sequence

if TYPE_CHECKING:
    from fabric.core.engine.engine import Engine


def audit(engine: Engine) -> None:
    """Every block and every sequence is where exactly one thing says it is. O(everything)."""
    running, waiting = engine._scheduler.running, engine._scheduler.waiting
    running.check()
    waiting.check()
    engine._handovers.check()
    leaving = [holder for parted in engine._leaving.values() for holder in parted]
    queued = [*running.items, *waiting.items]
    expected = list(engine._handovers.expected.values())
    engine._scheduler.pool.check(
        [
            *(holder.blocks for holder in (*queued, *leaving, *expected)),
            *(one.landed for one in (*queued, *leaving) if isinstance(one, Sequence)),
        ],
        [holder.host_blocks for holder in (*queued, *leaving)],
    )
    queued += engine._handovers.parked()
    holders = [*queued, *(one for one in leaving if isinstance(one, Sequence))]
    live = [sequence for group in engine._groups.values() for sequence in group.live.values()]
    assert {id(s) for s in live} == {id(s) for s in queued}, "live choices are queued"
    assert len(live) == len(queued), "each in one queue"
    assert len(running) <= engine._scheduler.places, "no more run than there are places"
    assert all(sequence.running for sequence in running.items), "running, not marked"
    assert not any(sequence.running for sequence in waiting.items), "marked, not running"
    assert all(not sequence.blocks for sequence in waiting.items), "waiting holds no block"
    assert all(not sequence.host_blocks for sequence in running.items), "running is not swapped"
    assert all(sequence.finish is None for sequence in queued), "an ended choice is queued"
    for sequence in queued:
        sequence.check(engine.config.block_size)
    flying = {id(s) for flight in engine._flights for s in flight.sequences}
    assert flying == {id(s) for s in holders if s.in_flight}, "in flight is in one plan"
    assert all(plan_id > engine._committed for plan_id in engine._leaving), "released too late"
    assert engine._handovers.exports.keys() <= engine._groups.keys(), "an export of nobody"
    for group in engine._groups.values():
        assert group.live and (not group.unborn or group.primary in group.live), "no primary"
