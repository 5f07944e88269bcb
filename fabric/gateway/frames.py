"""Server-sent events. What does not change is serialised once; a token costs one small dumps.

data: {"id":…,"choices":[{"index":0,"delta":  {"content":"Hi"}  ,"logprobs":null,…}]}\\n\\n
      '---------------- head ---------------'                   '-------- tail --------'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from fabric.gateway.generation import Job
from fabric.gateway.logprobs import chat_logprobs, completion_logprobs
from fabric.gateway.text import Delta, scored_prompt

DONE = b"data: [DONE]\n\n"
_PLAIN_END = b',"logprobs":null,"finish_reason":null'


class Frames:
    """The events of one job."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._kind = "chat.completion.chunk" if job.chat else "text_completion"
        common = {
            "id": job.answer_id(),
            "object": self._kind,
            "created": job.created,
            "model": job.model_name,
            "system_fingerprint": job.fingerprint,
        }
        if job.service_tier is not None:
            common["service_tier"] = job.service_tier
        self._open = b"data: " + orjson.dumps(common)[:-1] + b',"choices":['
        field = b',"delta":' if job.chat else b',"text":'
        self._heads = [self._open + b'{"index":%d' % i + field for i in range(job.choices)]
        # With include_usage every chunk but the last says usage: null.
        self._close = b'],"usage":null}\n\n' if job.stream_usage else b"]}\n\n"
        self._tail = _PLAIN_END + b"}" + self._close

    def of(self, deltas: list[Delta]) -> bytes:
        """The events of one item: one write."""
        one = self._chat if self._job.chat else self._completion
        return b"".join([one(delta) for delta in deltas])

    def end(self, usage: Mapping[str, Any] | None) -> bytes:
        """The usage event, if asked for, and the end of the stream."""
        if usage is None:
            return DONE
        return self._open + b'],"usage":' + orjson.dumps(usage) + b"}\n\n" + DONE

    def _chat(self, delta: Delta) -> bytes:
        head = self._heads[delta.choice]
        role = b""
        if delta.first is not None:
            role = head + b'{"role":"assistant","content":""}' + self._tail
        if delta.finish is None and delta.scored is None:
            if not delta.text:
                return role
            return role + head + b'{"content":' + orjson.dumps(delta.text) + b"}" + self._tail
        content = b'{"content":' + orjson.dumps(delta.text) + b"}" if delta.text else b"{}"
        scored = delta.scored and chat_logprobs(delta.scored, self._job.pieces)
        return role + head + content + self._full_tail(delta, scored)

    def _completion(self, delta: Delta) -> bytes:
        head = self._heads[delta.choice]
        opening = self._echo(delta) if delta.first is not None and self._job.echo else b""
        if delta.finish is None and delta.scored is None:
            if not delta.text:
                return opening
            return opening + head + orjson.dumps(delta.text) + self._tail
        scored = None
        if delta.scored and self._job.generate:
            offset = len(self._prompt_text(delta)) if self._job.echo else 0
            scored = completion_logprobs(delta.scored, self._job.pieces, text_offset=offset)
        text = delta.text if self._job.generate else ""
        return opening + head + orjson.dumps(text) + self._full_tail(delta, scored)

    def _echo(self, delta: Delta) -> bytes:
        """The prompt comes first, with its own log-probabilities if asked for."""
        scored = None
        request = self._job.requests[delta.choice // self._job.requests[0].sampling.n]
        if self._job.rules.logprobs and delta.first and delta.first.prompt_logprobs:
            prompt = scored_prompt(request.prompt, delta.first.prompt_logprobs, self._job.pieces)
            scored = completion_logprobs(prompt, self._job.pieces, text_offset=0)
        text = orjson.dumps(self._prompt_text(delta))
        unfinished = Delta(choice=delta.choice, text="")
        return self._heads[delta.choice] + text + self._full_tail(unfinished, scored)

    def _prompt_text(self, delta: Delta) -> str:
        return self._job.prompt_texts[delta.choice // self._job.requests[0].sampling.n]

    def _full_tail(self, delta: Delta, scored: object) -> bytes:
        end = b',"logprobs":' + orjson.dumps(scored or None)
        end += b',"finish_reason":' + orjson.dumps(delta.finish)
        if delta.finish is not None:
            end += b',"stop_reason":' + orjson.dumps(delta.stop_reason)
        return end + b"}" + self._close
