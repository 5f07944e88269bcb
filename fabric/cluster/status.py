"""`fabric status`: a running server's record as a table for people or as JSON for programs."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from fabric.core.errors import FabricError

TIMEOUT_S = 10.0
Row = Sequence[str]


def status(url: str, *, api_key: str | None, as_json: bool) -> int:
    """Print the status of the server at `url`; 0 when it is ready, else 1. Raises `FabricError`."""
    record = fetch(url, api_key)
    print(json.dumps(record, indent=2) if as_json else render(record))
    return 0 if record["ready"] else 1


def fetch(url: str, api_key: str | None) -> dict[str, Any]:
    """The record of `/fabric/status`. Raises `FabricError` with a sentence for the terminal."""
    request = urllib.request.Request(f"{url.rstrip('/')}/fabric/status")
    if api_key:
        request.add_header("authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            record: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise FabricError(f"{url} wants an API key: set FABRIC_API_KEY") from None
        if error.code == 503:
            raise FabricError(f"the server at {url} is still loading, or shutting down") from None
        raise FabricError(f"{url} answered {error.code}: is a fabric server there?") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise FabricError(f"can't reach a fabric server at {url}: {reason}") from None
    if not isinstance(record, dict) or not {"ready", "model", "replicas"} <= record.keys():
        raise FabricError(f"{url} answered something else: is a fabric server there?")
    return record


def render(record: dict[str, Any]) -> str:
    """The table."""
    model, replicas = record["model"], record["replicas"]
    state = "ready" if record["ready"] else f"not ready: {record['reason']}"
    lines = [f"{model['name']} (version {model['version']}), {state}", ""]
    lines += table([_HEAD, *map(_replica, replicas)])
    lines += [f"  {one['replica']}: {one['executor']}" for one in replicas]
    lines += [line for one in replicas for line in _handover(one)]
    lines += [f"  {one['replica']} failed: {one['error']}" for one in replicas if one["error"]]
    if shards := [_shard(one["replica"], shard) for one in replicas for shard in one["shards"]]:
        lines += ["", *table([_SHARD_HEAD, *shards])]
    lines += _scaling(record.get("scaling") or [], [one.get("pool", "mixed") for one in replicas])
    queued = sum(one["queued_requests"] for one in record["ingresses"])
    tokens = sum(one["queued_tokens"] for one in record["ingresses"])
    shed = sum(one["shed_total"] for one in record["ingresses"])
    lines += ["", f"queue: {queued} requests, {tokens} tokens; {shed} turned away so far", ""]
    lines += _slo(record.get("slo") or {"series": [], "degraded": ""})
    if record["processes"]:
        lines += table([("process", "pid", "PSS MiB", "of it shared"), *_processes(record)])
        lines.append(f"memory: {_memory(record)}")
    return "\n".join(lines)


_HEAD = (
    "replica", "running", "waiting", "swapped", "KV used", "host used", "prefix hits",
    "prompt tok/s", "gen tok/s", "weights MiB", "KV MiB", "host MiB",
)  # fmt: skip


def _handover(one: dict[str, Any]) -> list[str]:
    """Of a replica in a pool: what it sent and got, and why prompts were computed again."""
    if one.get("pool", "mixed") == "mixed":
        return []
    counts: dict[str, float] = one["handover"]
    seconds = counts.get("seconds_receiving", 0.0)
    received = counts.get("bytes_received", 0.0)
    parts = [f"{counts.get('groups_sent', 0):.0f} KV groups sent"]
    if received:
        parts = [f"{received / 2**20:,.0f} MiB of KV received"]
        parts.append(f"{received / 2**20 / max(seconds, 1e-9):,.0f} MiB/s")
    parts += [
        f"{name.removeprefix('fallback_').replace('_', ' ')}: {count:.0f}"
        for name, count in sorted(counts.items())
        if name.startswith("fallback_")
    ]
    return [f"  {one['replica']}: {one['pool']} pool, {', '.join(parts)}"]


def _scaling(scaling: Sequence[dict[str, Any]], there: Sequence[str]) -> list[str]:
    """A line a pool, `there` the pools of all replicas; and what its last change was for."""
    lines = [""] if scaling else []
    for pool in scaling:
        name = "replicas" if pool["pool"] == "mixed" else f"{pool['pool']} pool"
        number = sum(one == pool["pool"] for one in there)
        lines.append(f"{name}: {number} there, {pool['wanted']} wanted: {pool['why']}")
        lines += [
            f"  last change, {time.strftime('%H:%M:%S', time.localtime(one['at_s']))}: "
            f"{one['before']} to {one['after']}, because {one['why']}"
            for one in pool["changes"][-1:]
        ]
    return lines


def _replica(one: dict[str, Any]) -> Row:
    return (
        one["replica"],
        f"{one['running']}",
        f"{one['waiting']}",
        f"{one['swapped']}",
        f"{one['kv_usage']:.0%}",
        f"{one['host_usage']:.0%}",
        f"{one['prefix_hit_rate']:.0%}",
        f"{one['prompt_tokens_per_s']:.0f}",
        f"{one['generated_tokens_per_s']:.0f}",
        _mib(one["weight_bytes"]),
        _mib(one["kv_pool_bytes"]),
        _mib(one["host_pool_bytes"]),
    )


_SHARD_HEAD = (
    "worker of",
    "tp",
    "pp",
    "ep",
    "node",
    "pid",
    "weights MiB",
    "KV MiB",
    "host MiB",
    "holds",
)


def _shard(replica: str, one: dict[str, Any]) -> Row:
    ranks = (f"{one['tp_rank']}", f"{one['pp_rank']}", f"{one['ep_rank']}")
    sizes = (one["weight_bytes"], one["kv_pool_bytes"], one["host_pool_bytes"])
    return (replica, *ranks, one["node"], f"{one['pid']}", *map(_mib, sizes), one["holds"])


_SLO_HEAD = (
    "by", "name", "requests", "refused", "met 1 min", "met 10 min", "burn 1 min", "good req/s",
    "TTFT p50 ms", "TTFT p99 ms", "TPOT p50 ms", "wait p99 ms",
)  # fmt: skip


def _slo(slo: dict[str, Any]) -> list[str]:
    """Tiers and tenants that had requests in the last ten minutes."""
    shown = [one for one in slo["series"] if one["dimension"] in ("tier", "tenant") and one["name"]]
    if not shown:
        return []
    rows = [
        (
            one["dimension"],
            one["name"],
            f"{one['requests']}",
            f"{one['refused']}",
            f"{one['attainment_minute']:.1%}",
            f"{one['attainment']:.1%}",
            f"{one['burn_rate_minute']:.1f}",
            f"{one['goodput_per_s']:.2f}",
            f"{one['ttft_ms_p50']:.0f}",
            f"{one['ttft_ms_p99']:.0f}",
            f"{one['tpot_ms_p50']:.0f}",
            f"{one['queue_wait_ms_p99']:.0f}",
        )
        for one in shown
    ]
    why = [f"degraded: {slo['degraded']}"] if slo["degraded"] else []
    return [*table([_SLO_HEAD, *rows]), *why, ""]


def _processes(record: dict[str, Any]) -> list[Row]:
    return [
        (one["name"], str(one["pid"]), _mib(one["pss_bytes"]), _mib(one["shared_bytes"]))
        for one in record["processes"]
    ]


def _memory(record: dict[str, Any]) -> str:
    pss = sum(one["pss_bytes"] for one in record["processes"])
    shared = sum(one["shared_bytes"] for one in record["processes"])
    # The host pool lies in the same process, but on the CPU it is untouched until something is
    # swapped; it counts as the server's.
    pools = sum(one["kv_pool_bytes"] for one in record["replicas"])
    rest = pss - shared - pools
    return (
        f"{_mib(pss)} MiB PSS in {len(record['processes'])} processes; "
        f"{_mib(rest)} MiB without KV pool and object store"
    )


def table(rows: Sequence[Row]) -> list[str]:
    """Lines with columns: the first from the left, the others from the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"
