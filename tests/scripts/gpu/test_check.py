"""The GPU check without a GPU: its host code over the interpreter, its imports, and its reports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import psutil
import pytest
from packaging.utils import canonicalize_name

from scripts.gpu import check, part_runner
from scripts.gpu.check import DEVICE_PART, GROUPS, KERNEL_PARTS, LIMITS, PARTS, run_part, used_nodes
from scripts.gpu.engine_emission import ADDED, PRESENT, refuse_large, remove_engine_ptx, remove_ptx, required
from scripts.gpu.kernel_launch import KernelLaunch
from scripts.gpu.token_check import Answer, comparison
from tests.plugins.conftest import KERNEL_TESTS
from tests.support.interpreter_host import InterpreterHost
from tests.support.patience import HANG_SECONDS, wait_until
from trimode.common.progress import no_progress
from trimode.engine.files import MANIFEST, hash_files, verify_files
from trimode.engine.manifest import Manifest

ROOT = Path(__file__).resolve().parents[3]
# Scripts for other machines.
MADE_BEFOREHAND = {
    *("__init__", "cycle_estimate", "disassembly", "dry_run", "engine_emission", "kernel_table", "pool_layout"),
    *("random_w4a16_checkpoint", "ranks_estimate"),
}


@pytest.mark.parametrize("part", KERNEL_PARTS)
def test_every_part_finds_the_kernels_right(part: str) -> None:
    results = list(run_part(part, InterpreterHost(), small=True))
    assert results
    assert all(result.right and result.least_bytes > 0 for result in results)


@pytest.mark.parametrize("part", KERNEL_PARTS)
def test_an_output_that_is_not_written_is_wrong(part: str) -> None:
    """Outputs are NaN before a launch."""

    class Idle(InterpreterHost):
        def launch(self, kernel: str, launched: KernelLaunch) -> None:
            pass

    assert not any(result.right for result in run_part(part, Idle(), small=True))


def test_every_launched_kernel_is_emitted() -> None:
    class Recording(InterpreterHost):
        def __init__(self) -> None:
            self.names: set[str] = set()

        def launch(self, kernel: str, _launched: KernelLaunch) -> None:
            self.names.add(kernel)

    host = Recording()
    for part in KERNEL_PARTS:
        list(run_part(part, host, small=True))
    nodes = used_nodes(small=True)
    emitted = {operator.kernel_name(node, number) for operator, node in nodes for number in operator.tactics(node)}
    assert host.names <= emitted


def test_a_run_needs_only_packages_that_are_there_or_brought_along() -> None:
    """Imports of check, benchmark and kernel tests, in a fresh process that finds no other package."""
    distributions = required((*PRESENT, *ADDED))
    packages = {
        package
        for package, owners in packages_distributions().items()
        if distributions & {canonicalize_name(owner) for owner in owners}
    }
    modules = [
        *(path.stem for path in (ROOT / "scripts/gpu").glob("*.py") if path.stem not in MADE_BEFOREHAND),
        *("trimode.runtime.loading", "trimode.runtime.cuda.cuda_executor", "tests.support.gpu_kernels"),
        *(f"tests.plugins.{name.removesuffix('.py')}" for name in ("conftest.py", *sorted(KERNEL_TESTS))),
    ]
    program = f"""
import importlib, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

