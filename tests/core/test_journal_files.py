"""Journals as files: rotated, cut short, damaged, full; and the command that replays them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from kit.journalled import busy_engine
from kit.planting import constant, planted
from kit.scripted_worker import ScriptedWorker

from fabric.cli import main
from fabric.core.configs import EngineConfig
from fabric.core.engine.engine import Engine
from fabric.core.engine.handover import Landing, arrival_of
from fabric.core.engine.scheduler import Scheduler
from fabric.core.journal import Recorder
from fabric.core.request import Request, SamplingParams
from fabric.journal import writer as writer_module
from fabric.journal.format import (
    STATE,
    Header,
    JournalError,
    JournalFile,
    first_bytes,
    frame,
    resolve,
)
from fabric.journal.reader import journals, play, replay_of
from fabric.journal.writer import Place, Writer

STEPS = 150


@pytest.fixture(autouse=True)
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many of them in a short recording."""
    monkeypatch.setattr(writer_module, "FRAME_ENTRIES", 40)


def record(folder: Path, *, steps: int = STEPS, first_token: int = 1, **place: object) -> Writer:
    """A journal of a busy engine."""
    chosen = replace(
        Place(folder=folder, stream="engine", name="r0", run="now"),
        **place,  # type: ignore[arg-type]
    )
    writer = Writer(chosen, background=False)
    engine = busy_engine(Recorder(writer, hide=chosen.hide), steps, first_token)
    assert engine.snapshot("r0", 0).preemptions_total > 3, "no preemptions: too much room"
    writer.close()
    return writer


def differences(folder: Path) -> list[str]:
    """Where replays of all journals differ."""
    found = []
    for journal in journals([folder]):
        for step in play(journal, replay_of(journal)):
            if step.difference is not None:
                found.append(step.difference.where)
    return found


@pytest.mark.parametrize("place", [{}, {"hide": False}, {"keyed": False}], ids=str)
def test_rotation_loses_nothing(tmp_path: Path, place: dict[str, object]) -> None:
    record(tmp_path, file_bytes=3_000, files=100, **place)
    files = sorted(tmp_path.iterdir())
    assert len(files) > 3, "never rotated"
    assert not differences(tmp_path)
    for file in files[1:]:  # each can be replayed without those before it
        assert not differences_of(file)


def differences_of(file: Path) -> list[str]:
    (journal,) = journals([file])
    return [step.difference.where for step in play(journal, replay_of(journal)) if step.difference]


def test_only_so_many_files_are_kept(tmp_path: Path) -> None:
    record(tmp_path, file_bytes=3_000, files=2)
    assert len(list(tmp_path.iterdir())) == 2
    assert not differences(tmp_path)


def test_a_state_that_does_not_follow_is_seen(tmp_path: Path) -> None:
    """A rule that changes no decision but a number that decides later."""
    record(tmp_path, file_bytes=3_000, files=100)
    assert "state" in set(verbs_that_differ(tmp_path))


def verbs_that_differ(folder: Path) -> list[str]:
    with planted(Engine, "_publish", constant(None)):
        return [
            step.difference.verb
            for journal in journals([folder])
            for step in play(journal, replay_of(journal))
            if step.difference
        ]


def test_what_a_killed_process_leaves_replays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for cut in (1, 10, 1000):
        file.write_bytes(whole[:-cut])
        assert main(["replay", str(tmp_path)]) == 0
        assert "cut short" in capsys.readouterr().out


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9, 0.999])
def test_a_flipped_bit_is_named(
    tmp_path: Path, part: float, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path)
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    data[int(len(data) * part)] ^= 4
    file.write_bytes(data)
    assert main(["replay", str(file)]) == 1
    error = capsys.readouterr().err
    assert "damaged" in error and "byte" in error


def test_every_flipped_byte_of_a_frames_head_is_damage(tmp_path: Path) -> None:
    record(tmp_path)
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    begin = data.index(b"}\n") + 2
    for at in range(begin, begin + 12):
        damaged = bytearray(data)
        damaged[at] ^= 255
        file.write_bytes(damaged)
        with pytest.raises(JournalError, match="damaged"):
            list(JournalFile(file).entries())


