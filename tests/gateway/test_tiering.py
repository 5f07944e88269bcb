"""Tiers, deadlines, tenants: what a request asks for, what its key allows, what the answer says."""

from __future__ import annotations

import io
from typing import Any

import httpx
import pytest
from kit.asgi import client_of
from kit.local_backend import LocalBackend

from fabric.core.tenants import Tenant
from fabric.core.tiers import BUILT_IN, Tier
from fabric.gateway.api import create_app
from fabric.gateway.logs import LOGGER, log_to
from fabric.gateway.settings import GatewaySettings, KeyHolder

PATH = "/v1/completions"
BODY: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 2}
TENANTS = (
    KeyHolder(tenant=Tenant(name="shop", default_tier="interactive"), api_keys=("shopkey", "till")),
    KeyHolder(
        tenant=Tenant(name="night", default_tier="batch", highest_tier="batch"),
        api_keys=("nightkey",),
    ),
    KeyHolder(tenant=Tenant(name="trial", highest_tier="standard"), api_keys=("trialkey",)),
)
SETTINGS = GatewaySettings(api_keys=("plain",), tenants=TENANTS)


def client_for(backend: LocalBackend, settings: GatewaySettings = SETTINGS) -> httpx.AsyncClient:
    return client_of(create_app(backend, settings))


async def ask(
    backend: LocalBackend, key: str, asked: str | None = None, **headers: str
) -> tuple[httpx.Response, str, str]:
    """The answer, and tier and tenant of the request that reached the backend."""
    body = BODY if asked is None else {**BODY, "service_tier": asked}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with client_for(backend) as client:
        answer = await client.post(
            PATH, json=body, headers={"authorization": f"Bearer {key}", **named}
        )
    assert answer.status_code == 200, answer.text
    request = backend.requests[-1]
    assert answer.headers["x-fabric-tier"] == request.tier
    return answer, request.tier, request.tenant


@pytest.mark.parametrize(
    ("key", "asked", "tier", "said"),
    [
        ("plain", None, "standard", None),
        ("plain", "auto", "standard", "default"),
        ("plain", "default", "standard", "default"),
        ("plain", "scale", "standard", "default"),
        ("plain", "priority", "interactive", "priority"),
        ("plain", "flex", "batch", "flex"),
        ("plain", "interactive", "interactive", "interactive"),
        ("shopkey", None, "interactive", None),
        ("shopkey", "auto", "interactive", "priority"),
        ("till", "default", "standard", "default"),
        ("nightkey", "auto", "batch", "flex"),
        ("nightkey", "priority", "batch", "flex"),
        ("nightkey", "standard", "batch", "batch"),
        ("trialkey", "interactive", "standard", "standard"),
        ("trialkey", "flex", "batch", "flex"),
    ],
)
async def test_the_tier_is_what_was_asked_but_never_above_the_keys(
    backend: LocalBackend, key: str, asked: str | None, tier: str, said: str | None
) -> None:
    answer, got, _ = await ask(backend, key, asked)
    assert (got, answer.json().get("service_tier")) == (tier, said)


async def test_the_header_wins_over_the_body_and_is_clamped_too(backend: LocalBackend) -> None:
    answer, tier, _ = await ask(backend, "plain", "flex", x_fabric_tier="interactive")
    assert (tier, answer.json()["service_tier"]) == ("interactive", "priority")
    _, tier, tenant = await ask(backend, "nightkey", None, x_fabric_tier="priority")
    assert (tier, tenant) == ("batch", "night")


async def test_a_streams_events_say_the_tier(backend: LocalBackend) -> None:
    async with client_for(backend) as client:
        answer = await client.post(
            PATH,
            json={**BODY, "stream": True, "service_tier": "priority"},
            headers={"authorization": "Bearer trialkey"},
        )
    assert answer.headers["x-fabric-tier"] == "standard"
    events = [line for line in answer.text.splitlines() if '"choices"' in line]
    assert events
    assert all('"service_tier":"default"' in line for line in events)


async def test_a_key_is_its_tenants_and_tenants_are_apart(backend: LocalBackend) -> None:
    found = [(await ask(backend, key))[2] for key in ("plain", "shopkey", "till", "nightkey")]
    assert found == ["", "shop", "shop", "night"]
    async with client_for(backend) as client:
        for key in ("Plain", "shopke", "", "shopkey2"):
            answer = await client.post(PATH, json=BODY, headers={"authorization": f"Bearer {key}"})
            assert answer.status_code == 401
    open_door = GatewaySettings(tenants=TENANTS[:1])
    async with client_for(backend, open_door) as client:
        assert (await client.post(PATH, json=BODY)).status_code == 401, "a tenant's key shuts it"


