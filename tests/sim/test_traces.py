"""Traces: five formats read, each fault named with file and line, replayed at another pace."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from fabric.workload.replay import Replay, replay
from fabric.workload.trace import Entry, read_trace

DATA = Path(__file__).parent.parent / "data"
AZURE = DATA / "azure2023_conv_300.csv"
MS, SECOND = 1_000_000, 1_000_000_000

FORMATS = {
    "azure": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:47.1805900,5,6\n"
    ),
    "azure with zones": (
        "GeneratedTokens,TIMESTAMP,ContextTokens\n"
        "44,2024-05-10 00:00:00.000000+00:00,374\n6,2024-05-10 00:00:00.500000+00:00,5\n"
    ),
    "burst gpt": (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,374,44,418,Conversation log\n5.2,GPT-4,10,0,10,API log\n"
        "5.5,GPT-4,5,6,11,API log\n"
    ),
    "serving sim": (
        '{"input_toks": 374, "output_toks": 44, "arrival_time_ns": 1000}\n'
        '{"input_toks": 5, "output_toks": 6, "arrival_time_ns": 500001000}\n'
    ),
    "own": (
        '{"arrival_s": 1, "prompt_tokens": 374, "output_tokens": 44}\n# a comment\n\n'
        '{"arrival_s": 1.5, "prompt_tokens": 5, "output_tokens": 6}\n'
    ),
    "mooncake": (
        '{"timestamp": 0, "input_length": 374, "output_length": 44, "hash_ids": [0]}\n'
        '{"timestamp": 500, "input_length": 5, "output_length": 6, "hash_ids": [1]}\n'
    ),
}


def write(folder: Path, text: str) -> Path:
    path = folder / "trace"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_says_the_same(name: str, tmp_path: Path) -> None:
    found = [(one.at, one.prompt, one.output) for one in read_trace(write(tmp_path, FORMATS[name]))]
    assert found == [(0, 374, 44), (500 * MS, 5, 6)]


def test_a_sample_of_azures_trace() -> None:
    entries = list(read_trace(AZURE))
    assert len(entries) == 300
    assert entries[0] == Entry(at=0, prompt=374, output=44)
    assert entries[1].at == pytest.approx(4_314_579_000, abs=1000)
    assert len(list(read_trace(AZURE, 7))) == 7


def test_our_own_says_who_asks(tmp_path: Path) -> None:
    text = (
        '{"arrival_s": 0, "prompt_tokens": 600, "output_tokens": 1, "tier": "batch", '
        '"tenant": "acme", "hash_ids": [3, 4]}'
    )
    (entry,) = read_trace(write(tmp_path, text))
    assert (entry.tier, entry.tenant, entry.hash_ids) == ("batch", "acme", (3, 4))


MOONCAKE = '{"timestamp": %s, "input_length": %s, "output_length": 9, "hash_ids": %s}\n'


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (MOONCAKE % (0, 600, "[1]"), 1, "1 hash_ids of 512 tokens each"),
        (MOONCAKE % (0, 512, "[1, 2]"), 1, "needs 1"),
        (MOONCAKE % (0, 512, '["a"]'), 1, "whole numbers"),
        (MOONCAKE % (9, 5, "[1]") + MOONCAKE % (8, 5, "[1]"), 2, "earlier"),
        (MOONCAKE % (-1, 5, "[1]"), 1, "timestamp"),
        (MOONCAKE % (0, 0, "[]"), 1, "input_length must be 1 to"),
        (MOONCAKE % (0, 5, "[1]") + '{"timestamp": 1}\n', 2, "no 'input_length'"),
        ("[1, 2]\n", 1, "no trace that we know"),
        ('{"a": 1}\n', 1, "no trace that we know"),
        ("a,b\n1,2\n", 1, "Azure has TIMESTAMP"),
        (FORMATS["azure"] + "2023-11-16 18:16,7\n", 4, "2 cells under 3 columns"),
        (FORMATS["azure"] + "yesterday,7,7\n", 4, "yesterday"),
        (FORMATS["azure"] + "2023-11-16 18:16,7.5,7\n", 4, "whole number"),
        (FORMATS["azure"] + "2023-11-16 18:16,1e999,7\n", 4, "whole number"),
        (FORMATS["azure"] + "2023-11-16 18:16,9999999,7\n", 4, "ContextTokens must be"),
        (FORMATS["own"] + '{"arrival_s": NaN, "prompt_tokens": 5, "output_tokens": 6}', 5, "arr"),
        (FORMATS["own"] + "{broken\n", 5, "Expecting"),
    ],
)
def test_what_is_wrong_is_named(text: str, line: int, words: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match="trace") as caught:
        list(read_trace(path))
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert words in str(caught.value)


def test_a_trace_without_requests_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without requests"):
        list(read_trace(write(tmp_path, "# nothing\n")))


def test_a_line_without_end_is_not_read_whole(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="longer than"):
        list(read_trace(write(tmp_path, "{" + " " * (1 << 21))))


def test_a_replay_keeps_what_the_trace_says() -> None:
    found, entries = list(replay(AZURE, Replay())), list(read_trace(AZURE))
    assert [len(one.prompt) for one in found] == [one.prompt for one in entries]
    assert [one.sampling.max_tokens for one in found] == [one.output for one in entries]
    assert [one.arrival for one in found] == [one.at for one in entries]
    assert found == list(replay(AZURE, Replay()))
    assert len({one.prompt[:16] for one in found}) == 300, "prompts share what no trace says"


def test_a_replay_at_another_pace_and_size() -> None:
    entries = list(read_trace(AZURE))
    fast = list(replay(AZURE, Replay(speed=4.0, limit=50)))
    assert [one.arrival for one in fast] == [round(one.at / 4) for one in entries[:50]]
    rated = list(replay(AZURE, Replay(rate_per_s=2.0, skip=100, limit=101)))
    assert rated[0].arrival == 0
    assert rated[-1].arrival == pytest.approx(50 * SECOND, rel=1e-6)
    small = list(replay(AZURE, Replay(scale=0.1, tier="batch")))
    assert [len(one.prompt) for one in small] == [max(1, round(one.prompt / 10)) for one in entries]
    assert {one.tier for one in small} == {"batch"}
    assert all(a.arrival <= b.arrival for a, b in pairwise(small))


def test_prompts_with_equal_ids_share_their_begin_and_no_more(tmp_path: Path) -> None:
    text = MOONCAKE % (0, 1200, "[1, 2, 3]") + MOONCAKE % (1, 1400, "[1, 2, 9]")
    one, other = replay(write(tmp_path, text), Replay())
    assert (len(one.prompt), len(other.prompt)) == (1200, 1400)
    assert one.prompt[:1024] == other.prompt[:1024]
    assert one.prompt[1024:1040] != other.prompt[1024:1040]


@pytest.mark.parametrize(
    "wrong",
    [{"speed": 0.0}, {"rate_per_s": -1.0}, {"scale": 0.0}, {"limit": 0}, {"skip": -1}],
)
def test_an_impossible_replay_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be above 0|skip >= 0"):
        Replay(**wrong)  # type: ignore[arg-type]
