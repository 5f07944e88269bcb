"""The app against its own OpenAPI document: what it says it takes and gives is what it does.

A bounded run: a few hundred requests, right and wrong ones. Never a 500, never an undocumented
status or content type, never a body that differs from the document.
"""

from __future__ import annotations

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


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_the_document_is_true(
    document: Any, path: str, method: str, mode: GenerationMode
) -> None:
    operation = document[path][method]
    if mode is GenerationMode.NEGATIVE and method == "GET":
        pytest.skip("nothing to send wrongly")
    examples = 40 if method == "POST" else 3

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), deadline=None)
    @given(case=operation.as_strategy(generation_mode=mode))
    def holds(case: Any) -> None:
        case.validate_response(case.call(), checks=CHECKS)

    holds()
