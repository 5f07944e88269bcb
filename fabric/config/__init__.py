"""FabricConfig: strict YAML or keyword data -> one frozen object. Composed once, never mutated."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from fabric.config.autoscaling import AutoscalingSection
from fabric.config.journal import JournalSection
from fabric.config.pools import PoolsSection
from fabric.config.prefix_fetch import PrefixFetchSection
from fabric.config.section import REPLICAS_MAX, Section
from fabric.config.shard import ShardSection
from fabric.config.slo import SloSection
from fabric.core.configs import AdmissionConfig
from fabric.core.errors import ConfigError
from fabric.core.tenants import Tenant
from fabric.core.tiers import BUILT_IN, Tier

LOOPBACK = ("127.0.0.1", "localhost", "::1")
TAKEN_NAMES = ("auto", "default", "scale", "priority", "flex")


class ModelSection(Section):
    """Which model, in which number format, on what."""

    source: str | None = Field(None, description="folder, GGUF file or hub id; null: demo model")
    name: str | None = Field(None, description="name that clients use; null: from the source")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="weights and KV")
    quantization: Literal["int8", "int4"] | None = Field(
        None, description="round plain weights at load, without calibration; null: as stored"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: GPU if there is one")
    threads: int | None = Field(None, ge=1, description="CPU threads of a worker; null: all cores")
    context_limit: int | None = Field(
        None, ge=16, description="prompt and output in tokens; null: the model's own"
    )


class KvSection(Section):
    """Where keys and values of sequences live."""

    block_size: Literal[16, 32] = Field(16, description="tokens in a block")
    device_bytes: int | None = Field(
        None,
        ge=1 << 20,
        description="a worker's KV pool; null: a share of the memory free at start",
    )
    host_bytes: int = Field(
        256 << 20, ge=0, description="host pool of preempted sequences; 0: compute them again"
    )
    prefix_cache: bool = Field(True, description="prompts that begin alike share blocks")
    prefix_fetch: PrefixFetchSection | None = Field(
        None, description="null: replicas don't fetch prefixes from each other"
    )


class EngineSection(Section):
    """One replica's step."""

    max_sequences: int = Field(64, ge=1, le=1024, description="sequences that run at once")
    step_tokens: int = Field(1024, ge=16, description="token budget of one step")
    chunk_tokens: int = Field(
        1024, ge=16, description="most prompt tokens of one sequence in a step"
    )
    patience_s: float = Field(
        30.0, ge=0.1, description="who stood still for so long goes first, whatever its tier"
    )
    step_deadline_s: float = Field(
        30.0, ge=1.0, description="a worker that takes longer, and 20 times as foretold, is hung"
    )


class AdmissionSection(Section):
    """The bounded queue in front of the engines."""

    max_queued_requests: int = Field(512, ge=1, description="beyond: 429 with Retry-After")
    max_queued_tokens: int = Field(1_000_000, ge=1, description="beyond: 429 with Retry-After")
    queue_ttl_s: float = Field(120.0, gt=0, description="longest wait before it is turned away")
    tenant_share: float = Field(
        1.0, gt=0, le=1, description="the part of the queue that one tenant may fill"
    )

    def core(self) -> AdmissionConfig:
        """The core's own record."""
        return AdmissionConfig(**self.model_dump())


class RouterSection(Section):
    """Which replica gets a request."""

    policy: Literal["cost", "round_robin", "least_requests", "random", "affinity"] = Field(
        "cost", description="where it would be done first; the others: to compare with"
    )


class ServerSection(Section):
    """The HTTP front."""

    host: str = Field("127.0.0.1", description="anything but loopback needs api_keys")
    port: int = Field(8000, ge=1, le=65535, description="of the HTTP front")
    api_keys: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), repr=False, description="keys that clients must send; none: open"
    )
    max_body_bytes: int = Field(4 << 20, ge=1024, description="longest request body; beyond: 413")
    drain_timeout_s: float = Field(
        30.0, ge=0, description="how long running requests may take after SIGTERM"
    )
    ingress_replicas: int = Field(1, ge=1, le=REPLICAS_MAX, description="HTTP processes")


