"""Rules of the project: tools do not skip folders named `build`, the runtime needs no torch, and make builds an engine
again when its model or its options change.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trimode.engine.manifest import FORMAT_VERSION

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bare_project(tmp_path: Path) -> Path:
    """The project's settings over two empty folders named build."""
    for file in ("pyproject.toml", ".gitignore"):
        shutil.copyfile(ROOT / file, tmp_path / file)
    (tmp_path / "build").mkdir()
    (tmp_path / "tests" / "build").mkdir(parents=True)
    return tmp_path


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("folder", ["build", "tests/build"])
def test_ruff_finds_a_fault_in_a_folder_named_build(bare_project: Path, folder: str) -> None:
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "."]
    assert run(bare_project, *ruff).returncode == 0
    (bare_project / folder / "fault.py").write_text("import os\n")
    found = run(bare_project, *ruff)
    assert found.returncode == 1
    assert "F401" in found.stdout


def test_pytest_runs_a_failing_test_in_tests_build(bare_project: Path) -> None:
    (bare_project / "tests" / "build" / "test_fault.py").write_text("def test_fault():\n    assert False\n")
    found = run(bare_project, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert found.returncode == 1
    assert "1 failed" in found.stdout


def test_git_keeps_folders_named_build(bare_project: Path) -> None:
    run(bare_project, "git", "init", "--quiet")
    for path in ("build/engine_builder.py", "tests/build/test_engine_builder.py"):
        assert run(bare_project, "git", "check-ignore", path).returncode == 1


def test_the_runtime_decodes_without_torch(random_engine: Path) -> None:
    """In a new process in which torch and similar packages cannot be imported."""
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
printf '%s\\n' "$*" >>"$LOG"
case "$*" in
*broken*) exit 2 ;;
quantize*) mkdir "$3" && touch "$3/config.json" ;;
build*) mkdir "$3" && touch "$3/manifest.json" ;;
esac
"""


@pytest.fixture
def workshop(tmp_path: Path) -> Path:
    """The Makefile in a folder with a space in its name, two models of one name, a `trimode` that logs its calls."""
    folder = tmp_path / "a workshop"
    for name in ("one model/tiny/linear_spec_lora", "two/tiny", "scripts", "engine", ".venv/bin"):
        (folder / name).mkdir(parents=True)
    for file in ("Makefile", "scripts/make_engine.py", "engine/manifest.py"):
        shutil.copyfile(ROOT / file, folder / file)
    adapter = "one model/tiny/linear_spec_lora/adapter_model.safetensors"
    for file in ("one model/tiny/config.json", adapter, "two/tiny/config.json"):
        (folder / file).write_text("")
    (folder / ".venv/bin/trimode").write_text(TRIMODE)
    (folder / ".venv/bin/trimode").chmod(0o755)
    (folder / ".venv/bin/python").symlink_to(sys.executable)
    return folder


def calls(workshop: Path, *arguments: str, code: int = 0) -> list[str]:
    """The calls of `trimode` by make."""
    log = workshop / "log"
    log.write_text("")
    environment = os.environ | {"LOG": str(log)}
    command = ["make", "--old-file=.venv/.package", "--old-file=.triton/.package", *arguments]
    made = subprocess.run(command, cwd=workshop, env=environment, capture_output=True, text=True, check=False)
    assert made.returncode == code, made.stderr
    return log.read_text().splitlines()


def commands(workshop: Path, *arguments: str, code: int = 0) -> list[str]:
    """The names of the called commands."""
    return [line.split()[0] for line in calls(workshop, *arguments, code=code)]


MODEL = "MODEL=one model/tiny"
BUILD = ["quantize", "build", "info"]
CHANGES: dict[str, tuple[tuple[str, ...], Callable[[Path], object]]] = {
    "method": (("METHOD=rtn",), lambda _: None),
    "group": (("GROUP=32",), lambda _: None),
    "calibration": (("CALIBRATION=a text.jsonl",), lambda folder: (folder / "a text.jsonl").write_text("")),
    "another folder of the same name": (("MODEL=two/tiny",), lambda _: None),
    "changed model": ((), lambda folder: (folder / "one model/tiny/config.json").write_text("{}")),
    "changed adapter": (
        (),
        lambda folder: (folder / "one model/tiny/linear_spec_lora/adapter_model.safetensors").write_text("x"),
    ),
    "no adapter": ((), lambda folder: shutil.rmtree(folder / "one model/tiny/linear_spec_lora")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_make_builds_the_engine_again_when_its_inputs_change(workshop: Path, change: str) -> None:
    arguments, apply = CHANGES[change]
    assert commands(workshop, "build-engine", MODEL) == BUILD
    assert commands(workshop, "build-engine", MODEL) == ["info"]
    apply(workshop)
    assert commands(workshop, "build-engine", MODEL, *arguments) == BUILD
    assert commands(workshop, "build-engine", MODEL, *arguments) == ["info"]
    assert not list(workshop.glob("engines/*.new"))


def test_make_builds_engines_of_an_earlier_format_again(workshop: Path) -> None:
    """From the same quantised weights."""
    assert commands(workshop, "build-engine", MODEL) == BUILD
    source = workshop / "engine/manifest.py"
    source.write_text(source.read_text().replace(f"FORMAT_VERSION = {FORMAT_VERSION}\n", "FORMAT_VERSION = 1\n"))
    assert commands(workshop, "build-engine", MODEL) == ["build", "info"]
    assert commands(workshop, "build-engine", MODEL) == ["info"]


def test_make_does_not_split_paths_with_spaces(workshop: Path) -> None:
    (workshop / "a text.jsonl").write_text("")
    arguments = ("build-engine", MODEL, "ENGINE=my engines/an engine", "CALIBRATION=a text.jsonl")
    assert calls(workshop, *arguments) == [
        "quantize one model/tiny engines/tiny-w4a16-awq64.new --method awq --group 64 --calibration a text.jsonl",
        "build engines/tiny-w4a16-awq64 my engines/an engine.new --target cpu",
        "info my engines/an engine",
    ]
    assert calls(workshop, "serve", *arguments[1:]) == ["serve my engines/an engine"]


def test_make_audits_in_folders_with_spaces(workshop: Path) -> None:
    (workshop / "my engines/random").mkdir(parents=True)
    (workshop / "my engines/random/config.json").write_text("")
    assert calls(workshop, "audit", "AUDITED=my engines/random") == [
        "build my engines/random my engines/random-rtx --target rtx --sm 121,120,89 --capacity 32768",
        "audit my engines/random-rtx --window 512,4096,32768 --plot my engines/random-rtx.png",
    ]


def test_make_builds_for_another_target_from_the_same_weights(workshop: Path) -> None:
    engine = ("build-engine", MODEL, "ENGINE=engines/mine")
    assert commands(workshop, *engine) == BUILD
    assert commands(workshop, *engine, "TARGET=rtx") == ["build", "info"]


def test_make_does_not_quantise_an_int4_checkpoint(workshop: Path) -> None:
    (workshop / "two/tiny/hf_quant_config.json").write_text("")
    assert calls(workshop, "build-engine", "MODEL=two/tiny") == [
        "build two/tiny engines/tiny-cpu.new --target cpu",
        "info engines/tiny-cpu",
    ]


def test_make_takes_a_hub_id(workshop: Path) -> None:
    built = calls(workshop, "build-engine", "MODEL=someone/Some-Model-8B")
    assert built[0] == (
        "quantize someone/Some-Model-8B engines/Some-Model-8B-w4a16-awq128.new --method awq --group 128"
    )
    assert commands(workshop, "build-engine", "MODEL=someone/Some-Model-8B") == ["info"]


def test_make_does_not_need_the_quantised_folder_once_the_engine_is_built(workshop: Path) -> None:
    commands(workshop, "build-engine", MODEL)
    shutil.rmtree(workshop / "engines/tiny-w4a16-awq64")
    assert commands(workshop, "build-engine", MODEL) == ["info"]
    assert commands(workshop, "build-engine", MODEL, "TARGET=rtx") == BUILD


def test_make_clean_removes_what_git_ignores_except_results(workshop: Path) -> None:
    names = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split() if "*" not in line]
    made = [workshop / name for name in names if name != "__pycache__"]
    for folder in made:
        folder.mkdir(exist_ok=True)
    calls(workshop, "clean")
    assert [folder.name for folder in made if folder.exists()] == ["out"]


def test_make_keeps_foreign_folders_and_folders_whose_replacement_fails(workshop: Path) -> None:
    (workshop / "mine").mkdir()
    (workshop / "mine/manifest.json").write_text("mine")
    assert commands(workshop, "build-engine", MODEL, "ENGINE=mine", code=2) == []
    assert commands(workshop, "serve", "ENGINE=mine") == ["serve"]
    assert (workshop / "mine/manifest.json").read_text() == "mine"
    commands(workshop, "build-engine", MODEL, "ENGINE=engines/kept")
    commands(workshop, "build-engine", MODEL, "ENGINE=engines/kept", "TARGET=broken", code=2)
    assert (workshop / "engines/kept/manifest.json").exists()
