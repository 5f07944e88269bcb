"""FabricConfig: strict YAML or keyword data -> one frozen object. Composed once, never mutated."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fabric.core.configs import AdmissionConfig
from fabric.core.errors import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Section(BaseModel):
    """Strict and frozen: an unknown key or a wrong type is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSection(Section):
    """Which model, in which number format, on what."""

    source: str | None = Field(None, description="folder, GGUF file or hub id; null: the demo model")
    name: str | None = Field(None, description="name that clients use; null: taken from the source")
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(None, ge=1, description="CPU threads of a worker; null: all cores")
    context_limit: int | None = Field(None, ge=16, description="null: the model's own, within the KV pool")


class KvSection(Section):
    """Where keys and values live. Sizes in bytes; null: a share of the memory that is free at start."""

    block_size: Literal[16, 32] = 16
    device_bytes: int | None = Field(None, ge=1 << 20)
    host_bytes: int = Field(256 << 20, ge=0, description="host pool for swapped sequences")
    prefix_cache: bool = True


class EngineSection(Section):
    """One replica's step."""

    max_sequences: int = Field(64, ge=1, le=1024, description="sequences that run at once")
    step_tokens: int = Field(512, ge=16, description="token budget of one step")
    chunk_tokens: int = Field(512, ge=16, description="most prompt tokens of one sequence in a step")


class AdmissionSection(Section):
    """The bounded queue in front of the engines."""

    max_queued_requests: int = Field(512, ge=1)
    max_queued_tokens: int = Field(1_000_000, ge=1)
    queue_ttl_s: float = Field(120.0, gt=0)

    def core(self) -> AdmissionConfig:
        """The core's own record."""
        return AdmissionConfig(**self.model_dump())


class ServerSection(Section):
    """The HTTP front."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    api_keys: tuple[str, ...] = Field((), description="empty: no key is asked for (loopback only)")
    max_body_bytes: int = Field(4 << 20, ge=1024)
    drain_timeout_s: float = Field(30.0, ge=0)
    ingress_replicas: int = Field(1, ge=1)


class RaySection(Section):
    """The Ray cluster. `address` null: start one here and stop it at the end."""

    address: str | None = None
    object_store_bytes: int = Field(128 << 20, ge=80 << 20)


class FabricConfig(Section):
    """Everything that `fabric serve` can be told."""

    model: ModelSection = ModelSection()
    kv: KvSection = KvSection()
    engine: EngineSection = EngineSection()
    admission: AdmissionSection = AdmissionSection()
    server: ServerSection = ServerSection()
    ray: RaySection = RaySection()
    replicas: int = Field(1, ge=1, description="engine replicas")

    @model_validator(mode="after")
    def _keys_beyond_loopback(self) -> FabricConfig:
        if self.server.host not in LOOPBACK and not self.server.api_keys:
            raise ValueError(
                f"server.host is {self.server.host!r}, which others can reach, and server.api_keys is "
                "empty: set at least one key, or bind to 127.0.0.1"
            )
        return self


def parse_config(data: dict[str, Any]) -> FabricConfig:
    """Validate plain data. Raises `ConfigError` naming the path of every wrong value."""
    try:
        # JSON mode: lists become tuples, but "1" is still no int.
        import json

        return FabricConfig.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def load_config(path: Path) -> FabricConfig:
    """Read a YAML file. Raises `ConfigError`."""
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping at the top level")
    return parse_config(data)


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"]) or "(top level)"
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = f"unknown key; valid here: {', '.join(_keys_at(problem['loc'][:-1]))}"
        lines.append(f"{path}: {message}")
    return "\n".join(lines)


def _keys_at(path: tuple[int | str, ...]) -> list[str]:
    section: Any = FabricConfig
    for part in path:
        section = section.model_fields[str(part)].annotation
    return list(section.model_fields)
