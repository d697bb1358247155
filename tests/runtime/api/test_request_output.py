"""A prompt's answers as updates arrive, without an engine: in a thread, in an event loop, and with errors."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.patience import HANG_SECONDS
from trimode.runtime.api.request_output import Mailbox, RequestOutput
from trimode.runtime.request.outputs import Update


def output(answers: int = 1) -> RequestOutput:
    found = RequestOutput(1, None, [300], answers)
    found._requests = [SimpleNamespace(aborted=False) for _ in range(answers)]  # type: ignore[misc]
    return found


def aborted(found: RequestOutput) -> list[bool]:
    return [request.aborted for request in found._requests]


def put(found: RequestOutput, *updates: Update) -> None:
    for update in updates:
        found._mailbox.put(update)


def update(index: int = 0, *tokens: int, **more: Any) -> Update:
    return Update(index=index, token_ids=list(tokens), **more)


def test_it_is_finished_when_all_answers_are() -> None:
    found = output(2)
    put(found, update(0, 5, finish_reason="stop"), update(1, 6))
    with pytest.raises(TimeoutError, match="request 1 is not finished after 0 s"):
        found.result(timeout=0)
    assert not found.finished
    assert [answer.token_ids for answer in found.outputs] == [[5], [6]]
    put(found, update(1, 7, finish_reason="length"))
    assert found.result(timeout=0) is found
    assert aborted(found) == [False, False]
    assert [answer.token_ids for answer in found.outputs] == [[5], [6, 7]]


def test_updates_that_arrived_together_are_one() -> None:
    found = output()
    put(found, update(0, 5, rejected=[1]), update(0, 6, rejected=[2], prompt_logprobs=[None]))
    loop = iter(found)
    next(loop)
    assert (found.outputs[0].token_ids_diff, found.outputs[0].rejected) == ([5, 6], [1, 2])
    assert found.prompt_logprobs == [None]
    put(found, update(0, 7, finish_reason="length"))
    next(loop)
    assert found.outputs[0].token_ids_diff == [7]
    assert found.prompt_logprobs == [None]
    assert list(loop) == []
    assert aborted(found) == [False]


def test_an_error_ends_all_answers_and_is_raised_again() -> None:
    found = output(2)
    put(found, update(0, 5), update(1, error=ZeroDivisionError("a fault")))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="a fault"):
            found.result()
    assert aborted(found) == [True, True]
    assert found.outputs[0].token_ids == [5]


def test_a_loop_that_is_left_ends_the_request() -> None:
    found = output()
    put(found, update(0, 5))
    for _ in found:
        break
    assert aborted(found) == [True]


def test_a_thread_that_waits_is_woken() -> None:
    found = output()
    threading.Timer(0.02, put, (found, update(0, 5, finish_reason="stop"))).start()
    assert found.result(timeout=HANG_SECONDS).outputs[0].token_ids == [5]


def test_an_event_loop_is_woken_from_another_thread() -> None:
    async def read() -> list[list[int]]:
        found = output()
        threading.Timer(0.02, put, (found, update(0, 5))).start()
        seen = []
        async for _ in found:
            seen.append(found.outputs[0].token_ids_diff)
            if len(seen) == 1:
                threading.Timer(0.02, put, (found, update(0, 6, finish_reason="stop"))).start()
        assert aborted(found) == [False]
        whole = output()
        put(whole, update(0, 5), update(0, 6, finish_reason="stop"))
        assert (await whole).outputs[0].token_ids == [5, 6]
        return seen

    assert asyncio.run(asyncio.wait_for(read(), HANG_SECONDS)) == [[5], [6]]


def test_it_is_awaited_where_it_was_made() -> None:
    found = output()
    put(found, update(0, 5, finish_reason="stop"))

    async def wait() -> None:
        await found

    with pytest.raises(RuntimeError, match="event loop in which it was made"):
        asyncio.run(wait())
    assert aborted(found) == [True]

    async def make() -> RequestOutput:
        return output()

    other = asyncio.run(make())
    put(other, update(0, 5, finish_reason="stop"))  # its loop is closed
    with pytest.raises(RuntimeError, match="or call result"):
        asyncio.run(other._finish())
    assert other.result().finished


def test_a_mailbox_is_filled_by_an_update_or_an_error() -> None:
    box = Mailbox()
    assert (box.filled, box.wait(timeout=0)) == (False, False)
    box.put(update(0, 5))
    assert (box.filled, box.wait(timeout=0)) == (True, True)
    box.updates.clear()
    box.error = ValueError()
    assert (box.filled, box.wait(timeout=0)) == (True, True)