class TierSection(Section):
    """One SLO tier."""

    name: str = Field(
        pattern=r"^[a-z][a-z0-9_-]{0,31}$", description="what `service_tier` may ask for"
    )
    ttft_ms: int = Field(gt=0, description="target: time to the first token")
    tpot_ms: int = Field(gt=0, description="target: time per output token after the first")
    weight: float = Field(1.0, gt=0, le=1000, description="share under contention, relative")
    reserved_share: float = Field(0.0, ge=0, lt=1, description="kept from lower tiers, 0 to 1")
    deadline_ms: int | None = Field(
        None, ge=1, le=86_400_000, description="of a request that names none; null: none"
    )

    def core(self) -> Tier:
        """The core's own record."""
        return Tier(**self.model_dump())


class TenantSection(Section):
    """One tenant: its keys, and what they may use."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="in logs, metrics")
    api_keys: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), repr=False, description="keys of this tenant; each is one tenant's only"
    )
    default_tier: str = Field("standard", description="of requests that name none, or `auto`")
    highest_tier: str = Field(
        BUILT_IN[0].name, description="who asks for a higher one is served at this one"
    )
    weight: float = Field(1.0, gt=0, le=1000, description="share under contention, relative")
    requests_per_minute: int | None = Field(None, ge=1, description="beyond: 429; null: no limit")
    tokens_per_minute: int | None = Field(
        None, ge=1, description="prompt and output; beyond: 429; null: no limit"
    )
    max_concurrent: int | None = Field(
        None, ge=1, description="requests that run at once, others wait; null: no limit"
    )

    def core(self) -> Tenant:
        """The core's own record, which has no keys."""
        return Tenant(**self.model_dump(exclude={"api_keys"}))


class RaySection(Section):
    """The Ray cluster."""

    object_store_bytes: int = Field(128 << 20, ge=80 << 20, description="of a cluster started here")


