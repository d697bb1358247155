"""Loading plans: weights that both engines share are in memory once, and each refusal is one clear line."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx
from hypothesis import given
from hypothesis import strategies as st

from tests.runtime.rtx.conftest import Engines, Machine
from tests.support.driver_double import GRANULARITY, FaultError, LibcudaDouble
from tests.support.rtx_double import PlanDouble
from trimode import LLM, SamplingParams
from trimode.common.errors import TriModeError
from trimode.engine.manifest import Manifest
from trimode.runtime.loading import load_engine
from trimode.runtime.rtx import plan_loading
from trimode.runtime.rtx.plan_loading import WeightPlacement, _pieces
from trimode.runtime.rtx.rtx_executor import RtxExecutor


def executor_of(engine: Path) -> RtxExecutor:
    found = load_engine(engine, verify=False).executor
    assert isinstance(found, RtxExecutor)
    return found


def answer(engine: Path) -> list[int]:
    """Tokens of an answer for which both engines run."""
    prompt = [{"role": "user", "content": "What is 60% of 440?"}]
    with LLM(engine, verify=False) as llm:
        output = llm.generate(prompt, SamplingParams(mode="linear_spec", block_length=8, max_tokens=20))
        tokens = output.outputs[0].token_ids
    assert len(tokens) > 8
    return tokens


def weights_taken(machine: Machine, engine: Path) -> tuple[WeightPlacement, int]:
    """Where the weights are, and how many bytes of device memory they take."""
    before = machine.cuda.free
    loaded = executor_of(engine)
    others = sum(memory.nbytes for memory in machine.cuda.allocations.values())
    return loaded.weights, before - machine.cuda.free - others


def test_identical_weights_are_on_the_device_once(
    fp16: Engines, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    """The weights of real plans are identical: one allocation holds both."""
    section = fp16.plans[0].section
    placement, taken = weights_taken(machine, fp16.rtx)
    assert placement == WeightPlacement(shared=section.nbytes, private=0, unmanaged_engines=0)
    assert taken == section.nbytes
    assert [engine.pieces for engine in machine.trt.engines] == 2 * [{0: section.nbytes}]
    assert caplog.records == []


def with_private_bytes(plans: list[PlanDouble]) -> list[PlanDouble]:
    """The same plans, but with 256 more bytes in the middle of the second one's weights."""
    first, second = plans
    place = len(second.section) // 2
    section = np.zeros(len(second.section) + GRANULARITY, np.uint8)
    section[:place] = second.section[:place]
    section[place : place + 256] = 1
    section[place + 256 : len(second.section) + 256] = second.section[place:]
    return [first, replace(second, section=section)]


