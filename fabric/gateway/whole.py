"""An answer that is not streamed: all deltas gathered into one JSON object."""

from __future__ import annotations

from typing import Any

import orjson

from fabric.gateway.generation import Job
from fabric.gateway.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs
from fabric.gateway.text import Delta, Scored, scored_prompt


class Whole:
    """Gathers; then `body()`."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._texts: list[list[str]] = [[] for _ in range(job.choices)]
        self._scored: list[list[Scored]] = [[] for _ in range(job.choices)]
        self._last: list[Delta | None] = [None] * job.choices
        self._first: list[Delta | None] = [None] * job.choices

    def take(self, deltas: list[Delta]) -> None:
        """Add what one item brought."""
        for delta in deltas:
            self._texts[delta.choice].append(delta.text)
            if delta.scored:
                self._scored[delta.choice] += delta.scored
            if delta.first is not None:
                self._first[delta.choice] = delta
            if delta.finish is not None:
                self._last[delta.choice] = delta

    def body(self, usage: dict[str, object]) -> bytes:
        """The JSON of the answer, once every choice has finished."""
        job = self._job
        answer: dict[str, Any] = {
            "id": job.answer_id(),
            "object": "chat.completion" if job.chat else "text_completion",
            "created": job.created,
            "model": job.model_name,
            "system_fingerprint": job.fingerprint,
            "choices": [self._choice(index) for index in range(job.choices)],
            "usage": usage,
        }
        if job.service_tier is not None:
            answer["service_tier"] = job.service_tier
        if job.chat and job.show_prompt:
            answer["prompt_logprobs"] = self._prompt_logprobs(0)
        return orjson.dumps(answer)

    def _choice(self, index: int) -> dict[str, Any]:
        last = self._last[index]
        assert last is not None
        choice: dict[str, Any] = {"index": index}
        text = "".join(self._texts[index])
        scored = self._scored[index]
        if self._job.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            logprobs = self._job.rules.logprobs and chat_logprobs(scored, self._job.pieces)
        else:
            choice["text"] = self._echoed(index) + (text if self._job.generate else "")
            logprobs = self._job.rules.logprobs and self._completion_logprobs(index, scored)
            if self._job.show_prompt:
                choice["prompt_logprobs"] = self._prompt_logprobs(index)
        choice["logprobs"] = logprobs or None
        choice["finish_reason"] = last.finish
        choice["stop_reason"] = last.stop_reason
        return choice

    def _echoed(self, index: int) -> str:
        return self._job.prompt_texts[self._prompt(index)] if self._job.echo else ""

    def _completion_logprobs(self, index: int, scored: list[Scored]) -> dict[str, Any]:
        pieces = self._job.pieces
        scored = scored if self._job.generate else []
        answer = completion_logprobs(scored, pieces, text_offset=len(self._echoed(index)))
        first = self._first[index]
        entries = first.first.prompt_logprobs if first and first.first else None
        if self._job.echo and entries is not None:
            prompt = scored_prompt(self._job.requests[self._prompt(index)].prompt, entries, pieces)
            before = completion_logprobs(prompt, pieces, text_offset=0)
            answer = {name: before[name] + answer[name] for name in before}
        return answer

    def _prompt_logprobs(self, index: int) -> list[dict[str, Any] | None] | None:
        first = self._first[index]
        entries = first.first.prompt_logprobs if first and first.first else None
        return prompt_logprobs(entries, self._job.pieces) if entries is not None else None

    def _prompt(self, index: int) -> int:
        return index // self._job.requests[0].sampling.n
