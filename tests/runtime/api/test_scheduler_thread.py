"""The scheduler's thread on a scheduler that does what the test says: the queue's places, and how the thread ends."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.patience import HANG_SECONDS, wait_until
from trimode.runtime.api.scheduler_thread import SchedulerThread
from trimode.runtime.executor import ExecutorLostError
from trimode.runtime.request.errors import EngineDeadError, QueueFullError, ShutDownError


class Scheduler:
    """Runs no step by itself."""

    def __init__(self) -> None:
        self.waiting: deque[Any] = deque()
        self.running: list[Any] = []
        self.failed: list[tuple[Any, Exception]] = []
        self.steps = threading.Semaphore(0)
        self.act: Callable[[], None] = lambda: None

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def step(self) -> None:
        assert self.steps.acquire(timeout=HANG_SECONDS)
        self.act()
        self.running += self.waiting
        self.waiting.clear()

    def fail_all(self, error: Exception) -> None:
        self.failed += [(request, error) for request in (*self.running, *self.waiting)]
        self.running.clear()
        self.waiting.clear()


class Case:
    def __init__(self, max_running: int = 1, max_answers: int = 3) -> None:
        self.scheduler = Scheduler()
        scheduler: Any = self.scheduler
        self.thread = SchedulerThread(scheduler, max_running, max_answers)

    def submit(self, siblings: int = 0, wait: bool = False) -> Any:
        request: Any = SimpleNamespace(siblings=[None] * siblings)
        self.thread.submit(request, wait=wait)
        return request


@pytest.fixture
def case() -> Iterator[Case]:
    case = Case()
    yield case
    case.scheduler.steps.release(1000)
    case.thread.stop()


def test_every_answer_has_a_place_until_it_is_finished(case: Case) -> None:
    case.submit(siblings=1)
    case.submit()
    with pytest.raises(QueueFullError, match=r"^2 answers wait already; try again later$"):
        case.submit()
    case.thread.finished()
    with pytest.raises(QueueFullError, match=r"^1 answers wait already"):
        case.submit(siblings=1)
    case.submit()
    with pytest.raises(QueueFullError):
        case.submit()


def test_nobody_waits_beside_fewer_answers_than_may_run() -> None:
    case = Case(max_running=4, max_answers=4)
    case.submit()
    with pytest.raises(QueueFullError, match=r"^0 answers wait already"):
        case.submit(siblings=3)
    case.scheduler.steps.release(1000)
    case.thread.stop()


def test_who_waits_for_a_place_gets_the_next_one(case: Case) -> None:
    for _ in range(3):
        case.submit()
    waiter = threading.Thread(target=lambda: case.submit(wait=True), daemon=True)
    waiter.start()
    waiter.join(0.05)
    assert waiter.is_alive()
    case.thread.finished()
    waiter.join(HANG_SECONDS)
    assert not waiter.is_alive()


def test_who_waits_for_a_place_hears_of_the_end(case: Case) -> None:
    for _ in range(3):
        case.submit()
    found: list[Exception] = []

    def wait() -> None:
        try:
            case.submit(wait=True)
        except ShutDownError as error:
            found.append(error)

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    case.scheduler.steps.release(1000)
    case.thread.stop()
    waiter.join(HANG_SECONDS)
    assert [str(error) for error in found] == ["the engine was shut down"]


def test_all_unfinished_requests_end_with_it(case: Case) -> None:
    """Those that run, those that wait, and those that it has not seen yet."""
    first = case.submit()
    case.scheduler.steps.release()
    wait_until(lambda: case.scheduler.running == [first])
    second = case.submit()
    assert case.thread.failure is None
    case.scheduler.steps.release(1000)
    case.thread.stop()
    assert {id(request) for request, _ in case.scheduler.failed} == {id(first), id(second)}
    assert {str(error) for _, error in case.scheduler.failed} == {
        "the engine was shut down before the request was finished"
    }
    assert case.thread.failure == "the engine was shut down"
    with pytest.raises(ShutDownError, match=r"^the engine was shut down$"):
        case.submit()


@pytest.mark.parametrize(
    ("death", "reason"),
    [
        (ExecutorLostError("rank 1 has ended"), "the engine has stopped: rank 1 has ended"),
        (SystemExit("a signal"), "the engine has stopped: SystemExit: a signal"),
    ],
)
def test_the_reason_of_its_death_is_told(case: Case, death: BaseException, reason: str) -> None:
    def die() -> None:
        raise death

    case.scheduler.act = die
    request = case.submit()
    case.scheduler.steps.release()
    wait_until(lambda: case.thread.failure is not None)
    assert case.thread.failure == reason
    case.thread._thread.join(HANG_SECONDS)
    ((found, error),) = case.scheduler.failed
    assert found is request
    assert isinstance(error, EngineDeadError)
    assert str(error) == reason
    with pytest.raises(EngineDeadError, match=reason):
        case.submit(wait=True)


def test_a_step_that_fails_ends_its_requests_alone(case: Case) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    case.scheduler.act = fail
    case.submit()
    case.scheduler.steps.release()
    wait_until(lambda: len(case.scheduler.failed) == 1)
    assert case.thread.failure is None
    case.scheduler.act = lambda: None
    request = case.submit()
    case.scheduler.steps.release()
    wait_until(lambda: case.scheduler.running == [request])


def test_an_engine_that_nobody_shuts_down_does_not_keep_its_process_alive(case: Case) -> None:
    assert case.thread._thread.daemon
