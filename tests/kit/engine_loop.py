"""The plain loop around an engine and a scripted worker: one plan in flight, or a few."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from kit.scripted_worker import Script, ScriptedWorker

from fabric.core.configs import EngineConfig
from fabric.core.engine.engine import Accepted, Engine
from fabric.core.engine.plan import StepPlan, StepResult
from fabric.core.request import Finish, Request, SamplingParams, TokenChunk
from fabric.core.snapshot import ReplicaSnapshot

STEPS_MAX = 20_000


def ask(
    request_id: str,
    prompt: Iterable[int],
    *,
    arrival: int = 0,
    priority: int = 0,
    generated: tuple[tuple[int, ...], ...] = (),
    **sampling: object,
) -> Request:
    """A request; further keywords are sampling parameters (8 tokens unless told)."""
    params = SamplingParams(**{"max_tokens": 8, **sampling})  # type: ignore[arg-type]
    return Request(
        request_id=request_id,
        prompt=tuple(prompt),
        sampling=params,
        arrival=arrival,
        priority=priority,
        generated=generated,
    )


class EngineLoop:
    """`add`, `step`, `run`; remembers plans and chunks. Checks the engine at each turn."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        depth: int = 1,
        script: Script | None = None,
        vocab: int = 50,
        checked: bool = True,
    ) -> None:
        self.engine = Engine(config)
        self.worker = ScriptedWorker(config, script=script, vocab=vocab)
        self.depth = depth
        self.checked = checked
        self.plans: list[StepPlan] = []
        self.chunks: list[TokenChunk] = []
        self.now = 0
        self._flights: deque[tuple[StepPlan, StepResult]] = deque()

    def add(self, *requests: Request) -> None:
        """All must be accepted."""
        for request in requests:
            outcome = self.engine.add(request, self.now)
            assert isinstance(outcome, Accepted), outcome

    def schedule(self) -> StepPlan | None:
        """Decide and execute the next step, without committing it."""
        self.now += 1
        plan = self.engine.schedule(self.now)
        self._check()
        if plan is not None:
            self.plans.append(plan)
            self._flights.append((plan, self.worker.execute(plan)))
        return plan

    def commit(self) -> list[TokenChunk]:
        """Commit the oldest plan in flight."""
        plan, result = self._flights.popleft()
        chunks = self.engine.commit(plan, result, self.now)
        self._check()
        self.chunks.extend(chunks)
        return chunks

    def step(self) -> list[TokenChunk]:
        """One turn: schedule, and commit when the pipeline is full."""
        plan = self.schedule()
        if self._flights and (plan is None or len(self._flights) >= self.depth):
            return self.commit()
        assert plan is not None or not self.engine.has_work, "work, and nothing happens"
        return []

    def run(self) -> None:
        """Until nothing is left to do."""
        for _ in range(STEPS_MAX):
            if not self.engine.has_work and not self._flights:
                return
            self.step()
        raise AssertionError("it never ends")

    def tokens(self, request_id: str, choice: int = 0) -> list[int]:
        """What a choice has produced so far."""
        return [t for chunk in self._of(request_id, choice) for t in chunk.tokens]

    def finish(self, request_id: str, choice: int = 0) -> Finish | None:
        """Why it ended."""
        chunks = self._of(request_id, choice)
        return chunks[-1].finish if chunks else None

    def everything(self) -> dict[tuple[str, int], tuple[list[int], Finish | None]]:
        """Tokens and end of every choice."""
        names = sorted({(chunk.request_id, chunk.choice) for chunk in self.chunks})
        return {name: (self.tokens(*name), self.finish(*name)) for name in names}

    def snapshot(self) -> ReplicaSnapshot:
        """As the replica would send it."""
        return self.engine.snapshot("r", self.now)

    def _check(self) -> None:
        if self.checked:
            self.engine.check()

    def _of(self, request_id: str, choice: int) -> list[TokenChunk]:
        return [c for c in self.chunks if (c.request_id, c.choice) == (request_id, choice)]
