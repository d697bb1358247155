"""Targets are independent: a build for one imports no other, and one line registers a new one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import click
import numpy as np
import pytest

from trimode.build import registry
from trimode.build.engine_builder import build_engine
from trimode.build.pass_audit import EngineAudit, no_kernels
from trimode.build.target import Built, RequestedLimits, TargetOption, option, options_of
from trimode.cli.machine_report import examine
from trimode.cli.target_options import chosen_options, target_options
from trimode.common.errors import TriModeError
from trimode.common.installation import Installation
from trimode.common.progress import Progress
from trimode.engine import targets
from trimode.engine.files import POOL
from trimode.engine.manifest import Limits, Manifest
from trimode.engine.targets.cpu import CpuSection
from trimode.engine.targets.section import TargetSection
from trimode.model.checkpoint import Checkpoint
from trimode.model.config import ModelConfig
from trimode.runtime import loading
from trimode.runtime.executor import BidirectionalStep, Candidates, CausalStep, Executor
from trimode.runtime.kv.host_kv_pool import KvPool
from trimode.runtime.target import HostLimits

ROOT = Path(__file__).resolve().parent.parent
TOKEN = 300


class ToySection(TargetSection):
    name: Literal["toy"] = "toy"
    token: int

    @property
    def engine_files(self) -> tuple[str, ...]:
        return ("toy.txt",)

    @property
    def summary(self) -> str:
        return f"predicts token {self.token}"


@dataclass(frozen=True, kw_only=True)
class ToyTarget:
    """Both engines always predict the same token."""

    name: ClassVar[str] = "toy"
    packages: ClassVar[tuple[str, ...]] = ("toy-compiler",)
    token: int = field(default=TOKEN, metadata=option("The token.", "--the-token"))

    @property
    def dtype(self) -> Literal["fp32"]:
        return "fp32"

    def limits(self, _config: ModelConfig, requested: RequestedLimits) -> Limits:
        return Limits(
            capacity=requested.capacity or 64, prefill_step=requested.prefill_step, top_k=1, max_batch=None, max_step=8
        )

    def import_packages(self) -> None:
        pass

    def build(self, _checkpoint: Checkpoint, folder: Path, _limits: Limits, _progress: Progress) -> Built:
        for name in ("ar/toy.txt", "diffusion/toy.txt", POOL):
            (folder / name).parent.mkdir()
            (folder / name).write_text("toy")
        return Built(ToySection(token=self.token), ())

    @classmethod
    def open_audit(cls, engine: Path, _manifest: Manifest) -> EngineAudit:
        raise no_kernels(engine, cls.name)

    @classmethod
    def can_build(cls, _installation: Installation) -> str:
        return "builds"


class ToyExecutor:
    def __init__(self, manifest: Manifest) -> None:
        self._token = manifest.section(ToySection).token
        self.pool = KvPool(1, 1, 1, manifest.limits.capacity)

    def run(self, step: CausalStep | BidirectionalStep) -> Candidates:
        rows = step.logit_rows.shape
        return Candidates(
            np.zeros((*rows, 1), np.float32), np.full((*rows, 1), self._token), np.zeros(rows, np.float32)
        )


class ToyRuntime:
    packages: tuple[str, ...] = ("toy-driver",)

    def load_executor(self, _engine: Path, manifest: Manifest, _limits: HostLimits) -> Executor:
        return ToyExecutor(manifest)

    def can_run(self, _installation: Installation) -> str:
        return "runs"


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target of the manifest, the build and the runtime."""
    monkeypatch.setitem(targets.SECTIONS, "toy", ToySection)
    monkeypatch.setitem(registry.TARGETS, "toy", ToyTarget)
    monkeypatch.setitem(loading.TARGETS, "toy", ToyRuntime())


@pytest.mark.usefixtures("toy")
def test_a_registered_target_builds_loads_and_runs(random_checkpoint: Path, tmp_path: Path) -> None:
    target = registry.TARGETS["toy"](token=301)
    built = build_engine(Checkpoint(random_checkpoint), tmp_path / "engine", target=target)
    manifest, _, executor = loading.load_engine(tmp_path / "engine")
    assert manifest == built
    assert manifest.target == ToySection(token=301)
    assert manifest.limits.max_step == 8
    found = executor.run(CausalStep.chain(0, np.array([[200]]), np.array([0]), np.array([[0]])))
    assert found.tokens.tolist() == [[[301]]]
    with pytest.raises(TypeError, match="for target toy, not for CpuSection"):
        manifest.section(CpuSection)


@pytest.mark.usefixtures("toy")
def test_a_file_of_a_registered_target_must_be_there(random_checkpoint: Path, tmp_path: Path) -> None:
    manifest = build_engine(Checkpoint(random_checkpoint), tmp_path / "engine", target=ToyTarget())
    files = [entry for entry in manifest.files if entry.path != "ar/toy.txt"]
    with pytest.raises(ValueError, match=r"files lacks ar/toy\.txt"):
        Manifest.model_validate(manifest.model_dump() | {"files": files})


