"""Triton's model over an engine of two ranks, and what it does when one of them dies."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.patience import HANG_SECONDS, wait_until
from tests.support.triton_backend_double import BackendRequest, backend_module, model_arguments
from trimode import LLM, SamplingParams
from trimode.build.cpu.target import CpuTarget
from trimode.build.engine_builder import build_engine
from trimode.model.checkpoint import Checkpoint
from trimode.runtime.api.llm import EngineLLM

pytest.importorskip("mpi4py", reason="needs the extra [mpi]")

MODULES = [f"trimode.runtime.triton.{name}" for name in ("model", "triton_request", "engine_metrics")]
PROMPT = "What is 60% of 440?"


@pytest.fixture
def model_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend_module())
    import trimode.runtime.triton.model as module

    yield module
    for name in MODULES:
        sys.modules.pop(name, None)


def answered(model: Any) -> BackendRequest:
    request = BackendRequest(text_input=PROMPT, mode="linear_spec", sampling_param_max_tokens=40)
    model.execute([request])
    assert request.answered.wait(HANG_SECONDS)
    return request


def test_a_model_whose_rank_dies_stops_the_server(
    model_module: Any, tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then, it answers as LLM does with the same engine. The log and the error name the rank."""
    engine = tmp_path / "engine"
    build_engine(Checkpoint(tiny_engine.parent / "w4a16"), engine, target=CpuTarget(tp=2))
    with LLM(engine, verify=False) as llm:
        output = llm.generate(llm.tokenizer.encode(PROMPT), SamplingParams(mode="linear_spec", max_tokens=40))
    stopped, logged = threading.Event(), list[str]()
    monkeypatch.setattr(model_module, "stop_server", stopped.set)
    monkeypatch.setattr(model_module.pb_utils.Logger, "log_error", logged.append)
    model = model_module.TritonPythonModel()
    model.initialize(model_arguments(str(engine)))
    try:
        assert answered(model).responses[-1].texts() == [output.outputs[0].text]
        assert not stopped.is_set()
        ranks = [
            child for child in psutil.Process(os.getpid()).children() if "rank_process" in " ".join(child.cmdline())
        ]
        ranks[1].kill()
        wait_until(stopped.is_set)
        error = answered(model).responses[-1].error
        assert error is not None
        assert all("rank 1 of 2 has ended (signal 9, SIGKILL)" in text for text in (error.message, *logged))
        assert logged
        assert error.code == "unavailable"
    finally:
        model.finalize()


def test_an_unloaded_model_leaves_the_server_running(
    model_module: Any, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Even if its engine takes long to shut down. No task of its event loop is left behind, which asyncio would log."""
    stopped, logged = threading.Event(), list[str]()

    def shut_down_slowly(llm: EngineLLM) -> None:
        shutdown(llm)
        stopped.wait(0.2)

    shutdown = EngineLLM.shutdown
    monkeypatch.setattr(EngineLLM, "shutdown", shut_down_slowly)
    monkeypatch.setattr(model_module, "stop_server", stopped.set)
    monkeypatch.setattr(model_module.pb_utils.Logger, "log_error", logged.append)
    monkeypatch.setattr(model_module, "WATCH_SECONDS", 0.001)
    model = model_module.TritonPythonModel()
    model.initialize(model_arguments(str(tiny_engine)))
    model.finalize()
    assert (stopped.is_set(), logged) == (False, [])
    del model
    gc.collect()
    assert "Task was destroyed" not in caplog.text
