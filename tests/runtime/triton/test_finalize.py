"""A model that is unloaded answers every running request before it stops."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.triton_backend_double import BackendRequest, backend_module, model_arguments

MODULES = [f"trimode.runtime.triton.{name}" for name in ("model", "triton_request", "engine_metrics")]
LONG = {"text_input": "abc", "mode": "ar", "ignore_eos": True, "sampling_param_max_tokens": 100}


@pytest.fixture
def model_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend_module())
    import trimode.runtime.triton.model as module

    yield module
    for name in MODULES:
        sys.modules.pop(name, None)


def loaded(module: Any, engine: Path) -> Any:
    model = module.TritonPythonModel()
    model.initialize(model_arguments(str(engine)))
    return model


def test_what_runs_is_finished(model_module: Any, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "DRAIN_SECONDS", 600.0)  # on any machine
    model = loaded(model_module, tiny_engine)
    requests = [BackendRequest(**LONG) for _ in range(6)]  # more than there are slots
    model.execute(requests)
    model.finalize()
    for request in requests:
        assert request.answered.is_set()
        assert request.responses[-1].error is None
        assert len(request.responses[-1].texts()[0]) > 20


def test_what_takes_too_long_ends_with_an_error(
    model_module: Any, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "DRAIN_SECONDS", 0.0)
    model = loaded(model_module, tiny_engine)
    requests = [BackendRequest(**LONG) for _ in range(6)]
    model.execute(requests)
    model.finalize()
    for request in requests:
        assert request.answered.is_set()
    assert requests[-1].responses[-1].error.code == "unavailable"
