"""Change one operator or constant of the runtime's core at a time, and count how often its tests notice.

A sample of all mutants of ``runtime/{decoding,scheduling,kv,api}`` is tested in a copy of the working tree, each by the
tests of its folder, the fastest first. Takes from seconds to minutes for each mutant; not part of CI. Exit code 1 if
fewer than 92 % of the sample are caught. Results: docs/results.md.

    python -m scripts.mutation.run --count 48 --seed 0
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from scripts.mutation.mutants import Mutant, mutants_of

ROOT = Path(__file__).resolve().parents[2]
BAR = 0.92
PATIENCE = 4  # times as long as without a mutant: tests that take longer hang, and the mutant is caught
# The tests of each folder, by the time that they take.
TESTS: dict[str, tuple[str, ...]] = {
    "decoding": (
        "tests/runtime/decoding/test_denoising.py",
        "tests/runtime/decoding/test_sampling.py",
        "tests/runtime/decoding/test_text_stream.py",
        "tests/runtime/scheduling/test_auto_block.py",
        "tests/runtime/scheduling/test_policy.py",
        "tests/runtime/scheduling/test_scheduler.py",
        "tests/runtime/decoding/test_sequence.py",
    ),
    "scheduling": (
        "tests/runtime/scheduling/test_policy.py",
        "tests/runtime/scheduling/test_pass_cost.py",
        "tests/runtime/scheduling/test_auto_block.py",
        "tests/runtime/scheduling/test_recovery.py",
        "tests/runtime/scheduling/test_batching.py",
        "tests/runtime/scheduling/test_scheduler.py",
    ),
    "kv": ("tests/runtime/kv", "tests/runtime/scheduling/test_policy.py"),
    "api": (
        "tests/runtime/api/test_capacity.py",
        "tests/runtime/api/test_inputs.py",
        "tests/runtime/api/test_life.py",
        "tests/runtime/api/test_llm.py",
    ),
}


class Place(NamedTuple):
    """A mutant and its file."""

    file: Path
    mutant: Mutant

    def __str__(self) -> str:
        return f"{self.file}:{self.mutant.line}: {self.mutant.before}  ->  {self.mutant.after}"


def all_mutants() -> list[Place]:
    files = [file for folder in TESTS for file in sorted((ROOT / "runtime" / folder).glob("*.py"))]
    return [Place(file.relative_to(ROOT), mutant) for file in files for mutant in mutants_of(file.read_text())]


def copy_tree(target: Path) -> None:
    """The tracked and untracked files of the working tree, without the ignored ones; links as links."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)


def import_libraries() -> None:
    """Import what takes long, but nothing of TriMode, once for all forked test runs."""
    for name in ("torch", "transformers", "onnxruntime", "hypothesis", "pytest"):
        importlib.import_module(name)


def all_pass(tree: Path, tests: tuple[str, ...], seconds: float | None = None) -> bool:
    """False also if they take longer than ``seconds``."""
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(tree, tests))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode == 0


def run_tests(tree: Path, tests: tuple[str, ...]) -> None:
    """In a process of its own: the tests of ``tree`` import the modules of ``tree``."""
    os.setsid()
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    sys.path[:] = [str(tree), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
    sys.dont_write_bytecode = True
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    import pytest

    sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", *tests]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", choices=TESTS, help="mutants of this folder alone")
    parser.add_argument("--list", action="store_true", help="print the sample and end")
    options = parser.parse_args()
    os.nice(10)
    places = [place for place in all_mutants() if options.folder in (None, place.file.parts[1])]
    print(f"{len(places)} mutants, of which {options.count} are sampled with seed {options.seed}")
    sample = random.Random(options.seed).sample(places, min(options.count, len(places)))
    if options.list:
        print(*sample, sep="\n")
        return 0
    os.environ["OMP_NUM_THREADS"] = "1"
    import_libraries()
    outcomes: Counter[bool] = Counter()
    limits: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="trimode-mutation-") as temporary:
        tree = Path(temporary)
        copy_tree(tree)
        for name in sorted({place.file.parts[1] for place in sample}):
            begun = time.monotonic()
            passed = all_pass(tree, TESTS[name])
            limits[name] = PATIENCE * (time.monotonic() - begun)
            if not passed:
                print(f"the tests of {name} fail without a mutant", file=sys.stderr)
                return 2
        for place in sample:
            begun = time.monotonic()
            original = (tree / place.file).read_text()
            (tree / place.file).write_text(place.mutant.source)
            folder = place.file.parts[1]
            caught = not all_pass(tree, TESTS[folder], limits[folder])
            (tree / place.file).write_text(original)
            outcomes[caught] += 1
            print(f"{'caught' if caught else 'SURVIVED'} after {time.monotonic() - begun:.0f} s: {place}", flush=True)
    print(f"{outcomes[True]} of {outcomes.total()} caught, {outcomes[True] / outcomes.total():.0%}")
    return 0 if outcomes[True] >= BAR * outcomes.total() else 1


if __name__ == "__main__":
    sys.exit(main())
