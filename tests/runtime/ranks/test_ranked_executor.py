"""The pool of all ranks and MPI's start-up without processes, and the start of processes that hang or fail."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.support import scripted_rank
from trimode.common.errors import TriModeError
from trimode.runtime.executor import ExecutorLostError
from trimode.runtime.kv.host_kv_pool import KvPool
from trimode.runtime.ranks.messages import Call, Load, Loaded
from trimode.runtime.ranks.pmi import StartUp
from trimode.runtime.ranks.processes import READY_VARIABLE, RankProcesses
from trimode.runtime.ranks.rank_loop import _answer
from trimode.runtime.ranks.ranked_executor import RankedPool


class Rank:
    """A rank without engines: two layers, one KV head of size 4."""

    def __init__(self, rows: int) -> None:
        self.pool = KvPool(2, 1, 4, capacity=256, limit_bytes=rows * 2 * 2 * 4 * 4)

    def run(self, _step: Any) -> Any:
        raise NotImplementedError


class Ranks:
    """Answers calls as the processes do."""

    def __init__(self, *rows: int) -> None:
        self.of_rank = [Rank(limit) for limit in rows]
        self.ranks = len(rows)
        self.closed = False

    def exchange(self, calls: Sequence[Call]) -> list[Any]:
        return [_answer(rank, call) for rank, call in zip(self.of_rank, calls, strict=True)]

    def close(self) -> None:
        self.closed = True

    def pool(self) -> RankedPool:
        pools = [rank.pool for rank in self.of_rank]
        loaded = [Loaded(pool.budget, pool.row_bytes, pool.limit_bytes) for pool in pools]
        return RankedPool(self, loaded)  # type: ignore[arg-type]


def test_the_smallest_limit_of_a_rank_is_the_limit_of_all() -> None:
    ranks = Ranks(400, 300)
    pool = ranks.pool()
    assert [pool.most_rows(sequences) for sequences in (1, 2, 3)] == [256, 150, 100]
    assert pool.limit_bytes == 2 * 300 * 64
    assert pool.row_bytes == 2 * 64
    for slot in range(3):
        assert pool.acquire(100) == slot
    pool.reserve(100)
    assert pool.active == 3
    assert pool.slots == 3
    with pytest.raises(TriModeError, match="exceeds the engine's capacity"):
        pool.reserve(257)
    assert pool.release(0) == 2
    assert [rank.pool.active for rank in ranks.of_rank] == [2, 2]


def test_rows_have_the_heads_of_all_ranks() -> None:
    ranks = Ranks(400, 400)
    pool = ranks.pool()
    pool.acquire()
    rows = np.random.default_rng(0).random((4, 2, 5, 4)).astype(np.float32)
    pool.write_rows(0, 3, rows)
    np.testing.assert_array_equal(pool.read_rows(0, 3, 8), rows)
    np.testing.assert_array_equal(ranks.of_rank[1].pool.read_rows(0, 3, 8)[:, 0], rows[:, 1])


def test_ranks_that_are_not_in_step_are_ended() -> None:
    ranks = Ranks(400, 400)
    pool = ranks.pool()
    ranks.of_rank[1].pool.acquire()
    with pytest.raises(ExecutorLostError, match=r"the ranks disagree on acquire: \[0, 1\]"):
        pool.acquire()
    assert ranks.closed


def test_an_error_of_one_rank_alone_ends_all() -> None:
    ranks = Ranks(400, 400)
    pool = ranks.pool()
    pool.acquire()
    for _ in range(2):
        ranks.of_rank[1].pool.acquire()
    with pytest.raises(ExecutorLostError, match="1 of 2 ranks failed: 3 sequences of 200"):
        pool.reserve(200)
    assert ranks.closed


def test_the_start_up_answers_lines_that_arrive_in_parts() -> None:
    (ours, theirs), (ours_1, theirs_1) = socket.socketpair(), socket.socketpair()
    with ours, theirs, ours_1, theirs_1:
        job = StartUp([ours, ours_1], "job")
        job.receive(0, b"cmd=put kvsname=job key=a va")
        job.receive(0, b"lue=b\ncmd=barrier_in\n")
        job.receive(1, b"cmd=get kvsname=job key=a\ncmd=get kvsname=job key=c\n")
        assert theirs.recv(1000) == b"cmd=put_result rc=0 msg=success\n"  # the barrier waits for the other rank
        job.receive(1, b"cmd=barrier_in\n")
        assert theirs.recv(1000) == b"cmd=barrier_out\n"
        first, second, third = theirs_1.recv(1000).splitlines()
        assert first == b"cmd=get_result rc=0 msg=success value=b"
        assert second.startswith(b"cmd=get_result rc=-1")
        assert third == b"cmd=barrier_out"
        with pytest.raises(TriModeError, match="'spawn'"):
            job.receive(1, b"cmd=spawn\n")


ORDER = Load(Path("engine"), 2, 1, None)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], RankProcesses]:
    def start(script: str) -> RankProcesses:
        monkeypatch.setenv(scripted_rank.SCRIPT, script)
        return RankProcesses(scripted_rank.MODULE, len(script.split()))

    return start


def test_ranks_that_are_ready_answer_by_rank(scripted: Callable[[str], RankProcesses]) -> None:
    processes = scripted("ready ready ready")
    assert processes.load(ORDER) == [Loaded(None, 1, None)] * 3
    processes.close()
    assert processes.lost is None


@pytest.mark.parametrize("script", ["hang hang", "ready hang"])
def test_ranks_that_hang_while_loading_are_ended(
    script: str, scripted: Callable[[str], RankProcesses], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(READY_VARIABLE, "0.5")
    processes = scripted(script)
    # On a busy machine, the other rank is not ready either.
    reason = rf"^(rank|ranks 0,) 1 of 2 not ready after 0.5 s; if loading takes longer, set {READY_VARIABLE}$"
    with pytest.raises(ExecutorLostError, match=reason):
        processes.load(ORDER)
    assert not any(psutil.pid_exists(process) for process in processes.pids)


def test_an_error_of_one_rank_while_loading_ends_those_that_wait_for_it(
    scripted: Callable[[str], RankProcesses],
) -> None:
    processes = scripted("hang error hang")
    with pytest.raises(TriModeError, match="this rank has no memory"):
        processes.load(ORDER)
    assert not any(psutil.pid_exists(process) for process in processes.pids)


@pytest.mark.parametrize("seconds", ["0", "-1", "soon", "inf", "nan"])
def test_a_limit_that_is_no_time_is_refused(
    seconds: str, scripted: Callable[[str], RankProcesses], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(READY_VARIABLE, seconds)
    with pytest.raises(TriModeError, match=f"{READY_VARIABLE} is '{seconds}'; it must be a number of seconds above 0"):
        scripted("ready ready")