def test_a_changed_rule_is_one_message_and_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path)
    assert main(["replay", str(tmp_path)]) == 0
    assert "every outcome is the same" in capsys.readouterr().out
    with planted(Scheduler, "_swap_is_cheaper", constant(False)):
        assert main(["replay", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "engine.schedule: " in said and "differs" in said
    assert "recorded: " in said and "replayed: " in said and "verb " in said


def test_a_full_buffer_is_no_silent_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(writer_module, "BUFFERED", 60)
    place = Place(folder=tmp_path, stream="engine", name="r0", run="now")
    writer = Writer(place)  # in the background, five times a second: much too slow for this
    recorder = Recorder(writer)
    busy_engine(recorder, 200)
    assert writer.dropped > 100
    writer.flush()
    busy_engine(recorder, 10)
    writer.close()
    assert main(["replay", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "were dropped" in said


def test_a_disk_that_is_full_ends_the_journal_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(folder=tmp_path, stream="engine", name="r0", run="now")
    writer = Writer(place, background=False)

    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_write", full)
    busy_engine(Recorder(writer), STEPS)
    assert writer.problem is not None and "No space" in writer.problem
    assert writer.dropped > 0 and not writer.fresh


@pytest.mark.parametrize("hide", [True, False])
def test_tokens_are_written_only_where_asked_for(tmp_path: Path, hide: bool) -> None:
    first = 7_654_321
    record(tmp_path, hide=hide, first_token=first)
    written = {
        number
        for file in tmp_path.iterdir()
        for _, entry in JournalFile(file).entries()
        for number in numbers(entry)
    }
    assert (written & set(range(first, first + 4)) == set()) == hide


def numbers(data: object) -> list[int]:
    if isinstance(data, tuple | list):
        return [number for part in data for number in numbers(part)]
    return [data] if type(data) is int else []


def test_without_room_no_state_is_made(tmp_path: Path) -> None:
    """States of machines are large; while there is no room for them, nobody makes any."""
    writer = Writer(Place(folder=tmp_path, stream="engine", name="r0", run="now"))
    recorder = Recorder(writer)
    engine = recorder.watch("engine", Engine(EngineConfig(num_blocks=8)))
    recorder._freeze = lambda _: pytest.fail("a state was made")  # type: ignore[method-assign]
    writer.put = lambda _: setattr(writer, "fresh", True)  # type: ignore[method-assign]
    writer.fresh = True
    engine.schedule(0)
    assert writer.fresh, "it begins anew when there is room"


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    record(tmp_path / "journals", hide=False)
    for path in (tmp_path / "journals", *(tmp_path / "journals").iterdir()):
        assert path.stat().st_mode & 0o077 == 0


def test_records_of_another_version_are_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = Header(
        stream="engine", name="r", run="1", index=0, tokens="hashed", code="old", python="3.11"
    )
    config = ("v", "fabric.core.configs:EngineConfig", [1, 2])
    state = ("o", 0, "fabric.core.engine.engine:Engine", ["config", config])
    file = tmp_path / "engine.r.1.000000.journal"
    file.write_bytes(first_bytes(header) + frame([(STATE, "engine", state)]))
    assert main(["replay", str(file)]) == 1
    said = capsys.readouterr().err
    assert "this version can't read it" in said and "recorded by code old" in said


def test_a_leg_that_waits_for_its_kv_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes on after a loss, under the name that it has then; its time is the clock's, not the
    attempt's number."""
    place = Place(folder=tmp_path, stream="engine", name="d", run="now")
    writer = Writer(place, background=False)
    engine = Recorder(writer).watch("engine", Engine(EngineConfig(num_blocks=64)))
    sampling = SamplingParams(max_tokens=8)
    leg = Request(request_id="abc+1", prompt=tuple(range(1, 40)), sampling=sampling, arrival=0)
    assert engine.reserve(leg, 1)
    engine.add(replace(leg, generated=((5,),)), 10**9)
    engine.add(replace(leg, request_id="other"), 10**9)
    assert engine.schedule(3 * 10**9) is not None
    writer.close()
    assert main(["explain", "abc", "--journal", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "0 run in 64 places, 0 wait" in said
    assert "its prompt's KV is on its way from another replica" in said
    assert main(["replay", str(tmp_path)]) == 0
    assert "over 2.0 s" in capsys.readouterr().out


def test_loans_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hashes travel from engine to engine, so all are sealed alike; salts are no secret."""
    writer = Writer(Place(folder=tmp_path, stream="engine", name="d", run="now"), background=False)
    recorder, config = Recorder(writer), EngineConfig(num_blocks=64, kv_token_bytes=2)
    workers = ScriptedWorker(config), ScriptedWorker(config)
    holder, borrower = (recorder.watch(name, Engine(config)) for name in ("holder", "borrower"))

    def run(engine: Engine, worker: ScriptedWorker) -> None:
        while (plan := engine.schedule(0)) is not None:
            engine.commit(plan, worker.execute(plan), 0)

    one = Request(
        request_id="r",
        prompt=tuple(range(40)),
        sampling=SamplingParams(max_tokens=2),
        arrival=0,
        tenant="somebody",
    )
    holder.add(one, 0)
    run(holder, workers[0])
    borrower.add(one, 0)
    wish = borrower.borrow("r", 40)
    assert wish is not None
    export = holder.lend(wish)
    run(holder, workers[0])
    assert export is not None
    for index in range(export.blocks):
        workers[1].staging[100 + index] = workers[0].staging.pop(export.slot + index)
    arrival = arrival_of(export, "r", 100)
    assert borrower.landed(arrival) is Landing.LANDED
    recorder.begin()
    run(borrower, workers[1])
    assert borrower.snapshot("", 0).prompt_tokens_total == 8
    writer.close()
    assert differences(tmp_path) == []
    assert not any(wish.digests[0] in file.read_bytes() for file in tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["os:system", "fabric.cli:main", "fabric.core.prefix:chain", "fabric.core.nothing:A"]
)
def test_a_journal_can_name_classes_of_the_core_only(name: str) -> None:
    with pytest.raises(JournalError):
        resolve(name)


def test_what_is_no_journal_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.journal"
    file.write_bytes(b"something else\n")
    for path in (file, tmp_path / "empty", tmp_path / "missing.journal"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert main(["replay", str(path)]) == 1
        assert capsys.readouterr().err.startswith("fabric replay: ")
