"""The house rules that tools would let slip: a folder named `build` is looked into, the runtime is light, and make's
engines are of what was asked.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
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
    for path in ("build/engine_builder.py", "tests/build/test_engine_builder.py"):
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
import trimode.cli.generate
from trimode import LLM, SamplingParams

with LLM(Path(sys.argv[1])) as llm:
    print(llm.generate([200, 201], SamplingParams(max_tokens=5)).outputs[0].length)
"""
    found = run(ROOT, sys.executable, "-c", program, str(random_engine))
    assert found.returncode == 0, found.stderr
    assert found.stdout == "5\n"


TRIMODE = """\
#!/bin/sh
echo "$@" >>log
case "$*" in
*broken*) exit 2 ;;
quantize*) mkdir "$3" && touch "$3/config.json" ;;
build*) mkdir "$3" && touch "$3/manifest.json" ;;
esac
"""


@pytest.fixture
def workshop(tmp_path: Path) -> Path:
    """The Makefile over two models of one name, and a `trimode` that writes down what it is told."""
    shutil.copyfile(ROOT / "Makefile", tmp_path / "Makefile")
    for folder in ("model", "quantize", "plugins", "build", "runtime", "one/tiny/linear_spec_lora", "two/tiny"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("one/tiny/config.json", "one/tiny/linear_spec_lora/adapter_model.safetensors", "two/tiny/config.json"):
        (tmp_path / file).write_text("")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/trimode").write_text(TRIMODE)
    (tmp_path / ".venv/bin/trimode").chmod(0o755)
    return tmp_path


def told(workshop: Path, *arguments: str, code: int = 0) -> list[str]:
    """The commands of `trimode` that make called, by their names."""
    (workshop / "log").write_text("")
    made = run(workshop, "make", "--old-file=.venv/.package", *arguments)
    assert made.returncode == code, made.stderr
    return [line.split()[0] for line in (workshop / "log").read_text().splitlines()]


BUILD = ["quantize", "build", "info"]
CHANGES: dict[str, tuple[tuple[str, ...], Callable[[Path], object]]] = {
    "method": (("METHOD=rtn",), lambda _: None),
    "group": (("GROUP=32",), lambda _: None),
    "calibration": (("CALIBRATION=text.jsonl",), lambda folder: (folder / "text.jsonl").write_text("")),
    "another folder of the same name": (("MODEL=two/tiny",), lambda _: None),
    "changed model": ((), lambda folder: (folder / "one/tiny/config.json").write_text("{}")),
    "changed adapter": (
        (),
        lambda folder: (folder / "one/tiny/linear_spec_lora/adapter_model.safetensors").write_text("x"),
    ),
    "no adapter": ((), lambda folder: shutil.rmtree(folder / "one/tiny/linear_spec_lora")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_make_builds_the_engine_anew_when_it_is_not_of_what_was_asked(workshop: Path, change: str) -> None:
    arguments, apply = CHANGES[change]
    asked = ("build-engine", "MODEL=one/tiny")
    assert told(workshop, *asked) == BUILD
    assert told(workshop, *asked) == ["info"]
    apply(workshop)
    assert told(workshop, *asked, *arguments) == BUILD
    assert told(workshop, *asked, *arguments) == ["info"]
    assert not list(workshop.glob("engines/*.new"))


def test_make_builds_for_another_target_from_the_same_weights(workshop: Path) -> None:
    engine = ("build-engine", "MODEL=one/tiny", "ENGINE=engines/mine")
    assert told(workshop, *engine) == BUILD
    assert told(workshop, *engine, "TARGET=rtx") == ["build", "info"]


def test_make_needs_the_quantised_folder_no_more_once_the_engine_stands(workshop: Path) -> None:
    told(workshop, "build-engine", "MODEL=one/tiny")
    shutil.rmtree(workshop / "engines/tiny-w4a16-awq64")
    assert told(workshop, "build-engine", "MODEL=one/tiny") == ["info"]


def test_make_keeps_what_it_has_not_made_and_what_it_cannot_replace(workshop: Path) -> None:
    (workshop / "mine").mkdir()
    (workshop / "mine/manifest.json").write_text("mine")
    assert told(workshop, "build-engine", "MODEL=one/tiny", "ENGINE=mine", code=2) == []
    assert told(workshop, "serve", "ENGINE=mine") == ["serve"]
    assert (workshop / "mine/manifest.json").read_text() == "mine"
    told(workshop, "build-engine", "MODEL=one/tiny", "ENGINE=engines/kept")
    told(workshop, "build-engine", "MODEL=one/tiny", "ENGINE=engines/kept", "TARGET=broken", code=2)
    assert (workshop / "engines/kept/manifest.json").exists()
