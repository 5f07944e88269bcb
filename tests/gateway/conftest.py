"""A gateway in front of a real engine, and its client. Each test ends with everything freed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from kit.asgi import client_of
from kit.local_backend import LocalBackend, served
from kit.tokenizers import byte_level, sentence_piece

from fabric.gateway.api import create_app
from fabric.gateway.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with a chat template."""
    return byte_level(tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="session")
def sentence_piece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece-like tokenizer."""
    return sentence_piece(tmp_path_factory.mktemp("sentence_piece"))


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(served(folder))


@pytest.fixture
async def backend(folder: Path) -> AsyncIterator[LocalBackend]:
    backend = LocalBackend(folder)
    yield backend
    backend.assert_idle()


@pytest.fixture
async def client(backend: LocalBackend) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(create_app(backend)) as client:
        yield client
