"""``trimode cache``, and checkpoints given to ``trimode generate``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "a cache"
    monkeypatch.setenv("TRIMODE_CACHE", str(folder))
    return folder


def trimode(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trimode", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_checkpoint_is_built_listed_and_removed(random_checkpoint: Path, cache: Path) -> None:
    asked = ("generate", random_checkpoint, "--prompt", "abc", "--max-tokens", 4, "--json")
    first = json.loads(trimode(*asked, "--method", "rtn", "--group", 64).stdout)
    again = json.loads(trimode(*asked, "--group", 64).stdout)
    assert first["token_ids"] == again["token_ids"]
    listed = json.loads(trimode("cache", "--json").stdout)
    assert listed["folder"] == str(cache)
    (engine,) = listed["engines"]
    assert (engine["source"], engine["target"], engine["method"], engine["group"]) == ("random", "cpu", "rtn", 64)
    shown = trimode("cache").stdout
    assert f"{cache}: 1 engine, {engine['bytes'] / 1e6:.1f} MB" in shown
    assert engine["key"] in shown
    removed = trimode("cache", "remove", engine["key"])
    assert removed.stdout == f"removed {engine['key']}, {engine['bytes'] / 1e6:.1f} MB\n"
    assert json.loads(trimode("cache", "--json").stdout)["engines"] == []


def test_an_empty_cache(cache: Path) -> None:
    assert trimode("cache").stdout == f"{cache}: 0 engines, 0.0 MB\n"
    assert trimode("cache", "remove", "--all").returncode == 0
    assert not cache.exists()


def test_timed_tactics_are_listed_and_removed(cache: Path) -> None:
    file = cache / "tactics" / "0123.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    assert f"{file.parent}: tactics of 1 set of kernels" in trimode("cache").stdout
    assert json.loads(trimode("cache", "--json").stdout)["tactics"] == [str(file)]
    assert trimode("cache", "remove", "--all").stdout == f"removed {file}\n"
    assert not file.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("remove",), "give the keys of the engines to remove, or --all"),
        (("remove", "x", "--all"), "give the keys of the engines to remove, or --all"),
        (("remove", "x"), "has no engine x; `trimode cache` lists them"),
        (("empty",), "Try 'trimode cache --help'"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    found = trimode("cache", *arguments)
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (2, "", 1)
    assert message in found.stderr


def test_an_engine_directory_takes_no_build_options(random_engine: Path) -> None:
    found = trimode("generate", random_engine, "--prompt", "x", "--method", "rtn")
    assert found.returncode == 2
    assert "is an engine directory, which is built already; leave out method" in found.stderr
