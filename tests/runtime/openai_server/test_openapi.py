"""schemathesis over the server's own OpenAPI document: requests that fit it and requests that do not, each answered as
documented, in status, type and shape.
"""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.config import PositiveDataAcceptanceConfig

from scripts.serving.server_process import KEY, Served
from tests.support.patience import HANG_SECONDS

HEADERS = {"Authorization": f"Bearer {KEY}"}
FITS, FITS_NOT = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
# Path, method, which requests, and how many.
CASES = [
    ("/v1/chat/completions", "POST", FITS, 25),
    ("/v1/chat/completions", "POST", FITS_NOT, 40),
    ("/v1/completions", "POST", FITS, 25),
    ("/v1/completions", "POST", FITS_NOT, 40),
    ("/v1/responses", "POST", FITS, 25),
    ("/v1/responses", "POST", FITS_NOT, 40),
    ("/v1/messages", "POST", FITS, 15),
    ("/v1/messages", "POST", FITS_NOT, 20),
    ("/v1/messages/count_tokens", "POST", FITS, 10),
    ("/tokenize", "POST", FITS, 15),
    ("/tokenize", "POST", FITS_NOT, 15),
    ("/detokenize", "POST", FITS, 10),
    ("/detokenize", "POST", FITS_NOT, 10),
    ("/tokenizer_info", "GET", FITS, 2),
    ("/version", "GET", FITS, 2),
    ("/v1/models", "GET", FITS, 2),
    ("/v1/models/{name}", "GET", FITS, 5),
    ("/health", "GET", FITS, 2),
    ("/metrics", "GET", FITS, 2),
]
# What the document cannot say: fields that contradict each other, a model of another name, a context that is too short.
REFUSED_ALL_THE_SAME = PositiveDataAcceptanceConfig(expected_statuses=["2xx", "400", "404"])


@pytest.fixture(scope="module")
def document(served: Served) -> schemathesis.BaseSchema:
    found = schemathesis.openapi.from_url(f"{served.url}/openapi.json", headers=HEADERS)
    found.config.checks.positive_data_acceptance = REFUSED_ALL_THE_SAME
    return found


@pytest.mark.parametrize(("path", "method", "mode", "examples"), CASES)
def test_as_documented(
    served: Served, document: schemathesis.BaseSchema, path: str, method: str, mode: GenerationMode, examples: int
) -> None:
    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=document[path][method].as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        case.call_and_validate(headers=HEADERS, timeout=HANG_SECONDS)

    ask()
    assert served.process.poll() is None


def test_the_document_lists_what_is_tested(document: schemathesis.BaseSchema) -> None:
    found = {(operation.ok().path, operation.ok().method.upper()) for operation in document.get_all_operations()}
    assert found == {(path, method) for path, method, _, _ in CASES}
