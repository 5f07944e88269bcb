"""The Python API for scripts: `LLM(...).generate(...)`, offline, without HTTP and without Ray.

    from fabric.driver import LLM, SamplingParams

    llm = LLM()                                      # the demo model; or a folder, GGUF, hub id
    params = SamplingParams(max_tokens=20)
    for completion in llm.generate(["The sky is", "Two and two make"], params):
        print(completion.text)

The engine and the worker are those of `fabric serve`, so the tokens are the same. Everything is
imported inside the functions: `import fabric.driver` costs nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from fabric.config import FabricConfig
    from fabric.core.engine.engine import Engine
    from fabric.core.request import Request, TokenChunk
    from fabric.gateway.backend import ServedModel
    from fabric.gateway.offline import Completion, OfflineGateway, OfflineJob
    from fabric.worker.worker import Worker

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn; names and limits are those of `/v1/completions`. None: the default.

    `max_tokens` None: until the model stops or its context is full. `seed` None: another one for
    each prompt. `logprobs`, `prompt_logprobs`: how many alternatives beside each token (0: none).
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    n: int = 1


class LLM:
    """One model in this process. Raises `ModelError` or `ConfigError` (`fabric.core.errors`).

    `model`: a folder, a GGUF file, a hub id, or None for the demo. `cache`: the folder of
    downloaded models and compiled kernels (None: ~/.cache/fabric). `settings` are the fields of
    the config's model, kv and engine sections, flat: `LLM(threads=2, max_sequences=16)`.
    """

    def __init__(
        self, model: str | None = None, *, cache: Path | None = None, **settings: Any
    ) -> None:
        from fabric.cluster.loading import load_engine, load_worker
        from fabric.cluster.workers import InProcess
        from fabric.gateway.backend import ServedModel
        from fabric.gateway.offline import OfflineGateway
        from fabric.model.progress import ProgressBar
        from fabric.model.source import resolve_model

        config = _config(model, settings)
        folder = resolve_model(config.model.source, cache, ProgressBar())
        self.worker: Worker = load_worker(
            config, folder=folder.path, threads=config.model.threads, cache=cache, say=_say
        )
        parts = load_engine(config, self.worker, InProcess(self.worker.execute), _say)
        self.engine: Engine = parts.engine
        served = ServedModel(
            name=config.model.name or folder.name,
            version=folder.version,
            created=0,
            context_limit=parts.context_limit,
            vocab=self.worker.config.vocab,
            eos_token_ids=self.worker.config.eos_token_ids,
            folder=str(folder.path),
        )
        self._gateway: OfflineGateway = OfflineGateway(served)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[Completion]:
        """Continue each prompt (text or token ids); one `Completion` a prompt, in order.

        `params`: for all prompts, or one each. Raises `RequestError` for a prompt or parameter that
        is out of range, before anything runs. Ctrl-C ends it after the step in hand and leaves
        this object usable.
        """
        listed = _listed(prompts)
        each = list(params) if isinstance(params, Sequence) else [params] * len(listed)
        if len(each) != len(listed):
            raise ValueError(f"{len(listed)} prompts, but {len(each)} sampling parameters")
        jobs = [
            self._gateway.job(prompt, _fields(chosen or SamplingParams()))
            for prompt, chosen in zip(listed, each, strict=True)
        ]
        collector = _Collector(jobs, self.engine.abort, quiet=not progress)
        with collector.bar:
            self.run([job.request for job in jobs], collector)
        return [job.completion() for job in jobs]

    def chat(
        self, messages: Sequence[Mapping[str, str]], params: SamplingParams | None = None
    ) -> Completion:
        """Answer a conversation, [{"role": ..., "content": ...}, ...], through the model's chat
        template. Raises `RequestError`."""
        return self.generate(self._gateway.conversation(messages), params, progress=False)[0]

    def run(self, requests: Sequence[Request], take: Callable[[list[TokenChunk]], None]) -> None:
        """The loop under `generate`, in tokens: until all requests have ended, every step's chunks
        go to `take`. Raises `RequestError` if one of them can never run; then none has run."""
        try:
            for request in requests:
                self.add(request)
            with _deferred_interrupt() as interrupted:
                while self.engine.has_work and not interrupted():
                    take(self.step())
        finally:
            for request in requests:
                self.engine.abort(request.request_id)

    def add(self, request: Request) -> None:
        """Queue a request. Raises `RequestError` if it can never run."""
        from fabric.core.engine.engine import Refused
        from fabric.core.errors import RequestError

        outcome = self.engine.add(request, time.time_ns())
        if isinstance(outcome, Refused):
            raise RequestError(outcome.reason)

    def step(self) -> list[TokenChunk]:
        """One turn: schedule, execute, commit. Only while the engine has work."""
        plan = self.engine.schedule(time.time_ns())
        assert plan is not None, "nothing is in flight here, so what is queued can run"
        result = self.worker.execute(plan)
        assert result is not None, "a worker that is alone samples"
        return self.engine.commit(plan, result, time.time_ns())

    def weight_bytes(self) -> int:
        """Resident bytes of weights."""
        return self.worker.memory().weight_bytes


def application(args: dict[str, Any]) -> Any:
    """The application of a cluster, as Serve builds it on one of its nodes: `args` is what
    `fabric.cluster.deploy.serve_config` wrote. Raises `ConfigError`, `ModelError`."""
    from fabric.cli import cache_folder
    from fabric.cluster.app import build_application
    from fabric.cluster.run import Run
    from fabric.config import parse_config

    config = parse_config(args["config"])
    cache = cache_folder()
    run = Run(folder=cache, logs=cache / "logs" / "cluster", cache=cache, launcher_pid=None)
    return build_application(config, served_model(config, cache), run)


def served_model(config: FabricConfig, cache: Path) -> ServedModel:
    """Find, fetch or convert the model and check that it can be served, spread over as many workers
    as the config asks for. Raises `ModelError`."""
    from fabric.core.shard import Place
    from fabric.gateway.backend import ServedModel
    from fabric.model.config import load_config
    from fabric.model.parallel import share_of
    from fabric.model.progress import ProgressBar
    from fabric.model.source import resolve_model

    folder = resolve_model(config.model.source, cache, ProgressBar())
    decoder = load_config(folder.path)
    share_of(decoder, Place(spec=config.shard.core()))
    return ServedModel(
        name=config.model.name or folder.name,
        version=folder.version,
        created=int((folder.path / "config.json").stat().st_mtime),
        context_limit=min(decoder.context_limit, config.model.context_limit or sys.maxsize),
        vocab=decoder.vocab,
        eos_token_ids=decoder.eos_token_ids,
        folder=str(folder.path),
    )


class _Collector:
    """Takes every step's chunks to their jobs, and shows on stderr how far it is."""

    def __init__(
        self,
        jobs: list[OfflineJob],
        abort: Callable[[str, int], list[TokenChunk]],
        *,
        quiet: bool,
    ) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._jobs = {job.request.request_id: job for job in jobs}
        self._abort = abort
        self._tokens = 0
        self._began = time.monotonic()
        rate = TextColumn("{task.fields[rate]:,.0f} tokens/s")
        self.bar = Progress(
            TextColumn("generating"),
            BarColumn(),
            MofNCompleteColumn(),
            rate,
            console=Console(stderr=True),
            disable=quiet,
        )
        self._task = self.bar.add_task("", total=sum(len(job.texts) for job in jobs), rate=0.0)

    def __call__(self, chunks: list[TokenChunk]) -> None:
        ended = 0
        for chunk in chunks:
            job = self._jobs[chunk.request_id]
            if job.take(chunk):
                self._abort(chunk.request_id, chunk.choice)
            ended += job.texts[chunk.choice].finish is not None
            self._tokens += len(chunk.tokens)
        rate = self._tokens / (time.monotonic() - self._began)
        self.bar.update(self._task, advance=ended, rate=rate)


