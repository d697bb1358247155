"""Tactics by time, on a double whose clock advances with every kernel by a time that the test gives."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.runtime.cuda.conftest import CAPACITY, TOP_K, VOCABULARY, Engines
from tests.support.driver_double import DriverDouble
from tests.support.interpreting_gpu import interpreting_gpu
from tests.support.random_checkpoint import write_random_checkpoint
from tests.support.uncompiled_kernels import UncompiledKernels
from trimode.build.cuda.target import CudaTarget
from trimode.build.engine_builder import build_engine
from trimode.build.gpu import kernel_network
from trimode.build.gpu.kernel_emission import NeededKernel
from trimode.common.errors import TriModeError
from trimode.model.checkpoint import Checkpoint
from trimode.plugins.operators import Int4Product
from trimode.quantize import quantize_checkpoint
from trimode.runtime.cuda import tactic_choice
from trimode.runtime.cuda.tactic_choice import Candidate, Output, TacticTimes
from trimode.runtime.executor import Candidates, CausalStep
from trimode.runtime.loading import load_engine


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """One layer in fp16, whose kernels have all their tactics."""
    folder = tmp_path_factory.mktemp("half")
    write_random_checkpoint(
        folder / "random", hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=VOCABULARY
    )
    quantize_checkpoint(Checkpoint(folder / "random"), folder / "int4", method="rtn", group=32)
    with pytest.MonkeyPatch.context() as patch:
        compiler = UncompiledKernels(patch)
        patch.setattr(kernel_network, "SPLITS", 2)
        target = CudaTarget(sms=(121,), dtype="fp16", max_batch=1, max_step=8)
        build_engine(Checkpoint(folder / "int4"), folder / "cuda", target=target, capacity=CAPACITY, top_k=TOP_K)
    return Engines(folder / "int4", folder / "cuda", folder / "cpu", compiler.kernels)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIMODE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tactics"


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMODE_TACTICS", "timed")
    monkeypatch.setattr(tactic_choice, "_REPEATS", 1)


@pytest.fixture
def driver(half: Engines) -> Iterator[DriverDouble]:
    with interpreting_gpu(half.kernels, torch.float16) as double:
        yield double


def one_token(engines: Engines) -> Candidates:
    """A pass whose rule is the smallest tile. The KV pool must hold its row, and nothing else."""
    executor = load_engine(engines.cuda, verify=False).executor
    slot = executor.pool.acquire()
    found = executor.run(CausalStep.chain(slot, np.array([[300]]), np.array([0]), np.array([[0]])))
    rows = executor.pool.read_rows(slot, 0, CAPACITY)
    assert rows[:, :, 0].any()
    assert not rows[:, :, 1:].any()
    return found


def large_tiles_are_fast(kernel: NeededKernel) -> float:
    return 1.0 / kernel.tactic.constants.get("BLOCK_M", 1)


def chosen(cache: Path) -> dict[str, int]:
    (file,) = cache.iterdir()
    found: dict[str, int] = json.loads(file.read_text())
    return found


@pytest.mark.usefixtures("timed")
def test_the_fastest_tactic_is_kept_and_the_results_have_the_same_bits(
    half: Engines, driver: DriverDouble, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.delenv("TRIMODE_TACTICS")
        by_rule = one_token(half)
    assert not driver.events
    assert not cache.exists()

    driver.milliseconds = large_tiles_are_fast
    by_time = one_token(half)
    for one, other in zip(by_rule[:3], by_time[:3], strict=True):
        np.testing.assert_array_equal(one, other)
    choices = chosen(cache)
    products = {key: tactic for key, tactic in choices.items() if key.startswith("Int4Product")}
    assert products
    largest = max(tactic.constants["BLOCK_M"] for tactic in Int4Product.TACTICS)
    assert {Int4Product.TACTICS[number - 1].constants["BLOCK_M"] for number in products.values()} == {largest}
    assert not any(key.startswith(("Attend", "QkvProduct", "KvWrite", "Embed")) for key in choices)

    timings = len(driver.events)
    assert timings > 0
    one_token(half)  # another process of the same machine
    assert len(driver.events) == timings
    next(cache.iterdir()).unlink()
    one_token(half)
    assert len(driver.events) > timings
    assert chosen(cache) == choices


@pytest.mark.usefixtures("timed", "driver")
def test_another_gpu_or_driver_or_kernel_has_a_file_of_its_own(
    half: Engines, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del cache
    kernels = half.cuda / "kernels" / "sm_121"
    device = tactic_choice.Device(0)
    files = {tactic_choice.tactics_file(device, kernels)}
    assert tactic_choice.tactics_file(device, kernels) in files
    for name, value in (("name", "another"), ("driver_version", 12090)):
        with monkeypatch.context() as patch:
            patch.setattr(tactic_choice.Device, name, value)
            files.add(tactic_choice.tactics_file(device, kernels))
    other = tmp_path / "sm_121"
    other.mkdir()
    for file in kernels.iterdir():
        (other / file.name).write_bytes(file.read_bytes() + (b"x" if file.suffix == ".cubin" else b""))
    files.add(tactic_choice.tactics_file(device, other))
    assert len(files) == 4


class Clock:
    """A device on which a launch writes one byte and takes a while. Launches are (byte, seconds)."""

    def __init__(self) -> None:
        self.last = (0, 0.0)
        self.overwritten = False

    def fill(self, *_: int) -> None: ...

    def launch_kernel(self, launch: tuple[int, float]) -> None:
        self.last = launch

    def download(self, host: int, _source: int, size: int) -> None:
        np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint8 * size).from_address(host))[:] = self.last[0]

    def synchronize(self) -> None: ...

    def capture(self, enqueue: object) -> object:
        return enqueue

    def launch(self, graph: object) -> None:
        graph()  # type: ignore[operator]

    def seconds(self, enqueue: object) -> float:
        enqueue()  # type: ignore[operator]
        return self.last[1]


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ({2: (7, 0.5), 3: (7, 0.4)}, 3),
        ({2: (7, 0.99)}, 1),  # not worth it
        ({2: (8, 0.1)}, 1),  # other bits
        ({2: (8, 0.1), 3: (7, 0.5)}, 3),
        ({2: (7, 2.0)}, 1),
    ],
)
def test_a_tactic_is_chosen_if_it_is_faster_and_has_the_bits_of_the_rules(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, others: dict[int, tuple[int, float]], expected: int
) -> None:
    times = TacticTimes(Clock(), tmp_path / "file.json")  # type: ignore[arg-type]
    rule, *rest = (Candidate(number, [launch]) for number, launch in {1: (7, 1.0), **others}.items())  # type: ignore[list-item]
    with caplog.at_level(logging.WARNING):
        assert times.choose("key", rule, rest, Output(0, 16)) == expected
    assert times.known("key") == expected
    wrong = [number for number, (byte, _) in others.items() if byte != 7]
    assert [record.getMessage() for record in caplog.records] == [
        f"tactic {number} of key gives other bits; it is not used" for number in wrong
    ]
    times.save()
    assert TacticTimes(Clock(), tmp_path / "file.json").known("key") == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["", "[1]", '{"key": "b"}', '{"key": null}', '{"key": true}'])
def test_a_file_that_holds_something_else_is_replaced(tmp_path: Path, content: str) -> None:
    file = tmp_path / "file.json"
    file.write_text(content)
    times = TacticTimes(Clock(), file)  # type: ignore[arg-type]
    assert times.known("key") is None
    times.choose("key", Candidate(1, [(7, 1.0)]), [Candidate(2, [(7, 0.5)])], Output(0, 16))  # type: ignore[list-item]
    times.save()
    assert json.loads(file.read_text()) == {"key": 2}


def test_timing_that_overwrites_inputs_changes_no_comparison(tmp_path: Path) -> None:
    """A layer's output may share the memory of another layer's input."""

    class Overwriting(Clock):
        def seconds(self, enqueue: object) -> float:
            self.overwritten = True
            return super().seconds(enqueue)

        def launch_kernel(self, launch: tuple[int, float]) -> None:
            byte, seconds = launch
            super().launch_kernel((byte + self.overwritten, seconds))

    times = TacticTimes(Overwriting(), tmp_path / "file.json")  # type: ignore[arg-type]
    others = [Candidate(2, [(7, 0.5)]), Candidate(3, [(7, 0.4)])]  # type: ignore[list-item]
    assert times.choose("key", Candidate(1, [(7, 1.0)]), others, Output(0, 16)) == 3  # type: ignore[list-item]


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    times = TacticTimes(Clock(), tmp_path / "file" / "tactics.json")  # type: ignore[arg-type]
    times.choose("key", Candidate(1, [(7, 1.0)]), [], Output(0, 16))  # type: ignore[list-item]
    with caplog.at_level(logging.WARNING):
        times.save()
    assert "cannot be written: File exists; tactics will be timed again" in caplog.text


@pytest.mark.usefixtures("driver", "cache")
def test_an_unknown_choice_is_refused(half: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMODE_TACTICS", "fast")
    with pytest.raises(TriModeError, match="TRIMODE_TACTICS is fast; set it to rule or timed"):
        load_engine(half.cuda, verify=False)
