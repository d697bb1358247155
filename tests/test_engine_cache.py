"""Checkpoints in place of an engine directory: built once into the cache, and found there afterwards."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import trimode.build.engine_builder
import trimode.quantize
from tests.support.patience import HANG_SECONDS
from tests.support.random_checkpoint import write_random_checkpoint
from trimode import LLM, SamplingParams, engine_cache
from trimode.build.engine_builder import build_engine
from trimode.common.cache_folder import cache_folder
from trimode.common.errors import TriModeError
from trimode.engine.manifest import Manifest
from trimode.engine_cache import BuildOptions, engine_of, list_entries, remove_entry
from trimode.model import checkpoint as checkpoints
from trimode.model.checkpoint import Checkpoint, open_checkpoint
from trimode.quantize import quantize_checkpoint
from trimode.runtime.api.llm import EngineLLM

RTN = BuildOptions(method="rtn")
PARAMS = SamplingParams(max_tokens=12)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "a cache"
    monkeypatch.setenv("TRIMODE_CACHE", str(folder))
    return folder


@pytest.fixture
def checkpoint(random_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(random_checkpoint, tmp_path / "a model")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Method and group of every quantisation that runs."""
    made: list[dict[str, Any]] = []

    def quantize(source: Checkpoint, out: Path, **options: Any) -> Any:
        made.append({name: options[name] for name in ("method", "group")})
        return quantize_checkpoint(source, out, **(options | {"method": "rtn"}))

    monkeypatch.setattr(trimode.quantize, "quantize_checkpoint", quantize)
    return made


def test_a_checkpoint_answers_as_the_engine_built_from_it(random_checkpoint: Path, tmp_path: Path) -> None:
    quantize_checkpoint(Checkpoint(random_checkpoint), tmp_path / "w4a16", method="rtn")
    build_engine(Checkpoint(tmp_path / "w4a16"), tmp_path / "engine")
    answers = []
    for model in (tmp_path / "engine", random_checkpoint, random_checkpoint):
        with LLM(model) as llm:
            answers.append(llm.generate([200, 201, 202], PARAMS).outputs[0].token_ids)
            assert llm.manifest.source == "random"
    assert answers[0] == answers[1] == answers[2]


def test_it_is_built_once(random_checkpoint: Path, builds: list[dict[str, Any]], cache: Path) -> None:
    first = engine_of(random_checkpoint, RTN)
    assert engine_of(random_checkpoint, RTN) == first
    assert engine_of(str(random_checkpoint), BuildOptions(target="cpu", group=128)) == first
    assert builds == [{"method": "rtn", "group": 128}]
    (entry,) = list_entries()
    assert first == cache / entry.key / "engine"
    assert entry.bytes == sum(path.stat().st_size for path in first.rglob("*") if path.is_file())
    assert (entry.source, entry.target, entry.method, entry.group) == ("random", "cpu", "rtn", 128)
    assert {path.name for path in cache.iterdir() if not path.name.startswith(".")} <= {entry.key, "hashes.json"}


def test_changes_that_need_another_engine(checkpoint: Path, builds: list[dict[str, Any]]) -> None:
    first = engine_of(checkpoint, RTN)
    assert engine_of(checkpoint, BuildOptions(group=64)) != first
    (checkpoint / "README.md").write_text("not read by the build")
    assert engine_of(checkpoint, RTN) == first
    template = checkpoint / "tokenizer_config.json"
    template.write_text(template.read_text().replace("assistant", "model"))
    changed = engine_of(checkpoint, RTN)
    assert changed != first
    shutil.rmtree(checkpoint / "linear_spec_lora")
    assert engine_of(checkpoint, RTN) not in (first, changed)
    assert len(builds) == len(list_entries()) == 4


