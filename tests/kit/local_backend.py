"""The gateway's `Backend` with one real engine in the process and a scripted worker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

from kit.scripted_worker import Script, ScriptedWorker

from fabric.core.configs import EngineConfig
from fabric.core.engine.engine import Engine, Refused
from fabric.core.errors import RequestError, Unavailable
from fabric.core.request import Finish, Request, TokenChunk
from fabric.gateway.backend import Readiness, ServedModel, Service

CONFIG = EngineConfig(
    num_blocks=256, num_host_blocks=16, context_limit=512, eos_token_ids=(2,), max_sequences=64
)


class LocalBackend:
    """Drives `Engine` whenever it has work. `refusal`: raised instead of taking a request.

    Clear `resumed` and the engine stands still: requests stay queued or half done.
    """

    def __init__(
        self,
        folder: Path,
        *,
        script: Script | None = None,
        vocab: int = 361,
        config: EngineConfig = CONFIG,
    ) -> None:
        self.config = config
        self.engine = Engine(self.config)
        self.worker = ScriptedWorker(self.config, vocab=vocab, script=script)
        self.served = ServedModel(
            name="tiny",
            version="0123456789abcdef",
            created=1_700_000_000,
            context_limit=config.context_limit,
            vocab=vocab,
            eos_token_ids=config.eos_token_ids,
            folder=str(folder),
        )
        self.worse = ""
        self.refusal: Exception | None = None
        self.unready: str | None = None
        self.loading = False
        self.requests: list[Request] = []
        self.aborted: list[tuple[str, int]] = []
        self.resumed = asyncio.Event()
        self.resumed.set()
        self._boxes: dict[str, list[TokenChunk]] = {}
        self._arrived: dict[str, asyncio.Event] = {}
        self._loop: asyncio.Task[None] | None = None

    def service(self, _request_id: str) -> Service:
        return Service(replica="tiny", queue_ms=1.25, degraded=self.worse)

    def model(self) -> ServedModel:
        if self.loading:
            raise Unavailable("The model is loading.", retry_after_s=3.0)
        return self.served

    async def stream(self, request: Request) -> AsyncGenerator[tuple[TokenChunk, ...], None]:
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)
        outcome = self.engine.add(request, time.time_ns())
        if isinstance(outcome, Refused):
            raise RequestError(outcome.reason)
        box: list[TokenChunk] = []
        arrived = asyncio.Event()
        self._boxes[request.request_id] = box
        self._arrived[request.request_id] = arrived
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._drive())
        unfinished = request.sampling.n
        try:
            while unfinished:
                await arrived.wait()
                arrived.clear()
                item = tuple(box)
                box.clear()
                unfinished -= sum(chunk.finish is not None for chunk in item)
                if item:
                    yield item
        finally:
            del self._boxes[request.request_id], self._arrived[request.request_id]
            self.engine.abort(request.request_id)

    def abort_choice(self, request_id: str, choice: int) -> None:
        self.aborted.append((request_id, choice))
        self._deliver(self.engine.abort(request_id, choice))

    def break_off(self) -> None:
        """As if the replica had died: every open request gets its last chunk."""
        ended = [c for name in list(self._boxes) for c in self.engine.abort(name)]
        self._deliver([replace(chunk, finish=Finish.ERROR) for chunk in ended])

    async def readiness(self) -> Readiness:
        return Readiness(ready=self.unready is None, reason=self.unready or "")

    async def metrics_text(self) -> str:
        return "# TYPE fabric_replicas gauge\nfabric_replicas 1\n"

    async def fleet_status(self) -> dict[str, object]:
        return {"model": self.served.name, "replicas": 1}

    def assert_idle(self) -> None:
        """Everything is freed and every gauge is zero."""
        self.engine.check()
        snapshot = self.engine.snapshot("local", 0)
        assert (snapshot.running, snapshot.waiting, snapshot.swapped) == (0, 0, 0)
        assert snapshot.waiting_tokens == 0
        assert snapshot.blocks_free == snapshot.blocks_total
        assert snapshot.host_blocks_free == snapshot.host_blocks_total
        assert not self._boxes and not self.engine.has_work

    async def _drive(self) -> None:
        while self.engine.has_work:
            await self.resumed.wait()
            plan = self.engine.schedule(time.time_ns())
            if plan is None:
                break
            result = self.worker.execute(plan)
            self._deliver(self.engine.commit(plan, result, time.time_ns()))
            await asyncio.sleep(0)

    def _deliver(self, chunks: list[TokenChunk]) -> None:
        for chunk in chunks:
            if chunk.request_id in self._boxes:
                self._boxes[chunk.request_id].append(chunk)
                self._arrived[chunk.request_id].set()


def saying(tokens: list[int], end: int = 2) -> Script:
    """A script that answers every prompt with `tokens`, then ends."""

    def next_token(history: object, prompt_length: int, sampling: object, choice: int) -> int:
        position = len(history) - prompt_length  # type: ignore[arg-type]
        return tokens[position] if position < len(tokens) else end

    return next_token


def served(folder: Path, vocab: int = 361) -> ServedModel:
    """A model as the backend would name it."""
    return ServedModel(
        name="tiny",
        version="0",
        created=0,
        context_limit=512,
        vocab=vocab,
        eos_token_ids=(2,),
        folder=str(folder),
    )
