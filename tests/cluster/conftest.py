"""Everything here runs in a network of its own where the system allows it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kit.demo import demo_model
from kit.fabric_server import FabricServer, serving
from kit.private_network import enter_private_network
from kit.tiny_models import make_tiny_model

__all__ = ["demo_model"]

FLEET = """
model: {name: tiny}
kv: {device_bytes: 4194304, host_bytes: 1048576}
engine: {max_sequences: 4, step_tokens: 32, chunk_tokens: 32}
admission: {max_queued_requests: 4}
server: {ingress_replicas: 2, drain_timeout_s: 5, api_keys: [plain-key]}
replicas: 2
tiers:
  - {name: interactive, ttft_ms: 5000, tpot_ms: 1000, weight: 4.0, reserved_share: 0.25}
  - {name: standard, ttft_ms: 20000, tpot_ms: 1000, weight: 2.0}
  - {name: batch, ttft_ms: 60000, tpot_ms: 2000}
tenants:
  - {name: shop, api_keys: [shop-key], default_tier: interactive}
  - {name: night, api_keys: [night-key], default_tier: batch, highest_tier: batch}
  - {name: trial, api_keys: [trial-key], requests_per_minute: 12}
"""


@pytest.fixture(scope="session", autouse=True)
def private_network(demo_model: object) -> None:
    """The demo model first: from in there it can't be fetched."""
    enter_private_network()


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FabricServer]:
    """Two engines of a tiny model behind two HTTP fronts, on a Ray of their own. Requests show
    `plain-key`, a tenant's without limits, unless they show another."""
    folder = tmp_path_factory.mktemp("fleet")
    model = make_tiny_model(folder / "model", max_position_embeddings=2048)
    (folder / "config.yaml").write_text(FLEET)
    words = (str(model), "--config", str(folder / "config.yaml"))
    with serving(folder, *words, key="plain-key") as running:
        yield running
