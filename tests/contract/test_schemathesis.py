"""Requests made up from our own OpenAPI document: whatever is sent, the answer is one that the document promises.

schemathesis invents them, from the document a client would read; the service runs with a worker that draws patterns.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from .conftest import Stack

FEW = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module", autouse=True)
def worker(stack: Stack) -> Iterator[None]:
    """Some of the jobs are drawn."""
    with stack.worker():
        yield


def trouble(operation: schemathesis.schemas.APIOperation, mode: GenerationMode, key: str) -> str:
    """Send made-up requests of one operation, right ones or wrong ones; return the first answer's fault, if any."""

    @given(case=operation.as_strategy(generation_mode=mode))
    @FEW
    def sent(case: schemathesis.Case) -> None:
        case.call_and_validate(headers={"Authorization": f"Bearer {key}"}, checks=CHECKS, timeout=30)

    try:
        sent()
    except (Failure, FailureGroup, Unsatisfiable) as error:
        return "" if isinstance(error, Unsatisfiable) else f"{operation.label}: {error}"
    return ""


@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")  # of schemathesis' own making
def test_every_answer_is_one_that_the_document_promises(stack: Stack) -> None:
    """No server error, no status or type that is not declared, no body that breaks its schema."""
    operations = [
        found.ok() for found in schemathesis.openapi.from_url(f"{stack.url}/openapi.json").get_all_operations()
    ]
    operations = [operation for operation in operations if operation.path != "/readyz"]  # its 503 is the promise
    assert len(operations) > 20
    troubles = [trouble(operation, mode, stack.key) for operation in operations for mode in GenerationMode]
    assert [text for text in troubles if text] == []
