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

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fabric.cluster.loading import EngineParts
    from fabric.config import FabricConfig
    from fabric.core.request import Request, TokenChunk, TokenLogprobs
    from fabric.gateway.backend import ServedModel
    from fabric.gateway.text import ChoiceText
    from fabric.gateway.tokenizer import Tokenizer

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One continuation. `finish`: "stop" or "length"; `stop_reason`: the stop string or token met.

    `tokens` are all that were counted, a stop token included; `logprobs` has one entry each.
    """

    text: str
    tokens: tuple[int, ...]
    finish: str
    stop_reason: str | int | None
    logprobs: tuple[TokenLogprobs, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What one prompt brought: `n` choices. `cached_tokens`: prompt tokens that were known."""

    prompt_tokens: tuple[int, ...]
    choices: tuple[Choice, ...]
    cached_tokens: int
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text


class LLM:
    """One model in this process. Raises `ModelError` or `ConfigError` (`fabric.core.errors`).

    `model`: a folder, a GGUF file, a hub id, or None for the demo. `settings` are fields of the
    config's model, kv and engine sections, flat: `LLM(threads=2, max_sequences=16)`.
    """

    def __init__(self, model: str | None = None, **settings: Any) -> None:
        from fabric.cluster.loading import load_engine
        from fabric.gateway.backend import ServedModel
        from fabric.gateway.settings import GatewaySettings
        from fabric.gateway.tokenizer import Tokenizer
        from fabric.model.progress import ProgressBar
        from fabric.model.source import resolve_model

        config = _config(model, settings)
        folder = resolve_model(config.model.source, progress=ProgressBar())
        self.lines: list[str] = []  # what loading had to say
        self.parts: EngineParts = load_engine(
            config,
            folder=str(folder.path),
            threads=config.model.threads or _cores(),
            say=self.lines.append,
        )
        self.model: ServedModel = ServedModel(
            name=config.model.name or folder.name,
            version=folder.version,
            created=0,
            context_limit=self.parts.context_limit,
            vocab=self.parts.worker.config.vocab,
            eos_token_ids=self.parts.worker.config.eos_token_ids,
            folder=str(folder.path),
        )
        self.tokenizer: Tokenizer = Tokenizer(self.model)
        self._limits = GatewaySettings()
        self._requests = 0

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
        each = [params] * len(listed) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(listed):
            raise ValueError(f"{len(listed)} prompts, but {len(each)} sampling parameters")
        jobs = [
            self._job(prompt, chosen or SamplingParams())
            for prompt, chosen in zip(listed, each, strict=True)
        ]
        collector = _Collector(self, jobs, quiet=not progress)
        with collector.bar:
            self.run([job.request for job in jobs], collector)
        return [job.completion() for job in jobs]

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        params: SamplingParams | None = None,
        *,
        progress: bool = False,
    ) -> Completion:
        """Answer a conversation through the model's chat template. Raises `RequestError`."""
        from fabric.gateway.schema import Message
        from fabric.gateway.template import check_messages
        from fabric.gateway.tokenizer import require_template

        told = [Message.model_validate(dict(message)) for message in messages]
        check_messages(told)
        text = require_template(self.tokenizer).render(told, add_generation_prompt=True, extra={})
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        return self.generate([tokens], params, progress=progress)[0]

    def run(self, requests: Sequence[Request], take: Callable[[list[TokenChunk]], None]) -> None:
        """The loop under `generate`, in tokens: until all requests have ended, every step's chunks
        go to `take`. Raises `RequestError` if one of them can never run; then none has run."""
        from fabric.core.engine.engine import Refused
        from fabric.core.errors import RequestError

        engine = self.parts.engine
        try:
            for request in requests:
                outcome = engine.add(request, time.time_ns())
                if isinstance(outcome, Refused):
                    raise RequestError(outcome.reason)
            with _deferred_interrupt() as interrupted:
                while engine.has_work and not interrupted():
                    take(self.step())
        finally:
            for request in requests:
                engine.abort(request.request_id)

    def step(self) -> list[TokenChunk]:
        """One turn of the engine: schedule, execute, commit. Only while it has work."""
        engine = self.parts.engine
        plan = engine.schedule(time.time_ns())
        assert plan is not None, "nothing is in flight here, so what is queued can run"
        result = self.parts.worker.execute(plan)
        return engine.commit(plan, result, time.time_ns())

    def _job(self, prompt: Prompt, params: SamplingParams) -> _Job:
        from fabric.core.errors import RequestError
        from fabric.core.request import Request
        from fabric.gateway.sampling import check_token_ids, sampling_params, stop_strings
        from fabric.gateway.stops import StopAutomaton
        from fabric.gateway.text import ChoiceText, TextRules

        body = _body(params)
        tokens = (
            self.tokenizer.encode(prompt, add_special_tokens=True)
            if isinstance(prompt, str)
            else list(prompt)
        )
        if not tokens:
            raise RequestError("The prompt is empty.", param="prompt")
        check_token_ids("prompt", tokens, self.model)
        if body.max_tokens is None:
            body = body.model_copy(update={"max_tokens": self.model.context_limit - len(tokens)})
        sampling = sampling_params(body, self.model, self._limits, len(tokens))
        stops = stop_strings(body, self._limits)
        rules = TextRules(
            stops=stops,
            skip_special=params.skip_special_tokens,
            min_tokens=sampling.min_tokens,
            logprobs=params.logprobs is not None,
        )
        self._requests += 1
        request = Request(
            request_id=f"driver-{self._requests}",
            prompt=tuple(tokens),
            sampling=sampling,
            arrival=time.time_ns(),
            model_version=self.model.version,
        )
        automaton = StopAutomaton(stops) if stops else None
        pieces = self.tokenizer.pieces
        return _Job(request, [ChoiceText(i, pieces, rules, automaton) for i in range(sampling.n)])


