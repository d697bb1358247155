"""The thread that runs the scheduler: requests in, health out, and an orderly end."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque

from trimode.runtime.executor import ExecutorLostError
from trimode.runtime.request.errors import EngineDeadError, ForkedError, QueueFullError, ShutDownError
from trimode.runtime.scheduling.running_request import Request
from trimode.runtime.scheduling.scheduler import Scheduler

log = logging.getLogger(__name__)


class SchedulerThread:
    """Runs a scheduler's steps while there are requests.

    max_running: answers that run at once. max_answers: answers that run or wait.
    """

    def __init__(self, scheduler: Scheduler, max_running: int, max_answers: int) -> None:
        self._scheduler = scheduler
        self._max_running = max_running
        self._max_answers = max_answers
        self._answers = 0  # that run or wait
        self._submitted: deque[Request] = deque()
        self._changed = threading.Condition()  # of all fields here
        self._closing = False
        self._death: BaseException | None = None
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name="trimode-scheduler", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> str | None:
        """Why no request can be answered any more; None as long as requests can be."""
        if os.getpid() != self._process:
            return str(self._forked())
        if self._closing or self._death is not None or not self._thread.is_alive():
            return str(self._ended())
        return None

    def submit(self, request: Request, *, wait: bool) -> None:
        """Queue a request and its siblings. wait: for a place in the queue, instead of raising QueueFullError.

        Raises ShutDownError after :meth:`stop`, EngineDeadError if the thread has ended by an error, ForkedError in a
        child process.
        """
        self.require_process()
        answers = 1 + len(request.siblings)

        def there_is_room() -> bool:
            return self._answers + answers <= self._max_answers

        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._closing or there_is_room())
            if self._closing:
                raise self._ended()
            if not there_is_room():
                waiting = max(0, self._answers - self._max_running)
                raise QueueFullError(f"{waiting} answers wait already; try again later")
            self._answers += answers
            self._submitted.append(request)
            self._changed.notify_all()

    def finished(self) -> None:
        """One answer has ended. Called on the scheduler's thread."""
        with self._changed:
            self._answers -= 1
            self._changed.notify_all()

    def stop(self) -> None:
        """End after the current step; unfinished requests get ShutDownError."""
        if os.getpid() != self._process:  # the thread, and perhaps the owner of the lock, are in the parent
            return
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def require_process(self) -> None:
        if os.getpid() != self._process:
            raise self._forked()

    def _forked(self) -> ForkedError:
        return ForkedError(
            f"the engine was loaded in process {self._process}, before a fork; load it in this process instead, or "
            "start processes by 'spawn'"
        )

    def _ended(self) -> ShutDownError:
        death = self._death
        if isinstance(death, ExecutorLostError):
            return EngineDeadError(f"the engine has stopped: {death}")
        if death is not None:
            return EngineDeadError(f"the engine has stopped: {type(death).__name__}: {death}")
        return ShutDownError("the engine was shut down")

    def _run(self) -> None:
        """However this ends, every caller that waits gets an error."""
        try:
            self._run_steps()
        except ExecutorLostError as death:
            self._death = death
            log.critical("the engine has stopped: %s", death)
        except BaseException as death:
            self._death = death
            log.critical("the scheduler has stopped: %r", death, exc_info=death)
        finally:
            with self._changed:
                self._closing = True
                self._scheduler.waiting.extend(self._submitted)
                self._submitted.clear()
                self._changed.notify_all()
            error = self._ended()
            if self._death is None:
                error = ShutDownError("the engine was shut down before the request was finished")
            self._scheduler.fail_all(error)

    def _run_steps(self) -> None:
        scheduler = self._scheduler
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._submitted or self._closing or scheduler.busy)
                scheduler.waiting.extend(self._submitted)
                self._submitted.clear()
                if self._closing:
                    return
            try:
                scheduler.step()
            except Exception as error:  # outside any one request's code: no culprit is known
                log.exception("a scheduler step failed; all requests end")
                scheduler.fail_all(error)