def test_an_unregistered_target_is_refused(random_checkpoint: Path, tmp_path: Path, toy: None) -> None:
    del toy
    build_engine(Checkpoint(random_checkpoint), tmp_path / "engine", target=ToyTarget())
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(targets.SECTIONS, "toy")
        with pytest.raises(TriModeError, match=r"manifest\.json: target: name must be one of cpu, cuda, rtx, tensorrt"):
            loading.load_engine(tmp_path / "engine")


def test_the_options_of_a_target_are_listed() -> None:
    assert options_of(ToyTarget) == (TargetOption("token", "--the-token", int, TOKEN, "The token."),)
    flags = {name: [found.flag for found in options_of(target)] for name, target in registry.TARGETS.items()}
    assert flags == {
        "cpu": ["--activations", "--tp"],
        "cuda": ["--max-batch", "--max-step", "--dtype", "--sm", "--tp"],
        "rtx": ["--max-batch", "--max-step", "--dtype", "--sm", "--tp"],
        "tensorrt": ["--max-batch", "--max-step", "--dtype", "--sm", "--operators", "--emit-only"],
    }


@pytest.mark.usefixtures("toy")
def test_the_command_line_has_the_options_of_a_registered_target() -> None:
    def command() -> None: ...

    toy = next(found for found in click.command()(target_options(command)).params if found.name == "token")
    assert toy.opts == ["--the-token"]
    assert isinstance(toy, click.Option)
    assert toy.help == "toy: The token [default: 300]."
    assert chosen_options("toy", {"token": 5, "dtype": None}) == {"token": 5}
    with pytest.raises(TriModeError, match=r"^--the-token is not an option of target cpu$"):
        chosen_options("cpu", {"token": 5})


@pytest.mark.usefixtures("toy")
def test_the_doctor_names_the_packages_of_a_registered_target() -> None:
    found = examine()
    assert found.packages.keys() >= {"toy-compiler", "toy-driver", "onnxruntime", "torch"}
    assert found.targets["toy"] == "runs; builds"


@pytest.mark.parametrize("side", [registry.TARGETS, loading.TARGETS])
def test_every_target_has_a_section_of_its_name(side: dict[str, Any]) -> None:
    assert side.keys() == targets.SECTIONS.keys()
    for name, target in registry.TARGETS.items():
        assert target.name == targets.SECTIONS[name].model_fields["name"].default == name


SLICE = {
    "engine/targets/toy.py": """
from typing import Literal
from trimode.engine.targets.cpu import CpuSection

class ToySection(CpuSection):
    name: Literal["toy"] = "toy"

SECTION = ToySection
""",
    "build/toy/__init__.py": "",
    "build/toy/target.py": """
from typing import ClassVar
from trimode.build.cpu.target import CpuTarget

class ToyTarget(CpuTarget):
    name: ClassVar[str] = "toy"

TARGET = ToyTarget
""",
    "runtime/toy/__init__.py": "",
    "runtime/toy/target.py": """
from trimode.runtime.cpu.target import CpuRuntime

TARGET = CpuRuntime()
""",
}
PROGRAM = """
from trimode.build.registry import TARGETS
from trimode.engine.targets import SECTIONS
from trimode.runtime import loading
assert list(SECTIONS) == list(TARGETS) == ["toy", "cpu", "cuda", "rtx", "tensorrt"]
assert list(loading.TARGETS) == list(TARGETS)
from trimode.cli.main import main
main()
"""


def test_one_line_registers_a_target(tmp_path: Path) -> None:
    """In a copy of the tree: besides the files of its own slice, only the list of names changes."""
    folders = ("build", "cli", "common", "engine", "model", "plugins", "quantize", "runtime")
    for folder in folders:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "trimode", tmp_path / "trimode", symlinks=True)
    for name, text in SLICE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    names = tmp_path / "engine/targets/__init__.py"
    changed = names.read_text().replace('NAMES = ("cpu"', 'NAMES = ("toy", "cpu"')
    names.write_text(changed)
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, "build", "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert "[toy|cpu|cuda|rtx|tensorrt]" in found.stdout


def test_a_cpu_build_imports_no_other_target(random_checkpoint: Path, tmp_path: Path) -> None:
    """In a new process, because other tests import all targets."""
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from trimode.build.engine_builder import build_engine\n"
        "from trimode.model.checkpoint import Checkpoint\n"
        "build_engine(Checkpoint(Path(sys.argv[1])), Path(sys.argv[2]))\n"
        "others = ('tensorrt', 'trimode.build.rtx', 'trimode.build.tensorrt', 'trimode.plugins.compilation')\n"
        "print([name for name in sys.modules if name.startswith(others)])\n"
    )
    command = [sys.executable, "-c", program, str(random_checkpoint), str(tmp_path / "engine")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
    assert (tmp_path / "engine/manifest.json").is_file()
