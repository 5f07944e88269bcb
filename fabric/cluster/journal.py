"""The journal of a live process: `journal:` in the configuration -> a recorder, or none."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from fabric.config.journal import JournalSection
from fabric.core.journal import Recorder
from fabric.journal.writer import Place, Writer


def recorder_of(
    section: JournalSection | None, stream: str, name: str, *, keyed: bool = True
) -> Recorder | None:
    """Writes in the background, for as long as this process lives. See `Place` for `keyed`."""
    if section is None:
        return None
    hide = section.tokens == "hashed"
    place = Place(
        folder=Path(section.path).expanduser(),
        stream=stream,
        name=name,
        run=f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}",
        file_bytes=section.file_bytes,
        files=section.files,
        hide=hide,
        keyed=keyed,
    )
    return Recorder(Writer(place), hide=hide)
