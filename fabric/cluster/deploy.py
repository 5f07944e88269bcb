"""`fabric deploy`: a running cluster becomes what a configuration says, and only where it differs.

    CONFIG.yaml ──> serve_config ──> Serve's own declarative form ──┬─> `serve deploy` takes it too
                                                                    │
    what Serve runs now ──> differences ── none: nothing to do      └─> Serve's controller

Serve keeps the form it was given, so nothing else remembers what is deployed. `replicas`, of a pool
too, stands beside the application and changes in place. Everything else is an argument of the
application: its replicas are replaced one by one, each by a new one that is ready before the old
one stops.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fabric import __version__
from fabric.cluster.app import DECODE, ENGINE, NAME, PREFILL
from fabric.config import FabricConfig, override, parse_config
from fabric.core.errors import ConfigError, FabricError

if TYPE_CHECKING:
    from ray.serve.schema import ServeDeploySchema

BUILDER = "fabric.driver:application"
DEPLOY_TIMEOUT_S = 1800.0
POLL_S = 0.5
SECRET = "api_keys"
# Requests of one model must not reach replicas of another one, and Serve replaces fronts and
# engines in no order that would keep them apart.
FIXED = ("model.source", "model.name", "model.dtype", "model.quantization")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One setting that is not as it should be, as text."""

    path: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"  {self.path}: {self.before} -> {self.after}"


def serve_config(config: FabricConfig) -> dict[str, Any]:
    """The configuration as `serve deploy` takes it: plain data, API keys included."""
    settings = config.model_dump(mode="json", exclude_defaults=True)
    application: dict[str, Any] = {
        "name": NAME,
        "route_prefix": "/",
        "import_path": BUILDER,
        "args": {"fabric": __version__, "config": settings},
    }
    if numbers := _take_numbers(config, settings):
        application["deployments"] = [
            {"name": name, "num_replicas": number} for name, number in numbers.items()
        ]
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": config.server.host, "port": config.server.port},
        "applications": [application],
    }


def _take_numbers(config: FabricConfig, settings: dict[str, Any]) -> dict[str, int]:
    """Out of the settings: how many replicas each deployment has, where that is fixed."""
    if config.pools is None:
        settings.pop("replicas", None)
        return {} if config.autoscaling else {ENGINE: config.replicas}
    numbers = {}
    for name, pool in ((PREFILL, config.pools.prefill), (DECODE, config.pools.decode)):
        if pool.autoscaling is None:
            numbers[name] = pool.replicas
            section = settings["pools"].pop(name, {})
            section.pop("replicas", None)
            if section:  # else it is as if nothing was said
                settings["pools"][name] = section
    return numbers


def config_of(application: Mapping[str, Any]) -> FabricConfig:
    """What `serve_config` made the application from. Raises `ConfigError`."""
    return parse_config(_data_of(application))


