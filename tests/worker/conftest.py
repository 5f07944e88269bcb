"""Workers, loaded once: the demo model on the fast path, a tiny one in float32 on torch."""

from __future__ import annotations

import pytest
from kit.cpp import without_cpp
from kit.demo import demo_model
from kit.tiny_models import make_tiny_model

from fabric.model.source import ModelFolder
from fabric.worker.worker import Worker

__all__ = ["demo_model"]


@pytest.fixture(scope="session")
def demo_worker(demo_model: ModelFolder) -> Worker:
    """SmolLM2 on the C++ executor."""
    worker = Worker(demo_model.path, device="cpu")
    if not worker.description.startswith("C++"):
        without_cpp(f"batch invariance is its promise, but {worker.description} runs")
    return worker


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> object:
    """A random Llama of two layers."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_worker(tiny_folder: object) -> Worker:
    """The same in float32, which the torch executor runs."""
    return Worker(tiny_folder, dtype="float32", device="cpu")  # type: ignore[arg-type]
