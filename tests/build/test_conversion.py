"""``trimode convert``: a converted directory equals the directory that a build writes, byte for byte."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.uncompiled_kernels import UncompiledKernels
from trimode.build.conversion import convert_engine
from trimode.build.cuda.target import CudaTarget
from trimode.build.engine_builder import build_engine
from trimode.build.gpu.kernel_target import KernelTarget
from trimode.build.tensorrt.target import TensorrtTarget
from trimode.common.errors import TriModeError
from trimode.engine.files import POOL
from trimode.model.checkpoint import Checkpoint

LIMITS: dict[str, Any] = {"sms": (80, 90), "dtype": "fp16", "max_batch": 4, "max_step": 64}
TARGETS: dict[str, KernelTarget] = {
    "cuda": CudaTarget(**LIMITS),
    "tensorrt": TensorrtTarget(**LIMITS, emit_only=True),
    "plugins": TensorrtTarget(**LIMITS, emit_only=True, operators="plugins"),
}


@pytest.fixture(scope="module", params=["random_awq_checkpoint", "random_checkpoint", "tiny_checkpoint"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint for both targets: with input scales and an int4 head, with 16-bit matrices only, and in bf16."""
    checkpoint, folder = Checkpoint(request.getfixturevalue(request.param)), tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        UncompiledKernels(patch)
        for name, target in TARGETS.items():
            build_engine(checkpoint, folder / name, target=target, capacity=128, top_k=4)
    return {name: folder / name for name in TARGETS}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("source", "target"),
    [("cuda", "tensorrt"), ("tensorrt", "cuda"), ("cuda", "plugins"), ("plugins", "cuda"), ("plugins", "tensorrt")],
)
def test_a_converted_directory_equals_a_built_one(
    built: dict[str, Path], tmp_path: Path, source: str, target: str
) -> None:
    """Without a compiler of kernels: both targets have the same."""
    chosen = {"cuda": CudaTarget(), "tensorrt": TensorrtTarget(), "plugins": TensorrtTarget(operators="plugins")}
    convert_engine(built[source], tmp_path / "out", chosen[target])
    found, expected = contents(tmp_path / "out"), contents(built[target])
    assert found.keys() == expected.keys()
    assert [path for path in found if found[path] != expected[path]] == []
    assert (tmp_path / "out" / POOL).samefile(built[source] / POOL)


def test_the_targets_have_all_files_but_the_engines_in_common(built: dict[str, Path]) -> None:
    cuda, tensorrt = (contents(built[name]) for name in ("cuda", "tensorrt"))
    common = {path for path in cuda if cuda[path] == tensorrt.get(path)}
    assert {path.partition("/")[0] for path in cuda.keys() ^ tensorrt.keys()} <= {"ar", "diffusion"}
    assert {path.partition("/")[0] for path in cuda.keys() - common} == {"ar", "diffusion", "manifest.json"}
    assert any(path.startswith("kernels/sm_90/") for path in common)


def cut_a_kernel(engine: Path) -> None:
    kernel = next((engine / "kernels/sm_90").glob("AttendMasked*.ptx"))
    kernel.write_bytes(kernel.read_bytes()[:-1])


def of_fp32(engine: Path, checkpoint: Path) -> None:
    shutil.rmtree(engine)
    with pytest.MonkeyPatch.context() as patch:
        UncompiledKernels(patch)
        build_engine(Checkpoint(checkpoint), engine, target=CudaTarget(sms=(80,), dtype="fp32"), capacity=64)


def of_cpu(engine: Path, checkpoint: Path) -> None:
    shutil.rmtree(engine)
    build_engine(Checkpoint(checkpoint), engine, capacity=64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda engine, _: cut_a_kernel(engine), r"AttendMasked.*\.ptx has \d+ bytes, the manifest says"),
        (of_fp32, "target tensorrt takes bf16 and fp16, and the engine is fp32"),
        (
            of_cpu,
            "is for target cpu, which has no kernels of ours; build for tensorrt from the checkpoint: trimode bui",
        ),
    ],
)
def test_an_engine_that_cannot_be_converted_is_refused(
    built: dict[str, Path],
    random_checkpoint: Path,
    tmp_path: Path,
    change: Callable[[Path, Path], None],
    message: str,
) -> None:
    source = Path(shutil.copytree(built["cuda"], tmp_path / "source"))
    change(source, random_checkpoint)
    with pytest.raises(TriModeError, match=message) as caught:
        convert_engine(source, tmp_path / "out", TensorrtTarget())
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_command(built: dict[str, Path], tmp_path: Path) -> None:
    program = [sys.executable, "-m", "trimode", "convert", str(built["cuda"])]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*program, *arguments], capture_output=True, text=True, check=False)

    for name, options, shown in (
        (
            "standard",
            [],
            "16-bit products by standard operators; kernels for compute capability 8.0",
        ),
        (
            "plugins",
            ["--operators", "plugins"],
            "not compiled yet; 16-bit products by plugins",
        ),
    ):
        done = run(str(tmp_path / name), "--target", "tensorrt", *options)
        assert done.returncode == 0, done.stderr
        assert shown in " ".join(done.stdout.split())
    for options, message in (
        (["--target", "rtx"], "'rtx' is not one of 'cuda', 'tensorrt'"),
        (["--target", "cuda", "--operators", "plugins"], "--operators is not an option of target cuda"),
    ):
        refused = run(str(tmp_path / "out"), *options)
        assert refused.returncode == 2
        assert message in refused.stderr
