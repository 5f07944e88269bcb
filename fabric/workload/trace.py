"""Traces: who came when, how long prompt and output were. Read line by line, whatever the file.

| format | file | columns or keys |
|---|---|---|
| Azure LLM inference 2023, 2024 | CSV | TIMESTAMP, ContextTokens, GeneratedTokens |
| BurstGPT | CSV | Timestamp (s), Request tokens, Response tokens |
| Mooncake | JSONL | timestamp (ms), input_length, output_length, hash_ids |
| LLMServingSim | JSONL | arrival_time_ns, input_toks, output_toks |
| our own | JSONL | arrival_s, prompt_tokens, output_tokens; if wanted tier, tenant, hash_ids |

Which one it is, the first line tells. Columns go by their names, so their order may differ; lines
that begin with # are comments. What is wrong is a `ValueError` that names file and line.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SECOND_NS = 1_000_000_000
MS_NS = 1_000_000
HASH_BLOCK = 512  # tokens that one of Mooncake's ids stands for
LINE_CHARACTERS_MAX = 1 << 20
TOKENS_MAX = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One request of a trace. `at`: ns after the trace's first. Lengths in tokens.

    `hash_ids`: one for each `HASH_BLOCK` tokens of the prompt, the last one not full; requests that
    share the first ids share a prefix. Empty: the trace doesn't say. `tier` empty: as replayed.
    """

    at: int
    prompt: int
    output: int
    hash_ids: tuple[int, ...] = ()
    tier: str = ""
    tenant: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFormat:
    """`fields`: which columns or keys make it this format. `parse`: a row of them -> an `Entry`
    whose `at` is not counted from the first yet; None: a request that failed in the trace."""

    name: str
    fields: tuple[str, ...]
    parse: Callable[[Mapping[str, Any]], Entry | None]


def _azure(row: Mapping[str, Any]) -> Entry:
    when = datetime.fromisoformat(row["TIMESTAMP"])
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    micros = round((when - EPOCH).total_seconds() * 1e6)
    return Entry(
        at=micros * 1000,
        prompt=_count(row, "ContextTokens"),
        output=_count(row, "GeneratedTokens"),
    )


def _burst_gpt(row: Mapping[str, Any]) -> Entry | None:
    output = _count(row, "Response tokens", least=0)
    if not output:  # the data set's way to say that the service failed
        return None
    at = round(float(row["Timestamp"]) * SECOND_NS)
    return Entry(at=at, prompt=_count(row, "Request tokens"), output=output)


def _mooncake(row: Mapping[str, Any]) -> Entry:
    return Entry(
        at=round(_number(row, "timestamp") * MS_NS),
        prompt=(prompt := _count(row, "input_length")),
        output=_count(row, "output_length"),
        hash_ids=_hash_ids(row, prompt),
    )


def _serving_sim(row: Mapping[str, Any]) -> Entry:
    return Entry(
        at=_count(row, "arrival_time_ns", least=0, most=1 << 62),
        prompt=_count(row, "input_toks"),
        output=_count(row, "output_toks"),
    )


def _own(row: Mapping[str, Any]) -> Entry:
    return Entry(
        at=round(_number(row, "arrival_s") * SECOND_NS),
        prompt=(prompt := _count(row, "prompt_tokens")),
        output=_count(row, "output_tokens"),
        hash_ids=_hash_ids(row, prompt) if "hash_ids" in row else (),
        tier=_word(row, "tier"),
        tenant=_word(row, "tenant"),
    )


EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
CSV_FORMATS = (
    TraceFormat(
        name="Azure",
        fields=("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
        parse=_azure,
    ),
    TraceFormat(
        name="BurstGPT",
        fields=("Timestamp", "Request tokens", "Response tokens"),
        parse=_burst_gpt,
    ),
)
JSONL_FORMATS = (
    TraceFormat(
        name="Mooncake",
        fields=("timestamp", "input_length", "output_length", "hash_ids"),
        parse=_mooncake,
    ),
    TraceFormat(
        name="LLMServingSim",
        fields=("arrival_time_ns", "input_toks", "output_toks"),
        parse=_serving_sim,
    ),
    TraceFormat(
        name="fabric",
        fields=("arrival_s", "prompt_tokens", "output_tokens"),
        parse=_own,
    ),
)


def read_trace(path: Path, limit: int | None = None) -> Iterator[Entry]:
    """Entries in order of time, lazily, at most `limit`. Raises `ValueError` and `OSError`."""
    began: int | None = None
    last, count = 0, 0
    if limit == 0:
        return
    for number, entry in _entries(path):
        began = entry.at if began is None else began
        at = entry.at - began
        if at < last:
            raise ValueError(f"{path}:{number}: earlier than the request before it")
        last = at
        yield Entry(
            at=at,
            prompt=entry.prompt,
            output=entry.output,
            hash_ids=entry.hash_ids,
            tier=entry.tier,
            tenant=entry.tenant,
        )
        count += 1
        if count == limit:
            return
    if not count:
        raise ValueError(f"{path}: a trace without requests")


def _entries(path: Path) -> Iterator[tuple[int, Entry]]:
    kind: TraceFormat | None = None
    columns: list[str] | None = None
    for number, text in _lines(path):
        try:
            if columns is None and not text.startswith("{"):
                columns = [name.strip() for name in _cells(text)]
                kind = _recognise(columns, CSV_FORMATS)
                continue
            row = json.loads(text) if columns is None else _row(columns, text)
            if not isinstance(row, dict):
                raise ValueError("a line must hold one JSON object")
            kind = kind or _recognise(list(row), JSONL_FORMATS)
            entry = kind.parse(row)
        except KeyError as error:
            raise ValueError(f"{path}:{number}: no {error.args[0]!r}") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        if entry is not None:
            yield number, entry


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of all but comments and empty ones."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        number = 0
        while text := file.readline(LINE_CHARACTERS_MAX):
            number += 1
            if len(text) == LINE_CHARACTERS_MAX:
                raise ValueError(f"{path}:{number}: longer than {LINE_CHARACTERS_MAX} characters")
            text = text.strip()
            if text and not text.startswith("#"):
                yield number, text


def _cells(text: str) -> list[str]:
    return next(csv.reader([text]))


def _row(columns: list[str], text: str) -> dict[str, str]:
    cells = _cells(text)
    if len(cells) != len(columns):
        raise ValueError(f"{len(cells)} cells under {len(columns)} columns")
    return dict(zip(columns, cells, strict=True))


def _recognise(names: list[str], formats: tuple[TraceFormat, ...]) -> TraceFormat:
    for one in formats:
        if all(name in names for name in one.fields):
            return one
    known = "; ".join(f"{one.name} has {', '.join(one.fields)}" for one in formats)
    raise ValueError(f"no trace that we know: {known}")


def _count(row: Mapping[str, Any], name: str, least: int = 1, most: int = TOKENS_MAX) -> int:
    value = row[name]
    found = float(value) if isinstance(value, str) else value
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ValueError(f"{name} must be a number, not {value!r}")
    if not math.isfinite(found) or found != int(found):
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    if not least <= found <= most:
        raise ValueError(f"{name} must be {least} to {most}, not {value}")
    return int(found)


def _number(row: Mapping[str, Any], name: str) -> float:
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e15:
        raise ValueError(f"{name} must be a number of at least 0, not {value!r}")
    return value


def _word(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name, "")
    if not isinstance(value, str) or len(value) > 64:
        raise ValueError(f"{name} must be a short string, not {value!r}")
    return value


def _hash_ids(row: Mapping[str, Any], prompt: int) -> tuple[int, ...]:
    ids = row["hash_ids"]
    if not isinstance(ids, list) or any(type(one) is not int for one in ids):
        raise ValueError("hash_ids must be a list of whole numbers")
    needed = -(-prompt // HASH_BLOCK)
    if len(ids) != needed:
        raise ValueError(
            f"{len(ids)} hash_ids of {HASH_BLOCK} tokens each, and a prompt of {prompt} needs "
            f"{needed}"
        )
    return tuple(ids)
