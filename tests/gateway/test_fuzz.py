"""The app against its own OpenAPI document: what it says it takes and gives is what it does.

A bounded run: a few hundred requests, right and wrong ones. Never a 500, never an undocumented
status or content type, never a body that differs from the document.
"""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from kit.local_backend import LocalBackend
from kit.tokenizers import byte_level
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from fabric.gateway.api import create_app

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


OPERATIONS = [
    ("/v1/chat/completions", "POST"),
    ("/v1/completions", "POST"),
    ("/tokenize", "POST"),
    ("/detokenize", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{model_id}", "GET"),
    ("/health", "GET"),
    ("/ready", "GET"),
    ("/metrics", "GET"),
    ("/fabric/status", "GET"),
]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The document, served by the app itself."""
    backend = LocalBackend(byte_level(tmp_path_factory.mktemp("fuzz")))
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(backend))


def test_every_operation_is_fuzzed(document: Any) -> None:
    found = [result.ok() for result in document.get_all_operations()]
    assert sorted((o.path, o.method.upper()) for o in found) == sorted(OPERATIONS)


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_the_document_is_true(document: Any, path: str, method: str) -> None:
    statuses: set[int] = set()

    @settings(max_examples=15 if method == "POST" else 2, suppress_health_check=list(HealthCheck))
    @given(case=document[path][method].as_strategy(generation_mode=GenerationMode.POSITIVE))
    def holds(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "tiny"  # the one name that exists
        response = case.call()
        statuses.add(response.status_code)
        case.validate_response(response, checks=CHECKS)

    holds()
    assert 200 in statuses or "{" in path, "the document asks for what is never taken"


@pytest.mark.parametrize("path", [path for path, method in OPERATIONS if method == "POST"])
def test_what_the_document_forbids_is_refused(document: Any, path: str) -> None:
    @settings(max_examples=12, suppress_health_check=list(HealthCheck))
    @given(case=document[path]["POST"].as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def holds(case: Any) -> None:
        case.validate_response(case.call(), checks=CHECKS)

    holds()