def differences(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> list[Difference]:
    """Between two applications, as `serve_config` writes them; None: there is none yet."""
    new = _settings(after)
    old = _settings(before) if before is not None else {}
    return [
        Difference(path=path, before=old.get(path, "(none)"), after=new.get(path, "(none)"))
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
    ]


def deploy(config: FabricConfig, *, address: str, dry_run: bool, say: Say) -> int:
    """Bring the cluster at `address` to `config` and wait until it is so; 0 then. `dry_run`: only
    say what would change. Raises `ConfigError`, `FabricError`."""
    connect(address)
    wanted = serve_config(config)
    running = _running()
    others = [one for one in running if one["name"] != NAME]
    before = next((one for one in running if one["name"] == NAME), None)
    changes = differences(before, wanted["applications"][0])
    if before is None:
        say(f"{NAME}: new")
    elif not changes and _status() == "RUNNING":
        say(f"{NAME} is as the configuration says; nothing to change")
        return 0
    else:
        say("\n".join([f"{NAME}: {len(changes)} settings change", *map(str, changes)]))
        _refuse_what_cannot_roll(changes)
    if dry_run:
        return 0
    from ray.serve.schema import ServeDeploySchema

    # Serve takes down what the form does not name.
    wanted["applications"] += others
    _apply(ServeDeploySchema(**wanted), say)
    say(f"{NAME} runs on {config.server.host}:{config.server.port} of the head node")
    return 0


def connect(address: str) -> None:
    """Become a driver of the cluster at `address`, on one of its nodes. Raises `FabricError`."""
    import logging

    import ray

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        ray.init(address=address, namespace="serve", log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise FabricError(
            f"no Ray cluster at {address}: {reason}. This command runs on a node of the cluster: "
            "`ray exec cluster.yaml 'fabric deploy ...'`"
        ) from None


def _settings(application: Mapping[str, Any]) -> dict[str, str]:
    """Every setting by its path; secrets as how many there are and a fingerprint."""
    found = {"fabric": str(application.get("args", {}).get("fabric"))}
    try:
        data = config_of(application).model_dump(mode="json")
    except ConfigError:  # another version wrote it, with keys that are gone
        data = _data_of(application)
    _flatten("", data, found)
    return found


def _data_of(application: Mapping[str, Any]) -> dict[str, Any]:
    data = dict(application.get("args", {}).get("config", {}))
    for one in application.get("deployments", ()):
        name, number = one["name"], one.get("num_replicas")
        if number is None:
            continue
        if name == ENGINE:
            data["replicas"] = number
        elif name in (PREFILL, DECODE):
            data = override(data, {f"pools.{name}.replicas": number})
    return data


def _flatten(path: str, value: Any, found: dict[str, str]) -> None:
    if path.rpartition(".")[2] == SECRET:
        from hashlib import sha256

        digest = sha256(repr(value).encode()).hexdigest()[:8]
        found[path] = f"{len(value)} keys ({digest})" if value else "none"
    elif isinstance(value, dict):
        for key, one in value.items():
            _flatten(f"{path}.{key}" if path else key, one, found)
    elif isinstance(value, list) and any(isinstance(one, dict) for one in value):
        for number, one in enumerate(value):
            _flatten(f"{path}.{number}", one, found)
    else:
        found[path] = "none" if value is None else str(value)


def _refuse_what_cannot_roll(changes: list[Difference]) -> None:
    paths = [one.path for one in changes]
    if fixed := [path for path in paths if path in FIXED]:
        raise ConfigError(
            f"{', '.join(fixed)}: another model can't take over from a running one. "
            "Take it down first: `serve shutdown`"
        )
    if address := [path for path in paths if path in ("server.host", "server.port")]:
        raise ConfigError(
            f"{', '.join(address)}: Serve binds its address once. Take it down first: "
            "`serve shutdown`"
        )


def _running() -> list[dict[str, Any]]:
    """Serve's applications, as they were given to it; none where Serve is not running."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return []
    details = client.get_serve_details()
    return [
        one["deployed_app_config"]
        for one in details["applications"].values()
        if one["deployed_app_config"]
    ]


def _status() -> str:
    from ray import serve

    application = serve.status().applications.get(NAME)
    return str(application.status.value) if application else "NOT_STARTED"


def _apply(schema: ServeDeploySchema, say: Say) -> None:
    from ray import serve
    from ray.serve.context import _get_global_client

    from fabric.cluster.progress import read_lines

    seen: set[bytes] = set()
    read_lines(seen)  # of earlier replicas
    serve.start(proxy_location=schema.proxy_location, http_options=schema.http_options.model_dump())
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(schema)
    deadline = time.monotonic() + DEPLOY_TIMEOUT_S
    while True:
        for line in read_lines(seen):
            say(f"  {line.replica}: {line.text}")
        application = serve.status().applications.get(NAME)
        if application is not None:
            if application.status == "RUNNING":
                return
            if application.status == "DEPLOY_FAILED":
                raise FabricError(f"it did not start: {_reason(application.message)}")
        if time.monotonic() > deadline:
            raise FabricError(f"not ready after {DEPLOY_TIMEOUT_S:.0f} s: `serve status` says more")
        time.sleep(POLL_S)


def _reason(message: str) -> str:
    """The last line of a traceback says what is wrong."""
    lines = [line for line in message.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "Serve does not say why"
