"""Loading of compiled plans: what is logged, and which engines are refused."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runtime.tensorrt.conftest import Engines, Machine
from trimode.build.conversion import convert_engine
from trimode.build.cuda.target import CudaTarget
from trimode.common.errors import TriModeError
from trimode.engine.manifest import Manifest
from trimode.runtime.loading import load_engine


@pytest.mark.usefixtures("machine")
def test_the_log_says_that_no_plan_was_run(fp16: Engines, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        load_engine(fp16.tensorrt)
    (line,) = [record.message for record in caplog.records if "tensorrt" in record.message]
    assert "no plan of target tensorrt was ever run on a GPU" in line
    assert "MB of weights" in line


@pytest.mark.usefixtures("machine")
def test_an_engine_without_plans_is_refused_with_the_command(fp16: Engines) -> None:
    with pytest.raises(TriModeError, match=r"has no plans yet; on the machine .* run: trimode compile .*emitted OUT$"):
        load_engine(fp16.emitted)


def test_a_compiled_engine_is_converted_without_its_plans(fp16: Engines, tmp_path: Path) -> None:
    for name, source in (("first", fp16.emitted), ("second", fp16.tensorrt)):
        convert_engine(source, tmp_path / name, CudaTarget())
    assert Manifest.read(tmp_path / "second") == Manifest.read(tmp_path / "first")
    assert not list((tmp_path / "second").rglob("*.plan"))


def compiled_by(**plans: object) -> Callable[[Path], None]:
    """Change how the manifest says that the plans were compiled, and seal it again."""

    def apply(engine: Path) -> None:
        manifest = Manifest.read(engine)
        changed = manifest.target.plans.model_copy(update=plans)  # type: ignore[attr-defined]
        target = manifest.target.model_copy(update={"plans": changed})
        manifest.model_copy(update={"target": target}).write(engine)

    return apply


def spoiled(engine: Path) -> None:
    (engine / "diffusion/engine.plan").write_bytes(b"no plan")


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (compiled_by(compute_capability=90), r"compiled for compute capabilities 90; this machine has GB10 \(121\)"),
        (
            compiled_by(tensorrt="11.3.0.99"),
            r"compiled with TensorRT 11\.3\.0\.99, this is 11\.4.*pip install tensorrt-cu13==11\.3\.0\.99, or compile",
        ),
        (spoiled, r"diffusion/engine\.plan: TensorRT cannot load it \(Serialization assertion failed\); compile"),
    ],
)
def test_a_plan_that_cannot_run_here_is_refused(
    fp16: Engines, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    engine = Path(shutil.copytree(fp16.tensorrt, tmp_path / "engine"))
    damage(engine)
    with pytest.raises(TriModeError, match=message) as caught:
        load_engine(engine, verify=False)
    assert "\n" not in str(caught.value)


def test_too_little_memory_is_one_line(fp16: Engines, machine: Machine) -> None:
    machine.cuda.free = 1 << 18
    with pytest.raises(TriModeError, match=r"the GPU has no \d+\.\d\d GB left for the weights"):
        load_engine(fp16.tensorrt, verify=False)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("missing", ["tensorrt", "cuda.bindings"])
def test_the_error_for_a_missing_package_names_the_remedy(
    fp16: Engines, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name in [
        name for name in sys.modules if name.startswith(("trimode.runtime.tensorrt.", "trimode.runtime.gpu."))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(TriModeError, match=rf"needs the package {missing}: pip install 'trimode\[tensorrt\]'"):
        load_engine(fp16.tensorrt, verify=False)
