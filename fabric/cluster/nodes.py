"""`fabric status --address`: a cluster's nodes, and the application that runs on them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from fabric.cluster import status
from fabric.cluster.app import NAME, ingress_handle
from fabric.cluster.deploy import connect
from fabric.core.errors import FabricError

TIMEOUT_S = 10.0
SHOWN = ("CPU", "GPU", "memory", "object_store_memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRow:
    """One node that has ever joined. `free`, `total`: of each resource that Ray counts there."""

    node: str
    host: str
    alive: bool
    head: bool
    why: str
    total: dict[str, float]
    free: dict[str, float]


def cluster_status(address: str, *, as_json: bool) -> int:
    """Print what runs on the cluster at `address`; 0 when the application is ready, else 1."""
    connect(address)
    nodes = nodes_of_cluster()
    record = _application()
    if as_json:
        print(json.dumps((record or {}) | {"nodes": [asdict(one) for one in nodes]}, indent=2))
    else:
        print("\n".join(render_nodes(nodes)) + "\n")
        print(status.render(record) if record else f"{NAME} is not deployed")
    return 0 if record and record["ready"] else 1


def nodes_of_cluster() -> list[NodeRow]:
    """The head first, then by address; those that died last."""
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    rows = [
        NodeRow(
            node=one["NodeID"],
            host=one["NodeManagerAddress"],
            alive=one["Alive"],
            head="node:__internal_head__" in one["Resources"],
            why=one.get("DeathReasonMessage") or "",
            total={name: one["Resources"].get(name, 0.0) for name in SHOWN},
            free={name: free.get(one["NodeID"], {}).get(name, 0.0) for name in SHOWN},
        )
        for one in ray.nodes()
    ]
    return sorted(rows, key=lambda one: (not one.alive, not one.head, one.host))


def render_nodes(nodes: list[NodeRow]) -> list[str]:
    """The table."""
    head = ("node", "host", "", "CPU free", "of", "GPU free", "of", "memory MiB", "store MiB")
    rows = [
        (
            one.node[:8],
            one.host,
            ("head" if one.head else "") if one.alive else "dead",
            *(
                f"{value:g}"
                for name in ("CPU", "GPU")
                for value in (one.free[name], one.total[name])
            ),
            f"{one.total['memory'] / 2**20:,.0f}",
            f"{one.total['object_store_memory'] / 2**20:,.0f}",
        )
        for one in nodes
    ]
    return status.table([head, *rows])


def _application() -> dict[str, Any] | None:
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    if NAME not in serve.status().applications:
        return None
    try:
        found: dict[str, Any] = (
            ingress_handle().options(method_name="status").remote().result(timeout_s=TIMEOUT_S)
        )
    except (RayError, RayServeException, TimeoutError) as error:
        raise FabricError(f"{NAME} does not answer: {error}") from None
    return found