def test_weights_that_differ_are_loaded_for_each_plan(
    fp16: Engines, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    """The sections are equal up to the private bytes; after them, one is shifted."""
    machine.trt.plans = with_private_bytes(fp16.plans)
    placement, taken = weights_taken(machine, fp16.rtx)
    whole = [plan.section for plan in machine.trt.plans]
    assert placement.shared == len(whole[0]) // 2 // GRANULARITY * GRANULARITY > 0
    assert placement.private == sum(map(len, whole)) - 2 * placement.shared
    assert taken == placement.shared + placement.private
    assert "MB of weights are shared" in caplog.text


def test_weights_that_tensorrt_does_not_manage_stay_where_they_are(
    fp16: Engines, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    managed = answer(fp16.rtx)
    caplog.clear()
    machine.trt.manages_weights = False
    assert executor_of(fp16.rtx).weights == WeightPlacement(shared=0, private=0, unmanaged_engines=2)
    assert "each has a copy of its own" in caplog.text
    assert answer(fp16.rtx) == managed


def test_weights_of_another_plan_are_detected(fp16: Engines, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The double's check can fail: here the weights of one engine are mapped for both."""
    machine.trt.plans = with_private_bytes(fp16.plans)
    monkeypatch.setattr(
        plan_loading, "_pieces", lambda sections, _granularity: ([plan_loading._Piece(0, len(sections[0]))], [[], []])
    )
    with pytest.raises(FaultError, match="without its weights"):
        answer(fp16.rtx)


@given(
    granules=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12),
    longer=st.integers(0, 2),
)
def test_pieces_cover_every_section_once(granules: list[tuple[int, int]], longer: int) -> None:
    """Each granule holds one number; granules with the same number in both sections are common."""
    size = 4
    first, second = (np.repeat(np.array(column, np.uint8), size) for column in zip(*granules, strict=True))
    second = np.concatenate([second, np.full(longer * size, 9, np.uint8)])
    common, own = _pieces([first, second], size)
    for section, pieces in zip((first, second), own, strict=True):
        covered = np.zeros(len(section), np.int64)
        for piece in [*common, *pieces]:
            assert piece.offset % size == piece.size % size == 0 < piece.size
            covered[piece.offset : piece.offset + piece.size] += 1
        assert (covered == 1).all()
    for piece in common:
        place = slice(piece.offset, piece.offset + piece.size)
        np.testing.assert_array_equal(first[place], second[place])
    assert sum(piece.size for piece in common) == size * sum(one == other for one, other in granules)


# Engines that cannot be loaded.


def edit(**changes: Any) -> Callable[[Path], None]:
    """Change the target section of the manifest and seal it again."""

    def apply(engine: Path) -> None:
        manifest = Manifest.read(engine)
        manifest.model_copy(update={"target": manifest.target.model_copy(update=changes)}).write(engine)

    return apply


def cut(path: str) -> Callable[[Path], None]:
    def apply(engine: Path) -> None:
        os.truncate(engine / path, (engine / path).stat().st_size - 1)

    return apply


def flip(path: str) -> Callable[[Path], None]:
    def apply(engine: Path) -> None:
        content = bytearray((engine / path).read_bytes())
        content[len(content) // 2] ^= 1
        (engine / path).write_bytes(content)

    return apply


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "another GPU": (
        edit(sms=(89, 80)),
        r"compiled for compute capabilities 89, 80; this machine has GB10 \(121\); .* --sm 121",
    ),
    "another TensorRT-RTX": (
        edit(tensorrt_rtx="1.6.0.1"),
        r"built with TensorRT-RTX 1\.6\.0\.1, this is 1\.7.*pip install tensorrt-rtx-cu13==1\.6\.0\.1",
    ),
    "truncated plan": (cut("diffusion/engine.plan"), r"diffusion/engine\.plan has \d+ bytes, the manifest says"),
    "changed pool": (flip("weights/pool.bin"), r"weights/pool\.bin was changed after the build"),
}


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_engine_is_refused_and_the_cause_named(fp16: Engines, tmp_path: Path, case: str) -> None:
    engine = Path(shutil.copytree(fp16.rtx, tmp_path / "engine"))
    damage, message = BROKEN[case]
    damage(engine)
    with pytest.raises(TriModeError, match=message) as caught:
        load_engine(engine)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut("ar/engine.plan"), r"ar/engine\.plan ends 1 bytes early"),
        (flip("ar/engine.plan"), r"ar/engine\.plan: TensorRT-RTX cannot load it \(Serialization assertion"),
        (flip("weights/pool.bin"), r"ar/engine\.plan: TensorRT-RTX cannot load it"),
    ],
)
def test_a_broken_engine_is_refused_on_loading_if_verification_is_off(
    fp16: Engines, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    engine = Path(shutil.copytree(fp16.rtx, tmp_path / "engine"))
    damage(engine)
    with pytest.raises(TriModeError, match=message):
        load_engine(engine, verify=False)


def test_the_reasons_of_tensorrt_for_refusing_a_plan_are_named(fp16: Engines, machine: Machine) -> None:
    wrong = tensorrt_rtx.EngineInvalidityDiagnostics
    machine.trt.invalidity = int(wrong.OLD_CUDA_DRIVER) | int(wrong.UNSUPPORTED_CC)
    with pytest.raises(TriModeError, match=r"ar/engine\.plan: .*\(unsupported cc, old cuda driver\); build"):
        executor_of(fp16.rtx)


def test_real_tensorrt_refuses_a_malformed_header() -> None:
    """The double refuses a malformed plan as the real library does; this part of the library needs no GPU."""

    class Quiet(tensorrt_rtx.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            pass

    runtime = tensorrt_rtx.Runtime(Quiet())
    validity, diagnostics = runtime.get_engine_validity(np.zeros(runtime.engine_header_size, np.uint8))
    assert validity == tensorrt_rtx.EngineValidity.INVALID
    assert diagnostics & int(tensorrt_rtx.EngineInvalidityDiagnostics.MALFORMED_ENGINE)


def test_too_little_memory_is_one_line(fp16: Engines, machine: Machine) -> None:
    machine.cuda.free = 1 << 21
    with pytest.raises(TriModeError, match=r"the GPU has no \d+\.\d\d GB left for the (weights|KV pool)") as caught:
        executor_of(fp16.rtx)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("missing", ["tensorrt_rtx", "cuda.bindings"])
def test_the_error_for_a_missing_package_names_the_remedy(
    fp16: Engines, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name in [
        name for name in sys.modules if name.startswith(("trimode.runtime.rtx.", "trimode.runtime.gpu.", missing))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(TriModeError, match=rf"needs the package {missing}: pip install 'trimode\[rtx\]'"):
        load_engine(fp16.rtx, verify=False)


def trimode(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "from trimode.cli.main import main; main()"]
    return subprocess.run([*program, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")
def test_without_a_gpu_the_command_names_the_cause(fp16: Engines) -> None:
    found = trimode("generate", fp16.rtx, "--prompt", "hello")
    assert (found.returncode, found.stdout) == (2, "")
    assert "needs an NVIDIA GPU" in found.stderr
    assert "--target cpu" in found.stderr
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("library", "words"),
    [
        (LibcudaDouble(3), r"does not start \(CUDA error 3\)"),
        (LibcudaDouble(100), "it finds no GPU"),
    ],
)
def test_the_error_for_a_driver_without_a_gpu(
    fp16: Engines, monkeypatch: pytest.MonkeyPatch, library: LibcudaDouble, words: str
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: library)
    with pytest.raises(TriModeError, match=f"needs an NVIDIA GPU; the CUDA driver here: .*{words}"):
        load_engine(fp16.rtx, verify=False)
