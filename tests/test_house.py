"""The house rules that tools would let slip: a folder named `build` is looked into, and the runtime is light."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bare_house(tmp_path: Path) -> Path:
    """The project's settings over two empty folders named build."""
    for file in ("pyproject.toml", ".gitignore"):
        shutil.copyfile(ROOT / file, tmp_path / file)
    (tmp_path / "build").mkdir()
    (tmp_path / "tests" / "build").mkdir(parents=True)
    return tmp_path


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("folder", ["build", "tests/build"])
def test_ruff_finds_a_fault_in_a_folder_named_build(bare_house: Path, folder: str) -> None:
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "."]
    assert run(bare_house, *ruff).returncode == 0
    (bare_house / folder / "fault.py").write_text("import os\n")
    found = run(bare_house, *ruff)
    assert found.returncode == 1
    assert "F401" in found.stdout


def test_pytest_runs_a_failing_test_in_tests_build(bare_house: Path) -> None:
    (bare_house / "tests" / "build" / "test_fault.py").write_text("def test_fault():\n    assert False\n")
    found = run(bare_house, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert found.returncode == 1
    assert "1 failed" in found.stdout


def test_git_keeps_folders_named_build(bare_house: Path) -> None:
    run(bare_house, "git", "init", "--quiet")
    for path in ("build/engine.py", "tests/build/test_engine.py"):
        assert run(bare_house, "git", "check-ignore", path).returncode == 1


def test_the_runtime_decodes_without_torch(random_engine: Path) -> None:
    """In a fresh process where torch and its kin cannot be imported, an answer is generated."""
    program = """
import sys
from pathlib import Path

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "peft", "modelopt", "onnx", "tensorrt_rtx", "cuda"}:
            raise AssertionError(f"imported {name}")

sys.meta_path.insert(0, Forbidden())
import trimode.runtime.cli
from trimode.runtime import LLM, SamplingParams

with LLM(Path(sys.argv[1])) as llm:
    print(llm.generate([200, 201], SamplingParams(max_tokens=5)).outputs[0].length)
"""
    found = run(ROOT, sys.executable, "-c", program, str(random_engine))
    assert found.returncode == 0, found.stderr
    assert found.stdout == "5\n"