class FabricConfig(Section):
    """Everything that `fabric serve` can be told."""

    model: ModelSection = ModelSection()
    kv: KvSection = KvSection()
    engine: EngineSection = EngineSection()
    shard: ShardSection = ShardSection()
    admission: AdmissionSection = AdmissionSection()
    router: RouterSection = RouterSection()
    server: ServerSection = ServerSection()
    ray: RaySection = RaySection()
    replicas: int = Field(
        1, ge=1, le=REPLICAS_MAX, description="engine replicas, where autoscaling is off"
    )
    autoscaling: AutoscalingSection | None = Field(None, description="null: a fixed number")
    pools: PoolsSection | None = Field(None, description="null: replicas do prompts and outputs")

    @property
    def first_replicas(self) -> int:
        """Engine replicas at start; with autoscaling at least one, to see that it can load."""
        if self.pools:
            return self.pools.first_replicas
        return max(1, self.autoscaling.min_replicas) if self.autoscaling else self.replicas

    @property
    def most_replicas(self) -> int:
        """Engine replicas that may run at once."""
        if self.pools:
            return self.pools.most_replicas
        return self.autoscaling.max_replicas if self.autoscaling else self.first_replicas

    @property
    def most_workers(self) -> int:
        """Workers of all replicas that may run at once."""
        alone = self.most_replicas * self.shard.core().workers
        return self.pools.most_workers if self.pools else alone

    @property
    def scaled_pools(self) -> tuple[str, ...]:
        """Names of pools whose number of replicas is not fixed."""
        if self.pools:
            return self.pools.scaled
        return ("mixed",) if self.autoscaling else ()

    tiers: tuple[TierSection, ...] = Field(
        tuple(TierSection(**asdict(tier)) for tier in BUILT_IN),
        description="the most important first; with interactive, standard and batch among them",
    )
    tenants: tuple[TenantSection, ...] = Field((), description="who has keys of their own")
    slo: SloSection = SloSection()
    journal: JournalSection | None = Field(None, description="null: nothing is written down")

    def api_keys(self) -> tuple[str, ...]:
        """Every API key. None: the door is open."""
        return (*self.server.api_keys, *(k for t in self.tenants for k in t.api_keys))

    @model_validator(mode="after")
    def _pools_stand_alone(self) -> FabricConfig:
        fixed = self.autoscaling is None and self.replicas == 1 and self.shard == ShardSection()
        if self.pools and not fixed:
            raise ValueError("pools: replicas, shard and autoscaling are given in each of them")
        return self

    @model_validator(mode="after")
    def _prefixes_are_fetched_between_equals(self) -> FabricConfig:
        if self.kv.prefix_fetch and (self.pools or not self.kv.prefix_cache):
            raise ValueError("kv.prefix_fetch: it needs kv.prefix_cache, and no pools")
        return self

    @model_validator(mode="after")
    def _keys_beyond_loopback(self) -> FabricConfig:
        if self.server.host not in LOOPBACK and not self.api_keys():
            raise ValueError(
                f"server.host is {self.server.host!r}, which others can reach, and "
                "server.api_keys is empty: set at least one key, or bind to 127.0.0.1"
            )
        return self

    @model_validator(mode="after")
    def _tiers_have_names(self) -> FabricConfig:
        names = [tier.name for tier in self.tiers]
        missing = [tier.name for tier in BUILT_IN if tier.name not in names]
        if missing:
            raise ValueError(
                f"tiers has no {', '.join(missing)}: OpenAI's priority, default and flex mean "
                "interactive, standard and batch"
            )
        if taken := [name for name in names if name in TAKEN_NAMES]:
            raise ValueError(f"tiers has {taken[0]!r}, a name with a meaning in OpenAI's API")
        if len(set(names)) < len(names):
            raise ValueError("tiers has a name twice")
        if sum(tier.reserved_share for tier in self.tiers) >= 1:
            raise ValueError("tiers: the reserved shares leave nothing, their sum must be below 1")
        for number, rung in enumerate(self.slo.ladder):
            if rung.tier is not None and rung.tier not in names:
                raise ValueError(f"slo.ladder.{number}.tier: tiers has {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _tenants_are_told_apart(self) -> FabricConfig:
        ranks = {tier.name: rank for rank, tier in enumerate(self.tiers)}
        for number, tenant in enumerate(self.tenants):
            for key in ("default_tier", "highest_tier"):
                if getattr(tenant, key) not in ranks:
                    raise ValueError(f"tenants.{number}.{key}: tiers has {', '.join(ranks)}")
            if ranks[tenant.default_tier] < ranks[tenant.highest_tier]:
                raise ValueError(f"tenants.{number}.default_tier is above its highest_tier")
        if len({tenant.name for tenant in self.tenants}) < len(self.tenants):
            raise ValueError("tenants has a name twice")
        if len(set(self.api_keys())) < len(self.api_keys()):
            raise ValueError("an API key is there twice: whose requests are its requests?")
        return self


def parse_config(data: Mapping[str, Any]) -> FabricConfig:
    """Validate plain data. Raises `ConfigError`: a line for each wrong value, its path and why."""
    try:
        # By way of JSON, because a YAML list is a fine tuple, while "1" is still no int.
        return FabricConfig.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def load_config(path: Path) -> FabricConfig:
    """Read and validate a YAML file. Raises `ConfigError`."""
    try:
        return parse_config(read_config(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, not validated yet; an empty file is an empty mapping."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)  # noqa: S506
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if data is not None and not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping at the top level")
    return data or {}


def as_yaml(data: Mapping[str, Any]) -> str:
    """Plain data as YAML, in its own order."""
    text: str = yaml.safe_dump(dict(data), sort_keys=False)
    return text


def override(data: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `data` with the values at dotted paths ("server.port") replaced or added."""
    result = dict(data)
    for path, value in values.items():
        head, _, rest = path.partition(".")
        section = result.get(head) or {}
        if not rest:
            result[head] = value
        elif isinstance(section, dict):  # else leave it for `parse_config` to refuse
            result[head] = override(section, {rest: value})
    return result


class _UniqueKeys(yaml.SafeLoader):
    """YAML that refuses a key given twice; the plain loader keeps the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            keys = [str(key.value) for key, _ in node.value]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            problem = f"given twice: {', '.join(twice)}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return mapping


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors(include_input=False, include_url=False):
        path = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = f"unknown key; valid here: {', '.join(_keys_at(problem['loc'][:-1]))}"
        lines.append(f"{path}: {message}" if path else message)
    return "\n".join(lines)


def _keys_at(path: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] = FabricConfig
    for part in path:
        if isinstance(part, int):  # a place in a list of sections: its name led here already
            continue
        annotation = section.model_fields[part].annotation
        choices = [annotation, *get_args(annotation)]  # a section, `Section | None`, a list of them
        section = next(c for c in choices if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)
