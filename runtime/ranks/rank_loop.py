"""The main loop of a rank's process: it follows the calls of the scheduler's process until that closes the socket."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

from trimode.common.errors import TriModeError
from trimode.engine.manifest import Manifest
from trimode.runtime.executor import BidirectionalStep, Candidates, CausalStep
from trimode.runtime.kv.slots import KvSlots
from trimode.runtime.ranks.group import Group
from trimode.runtime.ranks.messages import Answer, Budget, Call, Load, Loaded
from trimode.runtime.ranks.mpi_group import MpiGroup


class RankPool(KvSlots, Protocol):
    """A rank's part of the KV pool."""

    @property
    def budget(self) -> Budget: ...


class RankExecutor(Protocol):
    """The executor of one rank."""

    @property
    def pool(self) -> RankPool: ...

    def run(self, step: CausalStep | BidirectionalStep) -> Candidates: ...


LoadRank = Callable[[Path, Manifest, Group, int, int | None], RankExecutor]


def follow(load: LoadRank) -> None:
    """Load the rank's part as the first message says, then answer calls. Ends the process.

    load: takes the engine directory, its manifest, the group, threads and the KV pool's bytes. The number of the socket
    is the first argument of the process. A TriModeError is an answer. Another exception ends the process with a
    traceback, since other ranks may wait in a sum that never completes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the scheduler's process, which then closes the socket
    code = 0
    try:
        _follow(load, Connection(int(sys.argv[1])))
    except (EOFError, ConnectionError):  # the scheduler's process has closed the socket, or has ended
        pass
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)  # without MPI's finalisation, which would wait for the other ranks


def _follow(load: LoadRank, connection: Connection) -> None:
    order: Load = connection.recv()
    try:
        group = MpiGroup(order.ranks)
        executor = load(order.engine, Manifest.read(order.engine), group, order.threads, order.kv_cache_bytes)
    except TriModeError as error:
        connection.send(error)
        connection.recv()  # until the socket is closed: a rank that ends first would hide the error
        return
    pool = executor.pool
    connection.send(Loaded(pool.budget, pool.row_bytes, pool.limit_bytes))
    while True:
        connection.send(_answer(executor, connection.recv()))


def _answer(executor: RankExecutor, call: Call) -> Answer:
    owner = executor if call.name == "run" else executor.pool
    try:
        value = getattr(owner, call.name)(*call.arguments)
    except TriModeError as error:
        return Answer(None, executor.pool.slots, error)
    return Answer(value, executor.pool.slots)