@pytest.mark.parametrize(
    ("headers", "body", "param"),
    [
        ({}, {"service_tier": "fast"}, "service_tier"),
        ({}, {"service_tier": ""}, "service_tier"),
        ({}, {"service_tier": 3}, "service_tier"),
        ({"x-fabric-tier": "fast"}, {}, "x-fabric-tier"),
        ({"x-fabric-tier": ""}, {}, "x-fabric-tier"),
        ({"x-fabric-deadline-ms": "soon"}, {}, "x-fabric-deadline-ms"),
        ({"x-fabric-deadline-ms": "0"}, {}, "x-fabric-deadline-ms"),
        ({"x-fabric-deadline-ms": "-5"}, {}, "x-fabric-deadline-ms"),
        ({"x-fabric-deadline-ms": "1.5"}, {}, "x-fabric-deadline-ms"),
        ({"x-fabric-deadline-ms": "86400001"}, {}, "x-fabric-deadline-ms"),
        ({"x-fabric-deadline-ms": "9" * 400}, {}, "x-fabric-deadline-ms"),
    ],
)
async def test_what_is_wrong_is_named(
    backend: LocalBackend, headers: dict[str, str], body: dict[str, Any], param: str
) -> None:
    async with client_for(backend, GatewaySettings()) as client:
        answer = await client.post(PATH, json={**BODY, **body}, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


async def test_a_deadline_counts_from_arrival_and_a_tier_may_have_one(
    backend: LocalBackend,
) -> None:
    await ask(backend, "plain", None, x_fabric_deadline_ms="1500")
    request = backend.requests[-1]
    assert request.deadline == request.arrival + 1_500_000_000
    await ask(backend, "plain")
    assert backend.requests[-1].deadline is None
    tiers = (*BUILT_IN, Tier(name="patient", ttft_ms=1, tpot_ms=1, deadline_ms=9_000))
    async with client_for(backend, GatewaySettings(tiers=tiers)) as client:
        answer = await client.post(PATH, json={**BODY, "service_tier": "patient"})
    assert answer.headers["x-fabric-tier"] == "patient"
    request = backend.requests[-1]
    assert request.deadline == request.arrival + 9_000_000_000


@pytest.mark.parametrize("stream", [False, True])
async def test_a_degraded_answer_says_so(backend: LocalBackend, stream: bool) -> None:
    async with client_for(backend, GatewaySettings()) as client:
        plain = await client.post(PATH, json={**BODY, "stream": stream})
        backend.worse = "max_tokens"
        worse = await client.post(PATH, json={**BODY, "stream": stream})
    assert "x-fabric-degraded" not in plain.headers
    assert worse.headers["x-fabric-degraded"] == "max_tokens"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_says_where_it_ran_and_how_long_it_waited(
    backend: LocalBackend, stream: bool
) -> None:
    async with client_for(backend, GatewaySettings()) as client:
        answer = await client.post(PATH, json={**BODY, "stream": stream})
    assert answer.headers["x-fabric-replica"] == "tiny"
    assert answer.headers["x-fabric-queue-ms"] == "1.2"


async def test_the_log_says_tenant_and_tier_and_no_key(backend: LocalBackend) -> None:
    stream = io.StringIO()
    handler = log_to(stream)
    try:
        await ask(backend, "nightkey", "priority")
    finally:
        LOGGER.removeHandler(handler)
    text = stream.getvalue()
    assert '"tenant":"night","tier":"batch"' in text
    assert "nightkey" not in text
    assert "nightkey" not in repr(SETTINGS)


async def test_the_document_lists_the_tiers(backend: LocalBackend) -> None:
    async with client_for(backend, GatewaySettings()) as client:
        document = (await client.get("/openapi.json")).json()
    names = document["components"]["schemas"]["ChatBody"]["properties"]["service_tier"]["anyOf"]
    assert names[0]["enum"] == [
        "auto", "default", "scale", "priority", "flex", "interactive", "standard", "batch",
    ]  # fmt: skip
    headers = document["paths"][PATH]["post"]["parameters"]
    assert [one["name"] for one in headers] == ["x-fabric-tier", "x-fabric-deadline-ms"]
