"""`fabric chat` against a real server: through pipes, and in a real terminal with Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.sse_server import MODEL, Behaviour, running

from fabric.bench.chat import Answer, ChatError, ChatOptions, chat, events, printable
from fabric.bench.server import free_port

ANSWER = " t0 t1 t2 t3 t4"


def talk(url: str, text: str, **options: object) -> tuple[int, str]:
    out = io.StringIO()
    code = chat(ChatOptions(url=url, **options), io.StringIO(text), out)  # type: ignore[arg-type]
    return code, out.getvalue()


def test_piped_it_writes_answers_only_and_keeps_the_history() -> None:
    with running() as server:
        code, out = talk(server.url, "hello\n\nand then?\n", system="Be brief.")
    assert (code, out) == (0, f"{ANSWER}\n{ANSWER}\n")
    first, second = server.requests
    assert first["model"] == MODEL
    assert second["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": "and then?"},
    ]
    assert "temperature" not in first
    assert "max_tokens" not in first


def test_reset_forgets_and_exit_leaves() -> None:
    with running() as server:
        code, _ = talk(server.url, "one\n/reset\ntwo\n/exit\nthree\n", system="S")
    assert code == 0
    assert [[m["content"] for m in body["messages"]] for body in server.requests] == [
        ["S", "one"],
        ["S", "two"],
    ]


def test_one_message_and_the_options() -> None:
    with running() as server:
        code, out = talk(server.url, "", message="hi", max_tokens=2, temperature=0.5, model="other")
    assert (code, out) == (0, " t0 t1\n")
    [body] = server.requests
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("other", 2, 0.5)


def test_no_server_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    code, out = talk(url, "hello\n")
    said = capsys.readouterr().err
    assert (code, out) == (1, "")
    assert said == (
        f"fabric chat: nothing answers at {url}; start a server with `fabric serve`, "
        "or give its --url\n"
    )


@pytest.mark.parametrize(
    ("status", "said"),
    [(503, "loading or shutting down"), (401, "FABRIC_API_KEY"), (400, "HTTP 400: not today\n")],
)
def test_a_refusal_is_explained(status: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with running(Behaviour(status=status)) as server:
        code, out = talk(server.url, "hello\n")
    assert (code, out) == (1, "")
    assert said in capsys.readouterr().err


def test_after_a_failure_the_conversation_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    with running(Behaviour(error_event_after=0)) as server:
        code, _ = talk(server.url, "one\ntwo\n")
    assert code == 1
    assert capsys.readouterr().err.count("the engine stopped") == 2
    # A question without an answer is dropped, not repeated.
    assert [len(body["messages"]) for body in server.requests] == [1, 1]


def test_a_broken_stream_keeps_what_came(capsys: pytest.CaptureFixture[str]) -> None:
    with running(Behaviour(cut_after=3)) as server:
        code, out = talk(server.url, "one\ntwo\n")
    assert code == 1
    assert out.startswith(" t0 t1")
    assert "broke" in capsys.readouterr().err
    assert [m["content"] for m in server.requests[1]["messages"]] == ["one", " t0 t1", "two"]


def test_in_a_terminal_ctrl_c_stops_the_answer_and_not_the_chat() -> None:
    with running(Behaviour(delay_s=0.05)) as server:
        script = (
            "import sys; from fabric.bench.chat import *; "
            f"sys.exit(chat(ChatOptions(url={server.url!r}, max_tokens=1000)))"
        )
        child, terminal = pty.fork()
        if child == 0:
            os.execv(sys.executable, [sys.executable, "-c", script])
        read_until(terminal, "> ")
        os.write(terminal, b"hello\n")
        read_until(terminal, "t3")
        os.write(terminal, b"\x03")
        assert "stopped" in read_until(terminal, "> ")
        os.write(terminal, b"again\n")
        read_until(terminal, "t2")
        os.write(terminal, b"\x03")
        read_until(terminal, "stopped")
        os.write(terminal, b"/exit\n")
        _, status = os.waitpid(child, 0)
        os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0
    roles = [m["role"] for m in server.requests[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert server.requests[1]["messages"][1]["content"].startswith(" t0 t1 t2 t3")


def test_ctrl_c_at_the_prompt_gives_a_hint_and_ctrl_d_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    keys = iter([KeyboardInterrupt, "hello", "/what", EOFError])

    def typed(_prompt: str) -> str:
        key = next(keys)
        if isinstance(key, str):
            return key
        raise key

    monkeypatch.setattr("builtins.input", typed)
    out = Terminal()
    with running() as server:
        assert chat(ChatOptions(url=server.url), Terminal(), out) == 0
    assert len(server.requests) == 1
    shown = out.getvalue()
    assert shown.count("/reset forgets") == 2  # at the start and after Ctrl-C
    assert f"{ANSWER}\n\x1b[2mTTFT " in shown
    assert "5 tokens" in shown


def read_until(terminal: int, word: str) -> str:
    """What the terminal shows up to and with `word`; at most 30 seconds."""
    shown, deadline = "", time.monotonic() + 30
    while word not in shown:
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"no {word!r} in {shown!r}"
        shown += os.read(terminal, 1024).decode()
    return shown


def test_figures() -> None:
    answer = Answer(tokens=11, started=1.0, first=1.05, last=2.05)
    assert answer.figures() == "TTFT 50 ms · 10 tok/s · 11 tokens"
    assert Answer(started=1.0, first=1.1, last=1.1).figures() == "TTFT 100 ms"
    assert Answer().figures() == "no tokens"


@given(text=st.text(), size=st.integers(1, 9))
def test_events_survive_any_split_and_any_character(text: str, size: int) -> None:
    body = f"data: {json.dumps({'x': text}, ensure_ascii=False)}\r\n\r\ndata: [DONE]\n\n"
    wire = body.encode("utf-8", "surrogatepass")
    assert list(events(wire[i : i + size] for i in range(0, len(wire), size))) == [{"x": text}]


def test_an_event_that_is_not_json() -> None:
    with pytest.raises(ChatError, match="JSON"):
        list(events([b"data: {\n\n"]))


@given(text=st.text())
def test_a_model_can_not_steer_the_terminal(text: str) -> None:
    shown = printable(text + "\x1b[2J\x9b1m")
    assert not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 for c in shown)
    assert printable("Grüße, 世界\n\t👋") == "Grüße, 世界\n\t👋"
