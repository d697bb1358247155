"""How requests and engines end early: cancellation, lost references, a dead scheduler, a fork, the program's end."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.patience import HANG_SECONDS, wait_until
from trimode import LLM, RequestOutput, SamplingParams
from trimode.runtime.request.errors import EngineDeadError, ForkedError, ShutDownError

LONG = SamplingParams(max_tokens=8000, mode="ar", ignore_eos=True)


@pytest.fixture(scope="module")
def llm(random_engine: Path) -> Iterator[LLM]:
    with LLM(random_engine, max_batch_size=2, measure_passes=False) as llm:
        yield llm


def is_free(llm: LLM) -> bool:
    stats = llm.stats()
    return stats.running == stats.waiting == 0


def begin(llm: LLM) -> RequestOutput:
    """A request that has a slot."""
    request = llm.generate_async([300], LONG, streaming=True)
    wait_until(lambda: llm.stats().running == 1)
    return request


def test_a_timeout_of_wait_for_frees_the_slot(llm: LLM) -> None:
    async def wait() -> RequestOutput:
        request = llm.generate_async([300], LONG)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(request, 0.05)
        return request

    request = asyncio.run(wait())
    wait_until(lambda: is_free(llm))
    assert request.result().outputs[0].finish_reason == "cancelled"


def test_leaving_a_loop_frees_the_slot(llm: LLM) -> None:
    async def leave() -> RequestOutput:
        request = llm.generate_async([300], LONG, streaming=True)
        async for update in request:
            assert update.outputs[0].length
            break
        return request

    kept = asyncio.run(leave())
    wait_until(lambda: is_free(llm))
    assert not kept.finished
    kept = begin(llm)
    for _ in kept:
        break
    wait_until(lambda: is_free(llm))


def test_a_cancelled_task_frees_the_slot(llm: LLM) -> None:
    async def cancel() -> None:
        async def read() -> None:
            async for _ in llm.generate_async([300], LONG, streaming=True):
                started.set()

        started = asyncio.Event()
        task = asyncio.create_task(read())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    wait_until(lambda: is_free(llm))


def test_an_output_without_references_frees_its_slot(llm: LLM) -> None:
    request = begin(llm)
    del request
    gc.collect()
    wait_until(lambda: is_free(llm))


def test_a_timeout_of_result_does_not_end_the_request(llm: LLM) -> None:
    request = llm.generate_async([300], SamplingParams(max_tokens=300, mode="ar", ignore_eos=True))
    with pytest.raises(TimeoutError):
        request.result(timeout=0)
    assert request.result(timeout=HANG_SECONDS).outputs[0].length == 300


def test_one_failed_answer_ends_the_prompts_others(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=8000, mode="ar", ignore_eos=True, n=2, temperature=1.0)
    request = llm.generate_async([300], params)
    wait_until(lambda: llm.stats().running == 2)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(request._requests[1].sequence, "absorb", fail)
    with pytest.raises(ZeroDivisionError, match="a fault"):
        request.result(timeout=HANG_SECONDS)
    wait_until(lambda: is_free(llm))


@pytest.mark.parametrize("death", [SystemExit("a signal"), KeyboardInterrupt("a signal")], ids=repr)
def test_a_dead_scheduler_gives_its_reason_to_all_callers(
    random_engine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, death: BaseException
) -> None:
    llm = LLM(random_engine, max_batch_size=1, measure_passes=False)
    assert llm.failure is None
    running, waiting = begin(llm), llm.generate_async([300], LONG)

    def die() -> None:
        raise death

    monkeypatch.setattr(llm._scheduler, "step", die)
    reason = f"the engine has stopped: {type(death).__name__}: a signal"
    for request in (running, waiting):
        with pytest.raises(EngineDeadError, match=reason):
            request.result(timeout=HANG_SECONDS)
    with pytest.raises(EngineDeadError, match=reason):
        llm.generate_async([300])
    with pytest.raises(EngineDeadError, match=reason):
        llm.generate([[300]] * 3, use_tqdm=False)
    assert llm.failure == reason
    assert [record.levelname for record in caplog.records if "scheduler has stopped" in record.message] == ["CRITICAL"]
    llm.shutdown()


def test_an_error_of_a_step_ends_its_requests_and_the_next_are_answered(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as broken:
        broken.setattr(llm._scheduler, "step", fail)
        with pytest.raises(RuntimeError, match="a bug"):
            llm.generate_async([300], LONG).result(timeout=HANG_SECONDS)
    assert llm.failure is None
    assert llm.generate([300], SamplingParams(max_tokens=3, ignore_eos=True)).outputs[0].length == 3


def test_health_after_shutdown(random_engine: Path) -> None:
    llm = LLM(random_engine, max_batch_size=1, measure_passes=False)
    llm.shutdown()
    assert llm.failure == "the engine was shut down"
    with pytest.raises(ShutDownError):
        llm.generate_async([300])


def test_a_forked_child_gets_errors(llm: LLM) -> None:
    """The engine and the parent's requests raise errors there; neither waits for ever."""
    request = begin(llm)
    child = os.fork()
    if child == 0:
        found = 1
        try:
            errors = 0
            for action in (lambda: llm.generate([300]), lambda: llm.generate_async([300]), request.result, llm.stats):
                try:
                    action()
                except ForkedError as error:
                    errors += "before a fork" in str(error)
            llm.shutdown()
            found = 0 if errors == 4 and llm.failure is not None else 2
        finally:
            os._exit(found)
    deadline = time.monotonic() + HANG_SECONDS
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            raise AssertionError("the child hangs")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(ended[1]) == 0
    request.abort()
    assert request.result(timeout=HANG_SECONDS).outputs[0].finish_reason == "cancelled"


def test_a_program_may_end_without_shutdown(random_engine: Path) -> None:
    """With a request running, the interpreter exits cleanly and at once."""
    program = f"""
from trimode import LLM, SamplingParams
llm = LLM({str(random_engine)!r}, max_batch_size=1, measure_passes=False)
request = llm.generate_async([300], SamplingParams(max_tokens=8000, mode="ar", ignore_eos=True), streaming=True)
for update in request:
    if update.outputs[0].length > 3:
        print("running")
        raise SystemExit(7)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG_SECONDS)
    assert (ended.returncode, ended.stdout, ended.stderr) == (7, "running\n", "")