class Present(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        known = {sorted(packages)} + ["trimode", "scripts", "tests", *sys.stdlib_module_names]
        is_known = path or name in known or name.startswith("_sysconfigdata")
        return super().find_spec(name, path, target) if is_known else None

sys.meta_path = [BuiltinImporter, FrozenImporter, Present]
for module in {modules}:
    importlib.import_module(module if "." in module else "scripts.gpu." + module)
"""
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "HYPOTHESIS_NO_PLUGINS": "1"}  # plugins are imported if their package is installed
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_engines_and_kernels_are_two_runs_of_at_most_six_minutes() -> None:
    """Even if every part needs all of its time. Together they have all parts."""
    for parts in GROUPS.values():
        assert sum(LIMITS[part] for part in (DEVICE_PART, *parts)) <= part_runner.SECONDS == 360
    assert sorted(part for parts in GROUPS.values() for part in parts) == sorted(PARTS)


def test_parts_are_named_alone_or_by_their_group() -> None:
    assert check._parts("attention,engines,8b") == ["attention", *GROUPS["engines"]]
    with pytest.raises(SystemExit, match=r"no part atention; there are engines, kernels, tiny-fp32, "):
        check._parts("atention")


def test_ptx_is_removed_but_for_some_operators(tmp_path: Path) -> None:
    for name in ("MergeCandidates.2.1.ptx", "MergeCandidates.2.1.cubin", "KvWrite.GROUP4.1.ptx", "kernels.json"):
        (tmp_path / name).touch()
    remove_ptx(tmp_path, check.PTX_OPERATORS)
    assert {path.suffix for path in tmp_path.iterdir()} == {".ptx", ".cubin", ".json"}
    remove_ptx(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".cubin", ".json"}


def test_an_engine_without_its_ptx_passes_its_check(random_engine: Path, tmp_path: Path) -> None:
    engine = Path(shutil.copytree(random_engine, tmp_path / "engine"))
    (engine / "kernels").mkdir()
    for name in ("a.ptx", "a.cubin"):
        (engine / "kernels" / name).write_text(name)
    manifest = Manifest.read(engine)
    (engine / MANIFEST).unlink()
    manifest.model_copy(update={"files": hash_files(engine, no_progress)}).write(engine)
    remove_engine_ptx(engine)
    found = Manifest.read(engine)
    assert {entry.path for entry in found.files} - {entry.path for entry in manifest.files} == {"kernels/a.cubin"}
    assert not (engine / "kernels" / "a.ptx").exists()
    verify_files(engine, found.files)


def test_what_is_emitted_has_a_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "site" / "deep").mkdir(parents=True)
    (tmp_path / "site" / "deep" / "a").write_bytes(b" " * (3 << 19))
    (tmp_path / "b").write_bytes(b" " * (1 << 19))
    refuse_large(tmp_path, 2)
    assert f"{tmp_path}: 2.0 MiB (b 0.5, site 1.5); the limit is 2 MiB" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="exceeds the limit of 1 MiB"):
        refuse_large(tmp_path, 1)


def test_a_part_that_fails_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU every part fails; the report is written all the same. However long the parts take to begin."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(check, "LIMITS", dict.fromkeys(check.LIMITS, HANG_SECONDS))
    monkeypatch.setattr(part_runner, "SECONDS", 3 * HANG_SECONDS)
    assert not check.run(tmp_path, tmp_path / "out", [KERNEL_PARTS[0]])
    report = json.loads((tmp_path / "out/check.json").read_text())
    assert report["results"] == []
    assert [state.partition(" with")[0] for state in report["parts"].values()] == ["failed"] * 2
    assert "part kv write: failed" in (tmp_path / "out/check.md").read_text()


class HangingPart(subprocess.Popen[bytes]):
    """A part whose limit is reached as soon as its child process runs, however long that took."""

    def wait(self, timeout: float | None = None) -> int:
        if timeout is None:
            return super().wait()
        started = Path(f"{self.args[-2]}.pid")  # type: ignore[index]
        wait_until(lambda: started.exists() and started.read_text().endswith("\n"))
        raise subprocess.TimeoutExpired(self.args, timeout)


def test_a_part_is_stopped_at_its_limit_and_keeps_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child process that writes one result and half of another, starts a process of its own, then hangs."""
    result = {"kernel": "KvWrite", "case": "c", "tactic": "t", "error": 0.5, "microseconds": 2.0, "least_bytes": 10**6}
    line = json.dumps({**result, "right": False})
    program = f"""
import pathlib, subprocess, sys, time
lines, line = sys.argv[1:]
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep({HANG_SECONDS})"])
pathlib.Path(lines).write_text(line + "\\n" + line[:9])
pathlib.Path(lines + ".pid").write_text(str(child.pid) + "\\n")
time.sleep({HANG_SECONDS})
"""

    def hanging(command: list[str], **options: Any) -> HangingPart:
        return HangingPart([sys.executable, "-c", program, command[-1], line], **options)

    monkeypatch.setattr(part_runner.subprocess, "Popen", hanging)
    assert not check.run(tmp_path, tmp_path / "out", ["kv write"])
    report = json.loads((tmp_path / "out/check.json").read_text())
    assert report["parts"]["kv write"].startswith(f"stopped after {check.LIMITS['kv write']:.0f} s")
    assert [found["error"] for found in report["results"]] == [0.5]
    assert "5.0e-01 **wrong**" in (tmp_path / "out/check.md").read_text()
    started = int((tmp_path / "out/kv_write.jsonl.pid").read_text())
    wait_until(lambda: has_ended(started))


def has_ended(process: int) -> bool:
    """Also where nobody reaps it."""
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_parts_without_time_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(part_runner, "SECONDS", 0)
    assert not check.run(tmp_path, tmp_path / "out", ["kv write", "8b"])
    assert "run again with --parts 'kv write,8b'" in capsys.readouterr().out
    assert "- part 8b: not run: no time left" in (tmp_path / "out/check.md").read_text()


def test_the_report_compares_with_the_measured_bandwidth() -> None:
    result = {"kernel": "K", "case": "c", "tactic": "t", "error": 1e-3, "microseconds": 2.0, "least_bytes": 3 * 10**6}
    report = {
        "date": "d",
        "command": "x",
        "device": {"card": "A", "copy_bandwidth": 2.5e12, "read_bandwidth": 3e12},
        "parts": {"kv write": "ended, 1 s"},
        "engines": [
            {"what": "tiny, ar: tokens", "equal": 199, "of": 200, "different": []},
            {"what": "8b: ar pass", "rows": 512, "batch": 1, "ms": 4.0, "least_bytes": 6 * 10**9},
            {"what": "RmsNorm", "rows": 512, "step": 32, "launches": 69, "microseconds": 130.2},
        ],
        "results": [{**result, "right": True}],
    }
    page = check.markdown(report)
    assert "| K | c | t | 1.0e-03 | 2.0 | 50% |" in page
    assert "bandwidth of a read: 3.00 TB/s" in page
    assert "| tiny, ar: tokens | 199 of 200 |" in page
    assert "| 8b: ar pass | 512 | 1 | 4.00 | 50% |" in page
    assert "| RmsNorm | 512 | 32 | 69 | 130 |" in page


def test_every_difference_has_both_engines_margins() -> None:
    """Planted: one answer with another token at its second place, chosen by little here and by much there."""
    here = Answer([5, 7, 9], [{5: -0.1}, {7: -0.70, 8: -0.71}, {9: -0.1}])
    there = Answer([5, 8, 9], [{5: -0.1}, {8: -0.1, 3: -4.1}, {9: -0.1}])
    same = Answer([4], [{4: -0.2}])
    record = comparison(
        "tiny, ar: tokens",
        [same.tokens, here.tokens],
        [same.tokens, there.tokens],
        lambda numbers: [[same, here][number] for number in numbers],
        lambda numbers: [[same, there][number] for number in numbers],
    )
    assert (record["equal"], record["of"]) == (1, 2)
    (difference,) = record["different"]
    assert (difference["answer"], difference["first"], difference["tokens"]) == (1, 1, [7, 8])
    small, large = difference["margins"]
    assert (small["gap"], small["least"]) == (pytest.approx(0.01), False)
    assert (large["gap"], large["least"]) == (pytest.approx(4.0), True)
    report = {"date": "d", "command": "x", "device": {}, "parts": {}, "engines": [record], "results": []}
    assert "| tiny, ar: tokens | 1 | 1 | 7 and 8 | 0.0100 | at least 4.0000 |" in check.markdown(report)


def test_an_answer_that_comes_out_differently_again_has_no_margin() -> None:
    here, there = Answer([5], [{5: -0.1}]), Answer([6], [{6: -0.1}])
    record = comparison("t", [[5]], [[6]], lambda _numbers: [there], lambda _numbers: [there])
    assert record["different"][0]["margins"][0] is None
    assert record["different"][0]["margins"][1] == {"gap": 0.0, "least": True}
    assert Answer.read(json.loads(json.dumps(here.stored()))) == here
