"""The processes of an engine's ranks: started, watched and ended together by the scheduler's process."""

from __future__ import annotations

import math
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from trimode.common.errors import TriModeError
from trimode.runtime.executor import ExecutorLostError
from trimode.runtime.ranks.messages import Load, Loaded
from trimode.runtime.ranks.pmi import StartUp, environment

# For all ranks to load their parts; the environment variable sets another limit, for slow disks.
READY_SECONDS, READY_VARIABLE = 600.0, "TRIMODE_RANKS_READY_SECONDS"
END_SECONDS = 5.0  # for ranks to end by themselves after their sockets are closed
REAP_SECONDS = 60.0  # for a process that has closed its sockets to end; more than 5 s on a busy machine


class RankProcesses:
    """One process a rank, each with a socket for messages and a socket for MPI's start-up, both inherited pairs.

    module: what a process runs, with the number of its socket as argument. If a process ends, the others are ended at
    once. Used by one thread at a time. Ranks also end when this process does, however it ends.
    """

    def __init__(self, module: str, ranks: int) -> None:
        self.ranks = ranks
        self._ready_seconds = _ready_seconds()
        self._connections: list[Connection] = []
        self._watch = _Watch()
        try:
            for rank in range(ranks):
                self._connections.append(self._watch.start(module, rank, ranks))
        except OSError as error:
            self._watch.kill()
            raise TriModeError(f"the processes of {ranks} ranks cannot be started: {error.strerror}") from None
        self._watch.thread.start()
        self._end = weakref.finalize(self, _end, os.getpid(), self._connections, self._watch)

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [process.pid for process in self._watch.processes]

    @property
    def lost(self) -> str | None:
        """Why the ranks have ended; None while they run, and after :meth:`close`."""
        return self._watch.lost

    def load(self, order: Load) -> list[Loaded]:
        """Send each rank the order and return their answers, by rank.

        Raises TriModeError that a rank answers, at once, since the others may wait for that rank; ExecutorLostError if
        one has ended, or if not all have answered after :data:`READY_SECONDS`. All ranks are then ended.
        """
        deadline, answers = time.monotonic() + self._ready_seconds, dict[int, Loaded]()
        try:
            for connection in self._connections:
                connection.send(order)
            while missing := {each: rank for rank, each in enumerate(self._connections) if rank not in answers}:
                answered = wait(list(missing), max(0.0, deadline - time.monotonic()))
                if not answered:
                    late = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing.values()))}"
                    self._watch.lose(
                        f"{late} of {self.ranks} not ready after {self._ready_seconds:g} s; if loading takes longer, "
                        f"set {READY_VARIABLE}"
                    )
                    raise EOFError
                for rank in (rank for each, rank in missing.items() if each in answered):
                    answer: Loaded | TriModeError = self._connections[rank].recv()
                    if isinstance(answer, TriModeError):
                        self._watch.closing = True
                        self._watch.kill()
                        self.close()
                        raise answer
                    answers[rank] = answer
        except (EOFError, OSError):
            raise self._lost_error() from None
        return [answers[rank] for rank in range(self.ranks)]

    def exchange(self, messages: Sequence[Any]) -> list[Any]:
        """Send each rank its message and return their answers, by rank. Raises ExecutorLostError if one has ended."""
        try:
            for connection, message in zip(self._connections, messages, strict=True):
                connection.send(message)
            return [connection.recv() for connection in self._connections]
        except (EOFError, OSError):
            raise self._lost_error() from None

    def close(self) -> None:
        """End all processes. May be called again."""
        self._end()

    def _lost_error(self) -> ExecutorLostError:
        self._watch.thread.join()
        return ExecutorLostError(self.lost or "the ranks were ended")


def _ready_seconds() -> float:
    given = os.environ.get(READY_VARIABLE)
    try:
        seconds = READY_SECONDS if given is None else float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise TriModeError(f"{READY_VARIABLE} is {given!r}; it must be a number of seconds above 0")
    return seconds


class _Watch:
    """Starts the processes. Its thread serves MPI's start-up and reaps the processes; if one ends too early, it kills
    the others.
    """

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.lost: str | None = None  # why the ranks cannot go on
        self.closing = False
        self.thread = threading.Thread(target=self._run, name="trimode-ranks", daemon=True)
        self._sockets: list[socket.socket] = []

    def start(self, module: str, rank: int, ranks: int) -> Connection:
        """Start a process; returns the socket for its messages."""
        (messages, its_messages), (start_up, its_start_up) = socket.socketpair(), socket.socketpair()
        with its_messages, its_start_up:
            descriptors = its_messages.fileno(), its_start_up.fileno()
            variables = environment(rank, ranks, its_start_up.fileno())
            # The ranks import what this process does, and nothing from the working directory.
            variables["PYTHONPATH"] = os.pathsep.join(str(Path(path).resolve()) for path in sys.path)
            self.processes.append(
                subprocess.Popen(  # noqa: S603 - our own module
                    [sys.executable, "-P", "-m", module, str(its_messages.fileno())],
                    env=variables,
                    pass_fds=descriptors,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )
        self._sockets.append(start_up)
        return Connection(messages.detach())

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def _run(self) -> None:
        start_up = StartUp(self._sockets, f"trimode-{os.getpid()}-{secrets.token_hex(4)}")
        with selectors.DefaultSelector() as selector:
            for rank, its in enumerate(self._sockets):
                selector.register(its, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    rank = key.data
                    if data := _receive(self._sockets[rank]):
                        try:
                            start_up.receive(rank, data)
                        except TriModeError as error:
                            self.lose(str(error))
                        except OSError:  # the rank has ended, which the selector reports as well
                            continue
                    else:
                        selector.unregister(key.fileobj)
                        self._sockets[rank].close()
                        self.lose_rank(rank)
        for process in self.processes:
            process.wait()

    def lose(self, reason: str) -> None:
        """End the ranks for a reason; the first one counts."""
        if self.closing:  # the ranks end by themselves
            return
        self.lost = self.lost or reason
        self.kill()

    def lose_rank(self, rank: int) -> None:
        """End the other ranks of one that has closed its sockets; the reason is how its process ends."""
        if self.closing or self.lost:
            return
        for other in self.processes[:rank] + self.processes[rank + 1 :]:
            other.kill()
        self.lose(f"rank {rank} of {len(self.processes)} has ended ({_ending(self.processes[rank])})")


def _ending(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(REAP_SECONDS)
    except subprocess.TimeoutExpired:
        return "its socket is closed"
    return f"exit code {code}" if code >= 0 else f"signal {-code}, {signal.Signals(-code).name}"


def _receive(its: socket.socket) -> bytes:
    """What a rank has sent; empty when it has ended."""
    try:
        return its.recv(1 << 16)
    except ConnectionError:
        return b""


def _end(process: int, connections: list[Connection], watch: _Watch) -> None:
    if os.getpid() != process:  # a fork of the process that started the ranks
        return
    watch.closing = True
    for connection in connections:
        connection.close()
    watch.thread.join(END_SECONDS)
    if watch.thread.is_alive():
        watch.kill()
        watch.thread.join()
