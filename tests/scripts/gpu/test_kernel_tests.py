"""The kernel tests as a part of the GPU check: their options, over a double of the CUDA driver."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts.gpu.check_report import markdown
from scripts.gpu.kernel_tests import KERNELS, PYTEST, results_of_tests
from tests.plugins import conftest
from tests.support.gpu_kernels import compile_kernels, listed_kernels
from tests.support.uncompiled_kernels import UncompiledKernels
from trimode.build.gpu import kernel_emission
from trimode.common import gpus
from trimode.common.gpus import Gpu, Gpus
from trimode.plugins.compilation import CompiledKernel, Resources
from trimode.plugins.operators import Operator

ROOT = Path(__file__).resolve().parents[3]
# Two quick ones that launch kernels in fp32.
TESTS = (
    "tests/plugins/test_graph_operators.py::test_a_row_of_zeros_has_a_norm",
    "tests/plugins/test_head_product.py::test_equal_logits_are_ordered_by_token_across_tiles",
)
DOUBLE = ("-p", "tests.support.kernel_tests_on_double")


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels that both tests launch, listed by the interpreter."""
    file = tmp_path_factory.mktemp("listed") / "kernels.json"
    subprocess.run([*PYTEST, *TESTS, f"--list-kernels={file}"], cwd=ROOT, check=True)
    return file


@pytest.fixture
def emitted(listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder into which the double writes the kernels."""
    monkeypatch.setenv("TESTED_KERNELS", str(listed))
    monkeypatch.setenv("KERNEL_FOLDER", str(tmp_path / KERNELS))
    return tmp_path


def test_the_tests_launch_compiled_kernels(emitted: Path) -> None:
    (record,) = results_of_tests(emitted, *TESTS, *DOUBLE)
    assert (record["passed"], record["failed"], record["skipped"], record["missing"]) == (2, [], 0, 0)
    assert record["kernel_launches"] == 5
    page = markdown({"date": "", "command": "", "device": {}, "parts": {}, "engines": [record], "results": []})
    assert "- tests/plugins --gpu: 2 passed, 0 failed, 0 skipped; 5 launches, 0 kernels missing" in page


def test_a_kernel_that_fits_no_gpu_is_left_out(listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, kernels = UncompiledKernels(monkeypatch), list(listed_kernels(listed))
    compile_operator = kernel_emission.compile_operator

    def compiled(operator: Operator, *rest: Any) -> CompiledKernel:
        found = compile_operator(operator, *rest)
        spilled = Resources(registers=255, spilled_bytes=8, stack_bytes=0)
        return replace(found, resources=spilled) if operator.name == "RmsNorm" else found

    monkeypatch.setattr(kernel_emission, "compile_operator", compiled)
    assert compile_kernels(listed, tmp_path / KERNELS, 90) == len(kernels) - 1
    assert len(compiler.kernels) == 2 * len(kernels)


def test_a_wrong_kernel_and_a_missing_one_are_reported(emitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: kernels that write nothing, and a test whose kernels were not listed."""
    monkeypatch.setenv("KERNELS_COMPUTE", "0")
    other = "tests/plugins/test_head_product.py::test_very_high_and_very_low_logits_do_not_overflow"
    records = results_of_tests(emitted, *TESTS, other, *DOUBLE)
    record = next(records)
    assert (record["passed"], len(record["failed"]), record["skipped"], record["missing"]) == (0, 2, 1, 1)
    with pytest.raises(SystemExit, match=r"2 kernel tests failed: .*::test_a_row_of_zeros_has_a_norm"):
        next(records)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (Gpus("none", []), "--gpu needs an NVIDIA GPU; the CUDA driver here: none"),
        (Gpus("CUDA 13.0", [Gpu(ordinal=0, name="H100", compute_capability=90)]), "missing; run `python -m scripts"),
    ],
)
def test_without_a_gpu_or_kernels_nothing_is_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: Gpus, message: str
) -> None:
    options = {"gpu": True, "kernels": tmp_path / "none"}
    monkeypatch.setattr(gpus, "find_gpus", lambda: found)
    with pytest.raises(pytest.UsageError, match=message):
        conftest.pytest_configure(SimpleNamespace(getoption=lambda name, _default: options[name]))  # type: ignore[arg-type]
