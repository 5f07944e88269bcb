"""The demo model as a fixture: fetched into the user's cache on the first run, kept there."""

from __future__ import annotations

import pytest

from fabric.model.progress import ProgressBar
from fabric.model.source import ModelFolder, resolve_model


@pytest.fixture(scope="session")
def demo_model() -> ModelFolder:
    """SmolLM2-135M-Instruct. Use it with `from kit.demo import demo_model`."""
    return resolve_model(None, progress=ProgressBar())
