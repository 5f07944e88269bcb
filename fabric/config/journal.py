"""`journal:` in the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fabric.config.section import Section


class JournalSection(Section):
    """Where engines, dispatchers and the autoscaler write down what they decide."""

    path: str = Field(
        pattern="^[/~]", description="folder on each node, from / or ~ on; made if it is not there"
    )
    file_bytes: int = Field(64 << 20, ge=1 << 16, description="then a new file is begun")
    files: int = Field(8, ge=1, description="so many of each process are kept")
    tokens: Literal["hashed", "raw"] = Field(
        "hashed", description="raw: with what prompts and answers say"
    )
