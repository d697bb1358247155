"""Two ranks of target cuda in processes of their own, whose GPUs are doubles: their sums are the real kernel's.

The ranks are processes, since each waits within a kernel for the other.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.runtime.cuda.conftest import CAPACITY, CASES, Engines, build_engines
from tests.runtime.cuda.test_cuda_texts import equal_pass_costs, tiny, tokens  # noqa: F401 - fixtures
from tests.support import cuda_rank_on_double
from tests.support.executor_cases import CLOSE, FAR, Run, StepCases
from trimode.build.cuda.target import CudaTarget
from trimode.common.errors import TriModeError
from trimode.engine.launch_list import LaunchList
from trimode.engine.manifest import Manifest
from trimode.runtime.cuda import target as cuda_target
from trimode.runtime.executor import Executor, OwningExecutor
from trimode.runtime.gpu import gpu_choice
from trimode.runtime.loading import load_engine

pytest.importorskip("mpi4py", reason="needs the extra [mpi]")

Gpus = Callable[..., None]


@pytest.fixture(scope="module")
def divided(small: Engines, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """The small checkpoint, divided among two ranks."""
    folder = tmp_path_factory.mktemp("divided")
    target = CudaTarget(sms=(121,), dtype="fp32", max_batch=4, max_step=16, tp=2)
    return build_engines(small.checkpoint, folder, target, CAPACITY)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gpus:
    """Gives this machine GPUs that interpret an engine's kernels."""

    def install(engines: Engines, number: int = 2, fault: str = "none") -> None:
        (tmp_path / "kernels").write_bytes(pickle.dumps(engines.kernels))
        monkeypatch.setenv(cuda_rank_on_double.KERNELS, str(tmp_path / "kernels"))
        monkeypatch.setenv(cuda_rank_on_double.GPUS, str(number))
        monkeypatch.setenv(cuda_rank_on_double.FAULT, fault)
        monkeypatch.setattr(gpu_choice, "find_gpus", cuda_rank_on_double.gpu_doubles)
        monkeypatch.setattr(cuda_target, "RANK_PROCESS", cuda_rank_on_double.__name__)

    return install


def distances(engines: Engines, runs: list[Run]) -> list[float]:
    """The largest relative distance of a result of the ranks from that of target cpu, in each run."""
    executors = [load_engine(engine, verify=False).executor for engine in (engines.cpu, engines.cuda)]
    worst = []
    for run in runs:
        wanted, found = (run_and_release(run, executor) for executor in executors)
        pairs = zip(found, wanted, strict=True)
        worst.append(max(float(np.linalg.norm(one - other) / np.linalg.norm(other)) for one, other in pairs))
    assert isinstance(executors[1], OwningExecutor)
    executors[1].close()
    return worst


def run_and_release(run: Run, executor: Executor) -> list[np.ndarray]:
    found = run(CASES, executor)
    while executor.pool.active:
        executor.pool.release(executor.pool.active - 1)
    return found


def test_each_layer_has_two_sums(divided: Engines) -> None:
    for rank in range(2):
        for engine in ("ar", "diffusion"):
            launches = LaunchList.read(divided.cuda / f"rank{rank}" / engine).launches
            products = {launch.outputs[0]: launch.operator for launch in launches}
            summed = [launch.inputs[0] for launch in launches if launch.operator.startswith("AllReduce")]
            assert len(summed) == 2 * Manifest.read(divided.cuda).model.num_hidden_layers
            assert all("Residual" not in products[name] for name in summed)


def test_results_of_steps_equal_those_of_one_process(divided: Engines, gpus: Gpus) -> None:
    gpus(divided)
    runs = [StepCases.prefix_reused, StepCases.masked_rows_of_a_long_step]
    assert max(distances(divided, runs)) < CLOSE


@pytest.mark.parametrize("fault", ["no sum", "other places"])
def test_a_missing_or_wrong_sum_is_noticed(divided: Engines, gpus: Gpus, fault: str) -> None:
    gpus(divided, fault=fault)
    assert not distances(divided, [StepCases.prefill])[0] < FAR


def test_there_must_be_a_gpu_for_each_rank(divided: Engines, gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(divided, number=1)
    with pytest.raises(TriModeError, match=r"among 2 ranks and needs as many GPUs .* has GB10 .121.; .* --tp 1"):
        load_engine(divided.cuda, verify=False)
    monkeypatch.setenv(gpu_choice.SHARE, "1")
    assert gpu_choice.choose_gpus(divided.cuda, "cuda", (121,), 2) == [0, 0]


@pytest.fixture(scope="module")
def tiny_divided(tiny: Engines, tmp_path_factory: pytest.TempPathFactory) -> Engines:  # noqa: F811
    target = CudaTarget(sms=(121,), dtype="fp32", max_batch=2, max_step=32, tp=2)
    return build_engines(tiny.checkpoint, tmp_path_factory.mktemp("tiny"), target, 96)


def test_tokens_of_every_mode_equal_those_of_one_process(tiny_divided: Engines, gpus: Gpus) -> None:
    """The shipped checkpoint; two modes share a batch."""
    gpus(tiny_divided)
    assert tokens(tiny_divided.cuda) == tokens(tiny_divided.cpu)