class _Job:
    """One prompt on its way: its request, and what has come of each choice."""

    def __init__(self, request: Request, texts: list[ChoiceText]) -> None:
        self.request = request
        self.texts = texts
        self._parts: list[list[str]] = [[] for _ in texts]
        self._tokens: list[list[int]] = [[] for _ in texts]
        self._logprobs: list[list[TokenLogprobs]] = [[] for _ in texts]
        self._reasons: list[str | int | None] = [None for _ in texts]
        self._first: TokenChunk | None = None

    def take(self, chunk: TokenChunk) -> bool:
        """Add a chunk; True if its choice has met a stop string and is to be aborted."""
        choice = chunk.choice
        text = self.texts[choice]
        if text.finish is not None:
            return False
        if self._first is None and chunk.cached_tokens is not None:
            self._first = chunk
        before = text.tokens
        delta = text.push(chunk)
        counted = text.tokens - before
        self._parts[choice].append(delta.text)
        self._tokens[choice] += chunk.tokens[:counted]
        self._logprobs[choice] += (chunk.logprobs or ())[:counted]
        self._reasons[choice] = delta.stop_reason
        return text.finish is not None and chunk.finish is None

    def completion(self) -> Completion:
        """After every choice has finished."""
        scored = self.request.sampling.logprobs is not None
        choices = tuple(
            Choice(
                text="".join(self._parts[index]),
                tokens=tuple(self._tokens[index]),
                finish=text.finish or "stop",
                stop_reason=self._reasons[index],
                logprobs=tuple(self._logprobs[index]) if scored else None,
            )
            for index, text in enumerate(self.texts)
        )
        first = self._first
        return Completion(
            prompt_tokens=self.request.prompt,
            choices=choices,
            cached_tokens=(first.cached_tokens or 0) if first else 0,
            prompt_logprobs=first.prompt_logprobs if first else None,
        )


class _Collector:
    """Takes every step's chunks to their jobs, and shows on stderr how far it is."""

    def __init__(self, llm: LLM, jobs: list[_Job], *, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._jobs = {job.request.request_id: job for job in jobs}
        self._abort = llm.parts.engine.abort
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


def _body(params: SamplingParams) -> Any:
    """As the body of a completion request, so that one place knows what is valid."""
    from fabric.gateway.schema import CompletionBody, parse

    data: dict[str, Any] = {"prompt": ""}
    for each in fields(params):
        data[each.name] = getattr(params, each.name)
    data["logit_bias"] = {str(token): float(bias) for token, bias in params.logit_bias.items()}
    data["stop"] = params.stop if isinstance(params.stop, str) else list(params.stop)
    data["stop_token_ids"] = list(params.stop_token_ids)
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        data[name] = float(data[name])
    return parse(CompletionBody, data)


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [[token for token in prompts if isinstance(token, int)]]
    return [prompt for prompt in prompts if not isinstance(prompt, int)]


def _config(model: str | None, settings: Mapping[str, Any]) -> FabricConfig:
    from fabric.config import EngineSection, KvSection, ModelSection, Section, parse_config
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


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0))


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