def test_unchanged_files_are_hashed_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in checkpoint.rglob("*"):
        os.utime(path, (1e9, 1e9))
    first = engine_of(checkpoint, RTN)
    hashed: list[str] = []
    hash_file = engine_cache.hash_file
    monkeypatch.setattr(engine_cache, "hash_file", lambda path: hashed.append(path.name) or hash_file(path))
    assert engine_of(checkpoint, RTN) == first
    assert hashed == []
    config = checkpoint / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": 12}))
    assert engine_of(checkpoint, RTN) != first
    assert hashed == ["config.json"]


def test_damaged_hashes_are_ignored(checkpoint: Path, cache: Path) -> None:
    first = engine_of(checkpoint, RTN)
    (cache / "hashes.json").write_text("{")
    assert engine_of(checkpoint, RTN) == first


@pytest.mark.parametrize(
    ("calibration", "options", "expected"),
    [
        (False, BuildOptions(), {"method": "rtn", "group": 128}),
        (True, BuildOptions(), {"method": "awq", "group": 128}),
        (True, RTN, {"method": "rtn", "group": 128}),
        (False, BuildOptions(group=32), {"method": "rtn", "group": 32}),
    ],
)
def test_the_default_method(
    checkpoint: Path, builds: list[dict[str, Any]], calibration: bool, options: BuildOptions, expected: dict[str, Any]
) -> None:
    if calibration:
        (checkpoint / "calibration.jsonl").write_text('{"text": "abc"}\n')
    engine_of(checkpoint, options)
    assert builds == [expected]


def test_the_default_group_divides_every_matrix(tmp_path: Path, builds: list[dict[str, Any]]) -> None:
    engine_of(write_random_checkpoint(tmp_path / "narrow", hidden_size=64, intermediate_size=96), BuildOptions())
    assert builds == [{"method": "rtn", "group": 32}]


def test_a_quantised_checkpoint_is_not_quantised_again(
    random_int4_checkpoint: Path, builds: list[dict[str, Any]]
) -> None:
    engine = engine_of(random_int4_checkpoint, BuildOptions())
    assert builds == []
    assert Manifest.read(engine).precision.matrices["diffusion_head"] == "int4"
    (entry,) = list_entries()
    assert (entry.method, entry.group) == (None, None)
    with pytest.raises(TriModeError, match="is quantised already; leave out method and group"):
        engine_of(random_int4_checkpoint, RTN)


def test_an_engine_directory_takes_no_build_options(random_engine: Path) -> None:
    assert engine_of(random_engine, BuildOptions()) == random_engine
    with pytest.raises(TriModeError, match="is an engine directory, which is built already; leave out target, group"):
        engine_of(random_engine, BuildOptions(target="cpu", group=64))


def test_a_folder_that_is_neither_engine_nor_checkpoint(tmp_path: Path, random_checkpoint: Path) -> None:
    with pytest.raises(TriModeError, match=r"no manifest\.json, no config\.json"):
        engine_of(tmp_path, BuildOptions())
    with pytest.raises(
        TriModeError, match="is not an engine directory, a checkpoint folder or a Hugging Face model ID"
    ):
        engine_of(tmp_path / "none", BuildOptions())
    with pytest.raises(TriModeError, match="target abacus is unknown; give one of cpu"):
        engine_of(random_checkpoint, BuildOptions(target="abacus"))


