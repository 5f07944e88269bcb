"""Text to tokens and back, from the tokenizer files of a model's folder."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import orjson

from fabric.core.errors import ModelError, Overloaded, RequestError
from fabric.gateway.backend import ServedModel
from fabric.gateway.pieces import Pieces
from fabric.gateway.settings import GatewaySettings
from fabric.gateway.template import ChatTemplate

Result = TypeVar("Result")


def tokens_of_text(folder: Path, text: str) -> list[int]:
    """A text as the model in `folder` reads it, without special tokens. Raises `ModelError`."""
    from tokenizers import Tokenizer as Rust

    rust = Rust.from_str(_tokenizer_json(folder))
    rust.no_truncation()
    return list(rust.encode(text, add_special_tokens=False).ids)


class Tokenizer:
    """One model's tokenizer. Needs tokenizer.json; older files go through transformers once."""

    def __init__(self, model: ServedModel) -> None:
        """Reads the files (about 0.15 s for 50,000 tokens). Raises `ModelError`."""
        from tokenizers import Tokenizer as Rust

        folder = Path(model.folder)
        try:
            text = _tokenizer_json(folder)
            settings = _read_json(folder / "tokenizer_config.json")
            description = orjson.loads(text)
            self._rust = Rust.from_str(text)
            self.pieces = Pieces(description, model.vocab)
            self.template = _template(folder, settings)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"can't read the tokenizer in {folder}: {error}") from error
        self._rust.no_truncation()
        self._rust.no_padding()
        self._bos = self._missing_bos(settings)

    def _missing_bos(self, settings: Mapping[str, Any]) -> list[int]:
        """The begin-of-sequence token, where the config asks for one that the file does not add."""
        name = _content(settings.get("bos_token"))
        if not settings.get("add_bos_token") or name is None:
            return []
        bos = self._rust.token_to_id(name)
        if bos is None or bos in self._rust.encode("a").ids:
            return []
        return [bos]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids. Lets other threads run meanwhile (the batch call releases the GIL)."""
        encoding = self._rust.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        return [*self._bos, *encoding.ids] if add_special_tokens else list(encoding.ids)

    def decode(self, tokens: list[int]) -> str:
        """The text of a whole sequence, special tokens included (as /detokenize shows it)."""
        return str(self._rust.decode(tokens, skip_special_tokens=False))


class Encoder:
    """The model's tokenizer, loaded when first needed, and its thread for long texts.

    One thread: the engine needs the cores. At most `max_waiting_encodes` texts wait for it.
    (A list of tokens is long when a text of as many characters is.)
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._loaded: tuple[str, str] | None = None
        self._tokenizer: Tokenizer | None = None
        self._lock = asyncio.Lock()
        self._threads: ThreadPoolExecutor | None = None
        self._waiting = 0

    async def tokenizer(self, model: ServedModel) -> Tokenizer:
        """The tokenizer of `model`. Raises `ModelError`."""
        identity = (model.folder, model.version)
        if self._loaded != identity or self._tokenizer is None:
            async with self._lock:
                if self._loaded != identity:
                    self._tokenizer = await asyncio.to_thread(Tokenizer, model)
                    self._loaded = identity
        assert self._tokenizer is not None
        return self._tokenizer

    async def encode(
        self, tokenizer: Tokenizer, text: str, *, add_special_tokens: bool
    ) -> list[int]:
        """Token ids of a text of any length. Raises `Overloaded`."""
        return await self._run(
            len(text), lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens)
        )

    async def decode(self, tokenizer: Tokenizer, tokens: list[int]) -> str:
        """The text of any number of tokens. Raises `Overloaded`."""
        return await self._run(len(tokens), lambda: tokenizer.decode(tokens))

    async def names(self, tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
        """Each token's own text. Raises `Overloaded`."""
        spelled = tokenizer.pieces.spelled
        return await self._run(
            len(tokens), lambda: [spelled[t].decode("utf-8", "replace") for t in tokens]
        )

    async def _run(self, size: int, work: Callable[[], Result]) -> Result:
        """Short work here, long work in the thread."""
        if size <= self._settings.inline_encode_chars:
            return work()
        if self._waiting >= self._settings.max_waiting_encodes:
            raise Overloaded("Too many long prompts are being read.", retry_after_s=1.0)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, work)
        finally:
            self._waiting -= 1


def require_template(tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template. Raises `RequestError` for a model that has none."""
    if tokenizer.template is None:
        raise RequestError(
            "This model has no chat template; use /v1/completions.",
            param="messages",
            code="no_chat_template",
        )
    return tokenizer.template


def _tokenizer_json(folder: Path) -> str:
    path = folder / "tokenizer.json"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    from transformers import AutoTokenizer

    converted = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    backend = getattr(converted, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{folder} has no tokenizer.json, and none can be made of its files")
    return str(backend.to_str())


def _template(folder: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
    source = settings.get("chat_template")
    path = folder / "chat_template.jinja"
    if path.is_file():
        source = path.read_text(encoding="utf-8")
    elif isinstance(source, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in source}
        source = named.get("default")
    if not isinstance(source, str):
        source = _read_json(folder / "chat_template.json").get("chat_template")
    if not isinstance(source, str):
        return None
    specials = _read_json(folder / "special_tokens_map.json") | dict(settings)
    names = {key: _content(value) for key, value in specials.items() if key.endswith("_token")}
    return ChatTemplate(source, {key: name for key, name in names.items() if name is not None})


def _content(token: Any) -> str | None:
    """A special token is written as a string or as an object with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    return dict(orjson.loads(path.read_bytes())) if path.is_file() else {}
