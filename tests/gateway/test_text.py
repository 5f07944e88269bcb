"""From tokens to text: any tokens, cut anywhere, give the text of the whole."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.local_backend import served
from kit.stop_machine import LETTERS, STOPS, naive_stop

from fabric.core.errors import ModelError
from fabric.core.request import Finish, TokenChunk
from fabric.gateway.pieces import Pieces
from fabric.gateway.stops import StopAutomaton
from fabric.gateway.text import ChoiceText, TextRules
from fabric.gateway.tokenizer import Tokenizer

TOKENS = st.lists(st.integers(0, 360), max_size=40)
CUTS = st.lists(st.integers(1, 4), min_size=40, max_size=40)


def streamed(
    tokens: list[int],
    cuts: list[int],
    pieces: Pieces,
    rules: TextRules,
    *,
    stop_token: int | None = None,
    finish: Finish = Finish.LENGTH,
) -> tuple[list[str], ChoiceText]:
    """Push `tokens`, `cuts[i]` at a time, as the engine's chunks; the texts shown."""
    automaton = StopAutomaton(rules.stops) if rules.stops else None
    choice = ChoiceText(0, pieces, rules, automaton)
    texts: list[str] = []
    position = 0
    for size in cuts:
        if position >= len(tokens) or choice.finish is not None:
            break
        taken = tuple(tokens[position : position + size])
        over = position + size >= len(tokens)
        chunk = TokenChunk(
            request_id="r",
            choice=0,
            position=position,
            tokens=taken,
            finish=finish if over else None,
            stop_token=stop_token if over else None,
        )
        texts.append(choice.push(chunk).text)
        position += size
    return texts, choice


@given(tokens=TOKENS, cuts=CUTS, skip=st.booleans())
def test_any_tokens_stream_as_they_decode(
    tokenizer: Tokenizer, tokens: list[int], cuts: list[int], skip: bool
) -> None:
    texts, _ = streamed(tokens, cuts, tokenizer.pieces, TextRules(skip_special=skip))
    whole = tokenizer._rust.decode(tokens, skip_special_tokens=skip)
    shown = "".join(texts)
    # An unfinished character at the very end is not shown; the whole decode marks it.
    assert whole in (shown, shown + "\ufffd")


@given(text=st.text(max_size=60), cuts=st.lists(st.integers(1, 5), min_size=300, max_size=300))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    texts, choice = streamed(tokens, cuts, tokenizer.pieces, TextRules(skip_special=False))
    assert "".join(texts) == text
    assert choice.tokens == len(tokens)
    assert "\ufffd" in text or not any("\ufffd" in shown for shown in texts)


@given(text=st.text(max_size=40), cuts=CUTS)
def test_sentence_piece_text_comes_back(
    sentence_piece_folder: Path, text: str, cuts: list[int]
) -> None:
    tokenizer = Tokenizer(served(sentence_piece_folder))
    text = "say " + text.replace("▁", "")
    tokens = tokenizer.encode(text, add_special_tokens=False)
    texts, _ = streamed(tokens, cuts * 8, tokenizer.pieces, TextRules(skip_special=False))
    # A continuation keeps the space of its first word, which the whole decode strips.
    assert "".join(texts) == " " + text
    assert tokenizer.decode(tokens) == text


def test_ids_beyond_the_tokenizer_are_silent(folder: Path) -> None:
    pieces = Tokenizer(served(folder, vocab=512)).pieces
    assert len(pieces) == 512
    texts, choice = streamed([511, 400], [1] * 40, pieces, TextRules())
    assert texts == ["", ""] and choice.tokens == 2


def test_a_foreign_decoder_is_refused() -> None:
    with pytest.raises(ModelError, match="WordPiece"):
        Pieces({"model": {"vocab": {"a": 0}}, "decoder": {"type": "WordPiece"}}, 1)


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_is_counted_and_shown_only_on_request(
    tokenizer: Tokenizer, include: bool
) -> None:
    rules = TextRules(include_stop=include)
    tokens = tokenizer.encode("hello", add_special_tokens=False)
    texts, choice = streamed(
        tokens, [1] * 40, tokenizer.pieces, rules, stop_token=tokens[-1], finish=Finish.STOP
    )
    assert "".join(texts) == ("hello" if include else "hell")
    assert (choice.tokens, choice.finish) == (len(tokens), "stop")


@given(
    text=st.text(LETTERS, min_size=1, max_size=30), stops=STOPS, cuts=CUTS, include=st.booleans()
)
def test_stops_across_tokens(
    tokenizer: Tokenizer, text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    rules = TextRules(stops=tuple(stops), include_stop=include)
    texts, choice = streamed(tokens, cuts * 4, tokenizer.pieces, rules)
    expected = naive_stop(text, stops)
    if expected is None:
        assert "".join(texts) == text and choice.finish == "length"
        return
    assert choice.finish == "stop"
    shown = "".join(texts)
    assert shown.startswith(expected) and (include or shown == expected)
    # The count ends with the token that completes the stop string.
    before = tokenizer._rust.decode(tokens[: choice.tokens - 1])
    after = tokenizer._rust.decode(tokens[: choice.tokens])
    assert naive_stop(after, stops) is not None
    assert naive_stop(before.rstrip("\ufffd"), stops) is None


def test_min_tokens_hold_for_stop_strings_too(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a.b.c.", add_special_tokens=False)
    assert len(tokens) == 6
    rules = TextRules(stops=(".",), min_tokens=2)
    texts, choice = streamed(tokens, [1] * 40, tokenizer.pieces, rules)
    assert ("".join(texts), choice.tokens) == ("a.b", 4)


def test_a_fake_backend_cannot_push_after_the_end(tokenizer: Tokenizer) -> None:
    _, choice = streamed([70], [1] * 40, tokenizer.pieces, TextRules())
    with pytest.raises(AssertionError):
        chunk: Any = SimpleNamespace(tokens=(70,), finish=None, stop_token=None)
        choice.push(chunk)