def _fields(params: SamplingParams) -> dict[str, Any]:
    """As JSON has them in the body of a completion request: one place knows what is valid."""
    data = {each.name: getattr(params, each.name) for each in fields(params)}
    data["logit_bias"] = {str(token): float(bias) for token, bias in params.logit_bias.items()}
    data["stop"] = params.stop if isinstance(params.stop, str) else list(params.stop)
    data["stop_token_ids"] = list(params.stop_token_ids)
    return data


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    tokens = [prompt for prompt in prompts if isinstance(prompt, int)]
    if tokens and len(tokens) < len(prompts):
        raise ValueError("token ids and prompts in one list: a prompt of ids is a list of its own")
    return [tokens] if tokens else [prompt for prompt in prompts if not isinstance(prompt, int)]


def _config(model: str | None, settings: Mapping[str, Any]) -> FabricConfig:
    from fabric.config import EngineSection, KvSection, ModelSection, parse_config
    from fabric.config.section import Section
    from fabric.core.errors import ConfigError

    sections: dict[str, type[Section]] = {
        "model": ModelSection,
        "kv": KvSection,
        "engine": EngineSection,
    }
    data: dict[str, dict[str, Any]] = {"model": {"source": model}, "kv": {}, "engine": {}}
    for key, value in settings.items():
        owner = next((name for name, kind in sections.items() if key in kind.model_fields), None)
        if owner is None or key == "source":
            valid = sorted({key for kind in sections.values() for key in kind.model_fields})
            valid.remove("source")
            raise ConfigError(f"LLM has no setting {key!r}; valid: {', '.join(valid)}")
        data[owner][key] = value
    return parse_config(data)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C waits for the step in hand (a half-done step would leave engine and worker apart) and
    is raised at the end; a second Ctrl-C doesn't wait."""
    import signal
    import threading

    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, _frame: object) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGINT, before)
    if received:
        raise KeyboardInterrupt
