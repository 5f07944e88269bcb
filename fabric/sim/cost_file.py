"""The table that `fabric profile` writes, as a profile."""

from __future__ import annotations

import json
from pathlib import Path

from fabric.core.configs import EngineConfig, PreemptionCosts
from fabric.sim.costs import MeasuredCosts, Profile


def read_costs(path: Path) -> Profile:
    """Raises `ValueError` that names the file, and `OSError`."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        costs, facts = record["costs"], record["engine"]
        front = record.get("front") or {"first_ns": 0, "step_ns": 0, "row_ns": 0}
        front_step_ns = int(front["step_ns"])
        table = tuple((int(tokens), int(ns) + front_step_ns) for tokens, ns in costs["table"])
        if len(table) < 2 or sorted(set(table)) != list(table):
            raise ValueError("costs.table needs two rows and more, tokens rising")
        return Profile(
            name=str(record["name"]),
            kv_bytes=int(facts["kv_bytes"]),
            front_ns=int(front["first_ns"]),
            costs=MeasuredCosts(
                table=table,
                ns_per_context=float(costs["ns_per_context"]),
                ns_per_pair=float(costs["ns_per_pair"]),
                # In the table, but for what a server adds: its decodes have a row a token.
                ns_per_row=int(front["row_ns"]),
                ns_per_copy=int(facts["swap_ns_per_block"]),
            ),
            engine=EngineConfig(
                block_size=int(facts["block_size"]),
                num_blocks=int(facts["num_blocks"]),
                num_host_blocks=int(facts["num_host_blocks"]),
                context_limit=int(facts["context_limit"]),
                preemption=PreemptionCosts(
                    swap_ns_per_block=int(facts["swap_ns_per_block"]),
                    recompute_ns_per_token=int(facts["recompute_ns_per_token"]),
                ),
            ),
        )
    except KeyError as error:
        raise ValueError(f"{path}: no {error.args[0]!r}; is it from `fabric profile`?") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
