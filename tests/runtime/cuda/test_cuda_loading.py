"""Loading an engine of target cuda: the kernels that a GPU gets, and refusals in one line."""

from __future__ import annotations

import ctypes
import logging
import shutil
import sys
from pathlib import Path

import pytest

from tests.runtime.cuda.conftest import Engines, Gpu
from tests.support.driver_double import LibcudaDouble
from trimode.common.errors import TriModeError
from trimode.engine.kernel_library import LibraryIndex
from trimode.engine.manifest import Manifest
from trimode.engine.targets.cuda import CudaSection
from trimode.runtime.cuda.kernels import Kernels
from trimode.runtime.gpu.device import Device
from trimode.runtime.loading import load_engine


def built_for(engine: Path, sms: tuple[int, ...], out: Path) -> Path:
    """A copy of the engine with kernels for these GPUs only."""
    shutil.copytree(engine, out)
    manifest = Manifest.read(out)
    built = shutil.move(out / "kernels/sm_121", out / "built")
    for sm in sms:
        folder = Path(shutil.copytree(built, out / f"kernels/sm_{sm}"))
        index = LibraryIndex.model_validate_json((folder / "kernels.json").read_text())
        index.model_copy(update={"compute_capability": sm}).write(folder)
    manifest.model_copy(update={"target": CudaSection(sms=sms)}).write(out)
    return out


@pytest.mark.parametrize(
    ("sms", "present", "chosen"),
    [
        ((80, 90), 103, 80),  # kernels for 9.0 use instructions of that GPU alone
        ((80, 89, 90), 120, 89),
        ((80, 90), 90, 90),
        ((80, 86, 121), 121, 121),
    ],
)
def test_a_gpu_gets_its_own_kernels_or_the_newest_that_it_can_run(
    small: Engines,
    gpu: Gpu,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    sms: tuple[int, ...],
    present: int,
    chosen: int,
) -> None:
    driver = gpu(small)
    driver.capability = present
    engine = built_for(small.cuda, sms, tmp_path / "engine")
    with caplog.at_level(logging.WARNING):
        kernels = Kernels(Device(0), engine / "kernels")
    assert kernels._library.index.compute_capability == chosen
    words = f"has no kernels for compute capability {present}: those for {chosen} are used"
    assert [words in record.getMessage() for record in caplog.records] == [True] * (chosen != present)


def refusal(engine: Path) -> str:
    with pytest.raises(TriModeError) as caught:
        load_engine(engine, verify=False)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_machine_without_a_gpu_is_refused(small: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: LibcudaDouble(100))
    assert "is for target cuda and needs an NVIDIA GPU" in refusal(small.cuda)


def test_a_gpu_that_no_kernels_run_on_is_refused(small: Engines, gpu: Gpu, tmp_path: Path) -> None:
    gpu(small)
    engine = built_for(small.cuda, (90,), tmp_path / "engine")
    assert "compiled for compute capabilities 90; this machine has GB10 (121)" in refusal(engine)


def test_too_little_memory_is_refused(small: Engines, gpu: Gpu) -> None:
    gpu(small).free = 1 << 12
    assert "GB left for the weights" in refusal(small.cuda)


def test_the_error_for_a_missing_package_names_the_remedy(
    small: Engines, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(small)
    for name in [name for name in sys.modules if name.startswith(("trimode.runtime.cuda.", "trimode.runtime.gpu."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert "needs the package cuda.bindings: pip install 'trimode[cuda]'" in refusal(small.cuda)