def test_a_hub_id_stays_the_model_s_name(random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_download", lambda _hub_id: random_checkpoint)
    with LLM("someone/Some-Model", method="rtn") as llm:
        assert llm.manifest.source == "someone/Some-Model"
    (entry,) = list_entries()
    assert entry.source == "someone/Some-Model"
    assert entry.key.startswith("someone-Some-Model-cpu-")


def test_names_survive_quantisation_and_the_hub_s_cache(random_checkpoint: Path, tmp_path: Path) -> None:
    quantize_checkpoint(Checkpoint(random_checkpoint, "someone/Some-Model"), tmp_path / "w4a16", method="rtn")
    assert Checkpoint(tmp_path / "w4a16").name == "someone/Some-Model"
    snapshot = tmp_path / "models--some-one--Some--Model" / "snapshots" / "0123abcd"
    shutil.copytree(random_checkpoint, snapshot)
    assert open_checkpoint(snapshot).name == "some-one/Some--Model"
    assert open_checkpoint(random_checkpoint).name == "random"


def test_a_second_caller_waits_for_the_first_one_s_build(
    random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, waited = threading.Event(), threading.Event()
    found: list[Path] = []
    built = 0

    def build(*arguments: Any, **options: Any) -> Any:
        nonlocal built
        built += 1
        begun.set()
        assert waited.wait(HANG_SECONDS)
        return build_engine(*arguments, **options)

    def progress(stage: str, _done: int, _total: int) -> None:
        if stage == "wait":
            waited.set()

    monkeypatch.setattr(trimode.build.engine_builder, "build_engine", build)
    first, second = (
        threading.Thread(target=lambda: found.append(engine_of(random_checkpoint, RTN, progress))) for _ in range(2)
    )
    first.start()
    assert begun.wait(HANG_SECONDS)
    second.start()
    first.join()
    second.join()
    assert built == 1
    assert found[0] == found[1]


def test_an_interrupted_build_leaves_nothing(random_checkpoint: Path, cache: Path) -> None:
    def interrupt(stage: str, _done: int, _total: int) -> None:
        if stage == "hashes":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine_of(random_checkpoint, RTN, interrupt)
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []
    assert list_entries() == []


def test_what_a_killed_build_left_is_removed_by_the_next_one(random_checkpoint: Path, cache: Path) -> None:
    """The process ends in the middle of its build without cleaning up, as after SIGKILL."""
    program = (
        "import os, sys\n"
        "from trimode.engine_cache import BuildOptions, engine_of\n"
        "def end(stage, done, total):\n"
        "    if stage == 'hashes':\n        os._exit(9)\n"
        "engine_of(sys.argv[1], BuildOptions(method='rtn'), end)"
    )
    assert subprocess.run([sys.executable, "-c", program, random_checkpoint], check=False).returncode == 9
    left = [path for path in cache.iterdir() if path.is_dir()]
    assert len(left) == 1
    assert list_entries() == []
    engine_of(random_checkpoint, RTN)
    assert not left[0].exists()
    assert len(list_entries()) == 1


def test_removal(checkpoint: Path, cache: Path) -> None:
    engine_of(checkpoint, RTN)
    (entry,) = list_entries()
    assert remove_entry(entry.key) == entry
    assert list_entries() == []
    assert not [path for path in cache.iterdir() if path.is_dir()]
    with pytest.raises(TriModeError, match="has no engine"):
        remove_entry(entry.key)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMODE_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    monkeypatch.setenv("HOME", "/three")
    assert cache_folder() == Path("/one")
    monkeypatch.delenv("TRIMODE_CACHE")
    assert cache_folder() == Path("/two/trimode")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/three/.cache/trimode")


def test_a_cache_that_cannot_be_made_is_one_line(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRIMODE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(TriModeError, match=r"cannot be made: .*; set TRIMODE_CACHE"):
        engine_of(random_checkpoint, RTN)


def test_without_the_build_extra_one_line_names_it(random_checkpoint: Path, random_engine: Path) -> None:
    program = (
        "import sys\n"
        "sys.modules['onnx'] = None\n"
        "from trimode import LLM\n"
        "from trimode.common.errors import TriModeError\n"
        "with LLM(sys.argv[1]):\n    pass\n"
        "try:\n    LLM(sys.argv[2])\n"
        "except TriModeError as error:\n    print(error)"
    )
    command = [sys.executable, "-c", program, random_engine, random_checkpoint]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "is a checkpoint; building its engine failed: the package onnx is not installed" in found.stdout
    assert found.stdout.endswith("pip install 'trimode[build]'\n")


def test_the_signature_shows_the_options_of_engine_directories_too() -> None:
    shown, inherited = inspect.signature(LLM).parameters, inspect.signature(EngineLLM).parameters
    plain = {name for name, parameter in inherited.items() if parameter.kind is not parameter.VAR_KEYWORD}
    assert set(shown) >= plain | {"target", "method", "group"}
