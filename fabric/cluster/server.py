"""A Ray cluster with the application on it, as the launcher sees it: start, ask, drain, stop."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fabric.cluster import app
from fabric.cluster.guardian import Guardian
from fabric.cluster.run import Run
from fabric.config import FabricConfig
from fabric.gateway.backend import ServedModel

if TYPE_CHECKING:
    from fabric.cluster.progress import Line

DRAIN_POLL_S = 0.2
CALL_TIMEOUT_S = 5.0

log = logging.getLogger("fabric.cluster")


class Server:
    """Everything that `fabric serve` starts. `prepare_environment` comes first."""

    def __init__(self, config: FabricConfig, model: ServedModel, run: Run) -> None:
        self.config = config
        self.model = model
        self.run = run
        self.loaded = False
        self._seen: set[bytes] = set()
        self._guardian: Guardian | None = None
        self._ray: Any = None
        self._ingress_handle: Any = None

    def start(self) -> None:
        """Start Ray, then Serve; returns before the model is loaded."""
        import ray

        self._ray = ray
        self._guardian = Guardian(self.run.folder)
        _leave_out_what_nobody_uses()
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        ray.init(
            address="local",
            num_cpus=app.ray_cpus(self.config),
            num_gpus=None,
            include_dashboard=False,
            object_store_memory=self.config.ray.object_store_bytes,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=str(self.run.folder / "ray"),
            _node_ip_address="127.0.0.1",
        )
        app.deploy(self.config, self.model, self.run)

    def progress(self) -> list[Line]:
        """What the replicas have said since the last call."""
        from fabric.cluster.progress import read_lines

        return read_lines(self._seen)

    def replicas_are_running(self) -> bool:
        """All replicas of both deployments have been constructed, and every front has heard of
        every engine: none of them would answer an early client with a 503."""
        application = self._application()
        if application is None or application.status != "RUNNING":
            return False
        try:
            seen = self._fronts().broadcast("replicas_seen").results(timeout_s=CALL_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001 - a front is still starting
            log.debug("asking the fronts: %s", type(error).__name__)
            return False
        return len(seen) >= self.config.server.ingress_replicas and min(seen) >= (
            self.config.first_replicas
        )

    def problem(self) -> str | None:
        """Why the application will not start, as Serve sees it."""
        application = self._application()
        if application is None or application.status != "DEPLOY_FAILED":
            return None
        return f"the application did not start: {application.message[:500]}"

    def dead_processes(self) -> str:
        """Names of Ray's own processes that have died."""
        node = self._ray._private.worker._global_node
        dead = node.dead_processes() if node is not None else [("ray", None)]
        return ", ".join(str(kind) for kind, _ in dead)

    def drain(self, hurry: Callable[[], bool]) -> int:
        """Refuse new requests and wait for the running ones; how many are left at the end.

        `hurry`: asked all the time; True ends the wait.
        """
        deadline = time.monotonic() + self.config.server.drain_timeout_s
        while True:
            try:
                left = sum(self._fronts().broadcast("drain").results(timeout_s=CALL_TIMEOUT_S))
            except Exception as error:  # noqa: BLE001 - an ingress is busy, or gone: ask again
                log.warning("asking how many requests are left: %s", type(error).__name__)
                left = 1
            if not left or hurry() or time.monotonic() > deadline:
                return left
            time.sleep(DRAIN_POLL_S)

    def stop(self, *, keep_logs: bool) -> None:
        """End everything that was started, by force if need be. Never raises for what is gone.

        `keep_logs`: Ray's own go to the run's log folder; the run's private folder is removed.
        """
        if self._ray is not None and self._ray.is_initialized():
            if self.loaded:  # before that Serve would wait for what is just being made
                from ray import serve

                with suppress(Exception):
                    serve.shutdown()
            with suppress(Exception):
                self._ray.shutdown()
        if self._guardian is not None:
            self._guardian.release()
        if keep_logs:
            with suppress(OSError, shutil.Error):
                ray_logs = self.run.folder / "ray" / "session_latest" / "logs"
                shutil.copytree(ray_logs, self.run.logs / "ray", ignore_dangling_symlinks=True)
        shutil.rmtree(self.run.folder, ignore_errors=True)

    def _fronts(self) -> Any:
        """The handle of all ingresses: one for the run, since each has threads of its own."""
        if self._ingress_handle is None:
            self._ingress_handle = app.ingress_handle()
        return self._ingress_handle

    def _application(self) -> Any:
        from ray import serve

        return serve.status().applications.get(app.NAME)


def _leave_out_what_nobody_uses() -> None:
    """Start Ray without the cluster autoscaler's monitor, the log monitor (it copies what workers
    print to a driver's terminal) and the dashboard's head.

    Together 170 MB, and on two cores they compete with the model's loading. `ray.init` has no
    option for it: the methods of Ray 2.60's `Node` that start them do nothing in this process.
    """
    import ray._private.worker as driver
    from ray._private.node import Node

    driver.listen_error_messages = _nothing  # prints what only Ray's own developers understand
    for name in ("start_monitor", "start_log_monitor", "start_api_server"):
        assert hasattr(Node, name), f"Ray has changed: Node.{name}"
        setattr(Node, name, _nothing)


def _nothing(*_: object, **__: object) -> None:
    """In place of a process that is not started."""
