"""Change one operator or constant of the runtime's core at a time, and count how often its tests notice.

A sample of all mutants of ``runtime/{decoding,scheduling,kv,api,grammar}`` is tested in a copy of the working tree. A
mutant's tests are those of its module, then those of its folder, the fastest first. Limits are in processor time, so
that other work on the machine catches no mutant. Takes from seconds to minutes for each mutant; not part of CI. Exit
code 1 if fewer than 92 % of the sample are caught. Results: docs/results.md.

    python -m scripts.mutation.run --count 48 --seed 0
"""

from __future__ import annotations

import argparse
import importlib
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from scripts.mutation.mutants import Mutant, mutants_of

ROOT = Path(__file__).resolve().parents[2]
BAR = 0.92
# Processor time of a mutant's tests, in that of the tests without a mutant: tests that take longer do not end. A mutant
# may also wait forever without taking any, so time has a limit, too.
PATIENCE, LONGEST_WAIT = 4, 8
PATIENCE_OF_TESTS = 90  # seconds that a test waits for what must come, in place of HANG_SECONDS
# The tests of each folder, the fastest first.
_DECODING = tuple(
    f"tests/runtime/decoding/test_{name}.py"
    for name in ("denoising", "draft_tree", "lookup", "ngram_index", "sampling", "text_stream")
)
_RULES = ("tests/runtime/decoding/test_constrained_law.py", "tests/runtime/decoding/test_token_rules.py")
_SCHEDULING = tuple(
    f"tests/runtime/scheduling/test_{name}.py"
    for name in ("policy", "pass_cost", "auto_block", "drafting", "learning", "recovery", "batching", "scheduler")
)
TESTS: dict[str, tuple[str, ...]] = {
    "decoding": (
        *_DECODING,
        *_SCHEDULING,
        "tests/runtime/decoding/test_sequence.py",
        "tests/runtime/api/test_prompt_logprobs.py",
        *_RULES,
    ),
    "scheduling": _SCHEDULING,
    "kv": ("tests/runtime/kv", "tests/runtime/scheduling/test_policy.py"),
    "api": (
        "tests/runtime/api/test_capacity.py",
        "tests/runtime/api/test_inputs.py",
        "tests/runtime/api/test_prompt_logprobs.py",
        "tests/runtime/api/test_continuation.py",
        "tests/runtime/api/test_life.py",
        "tests/runtime/api/test_llm.py",
    ),
    "grammar": ("tests/runtime/grammar", "tests/runtime/decoding/test_token_rules.py"),
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


def shorten_waits(tree: Path) -> None:
    file = tree / "tests/support/patience.py"
    text, found = re.subn(r"(?m)^HANG_SECONDS = \d+", f"HANG_SECONDS = {PATIENCE_OF_TESTS}", file.read_text())
    if found != 1:
        raise ValueError(f"{file} does not define HANG_SECONDS in one line")
    file.write_text(text)


def import_libraries() -> None:
    """Import what takes long, but nothing of TriMode, once for all forked test runs."""
    for name in ("torch", "transformers", "peft", "onnxruntime", "hypothesis", "pytest"):
        importlib.import_module(name)


class Outcome(NamedTuple):
    """Of a run of tests. caught_by: the first test that failed, or why they ended; None if all passed. seconds: of
    processor time.
    """

    caught_by: str | None
    seconds: float


class Limits(NamedTuple):
    """processor, wall: seconds."""

    processor: int
    wall: float


def outcome(tree: Path, tests: tuple[str, ...], limits: Limits | None = None) -> Outcome:
    context = multiprocessing.get_context("fork")
    begun, (failed, sender) = processor_seconds(), context.Pipe(duplex=False)
    process = context.Process(target=run_tests, args=(tree, tests, limits, sender))
    process.start()
    sender.close()
    process.join(None if limits is None else limits.wall)
    ended = process.exitcode is not None
    if not ended:
        process.kill()
        process.join()
    seconds = processor_seconds() - begun
    if process.exitcode == 0:
        return Outcome(None, seconds)
    if failed.poll():
        try:
            return Outcome(failed.recv(), seconds)
        except EOFError:
            pass
    return Outcome(f"exit status {process.exitcode}" if ended else "waiting forever", seconds)


def processor_seconds() -> float:
    """Of the processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_tests(tree: Path, tests: tuple[str, ...], limits: Limits | None, failed: Connection) -> None:
    """In a process of its own: the tests of ``tree`` import the modules of ``tree``. Sends the first that fails."""
    os.setsid()
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    sys.path[:] = [str(tree), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
    sys.dont_write_bytecode = True
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    if limits is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (limits.processor, limits.processor))
    import pytest

    class Recorder:
        @staticmethod
        def pytest_runtest_logreport(report: pytest.TestReport) -> None:
            if report.failed:
                failed.send(report.nodeid)

        @staticmethod
        def pytest_collectreport(report: pytest.CollectReport) -> None:
            if report.failed:
                failed.send(report.nodeid)

    arguments = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", *tests]
    sys.exit(pytest.main(arguments, plugins=[Recorder()]))


def tests_of(file: Path) -> tuple[str, ...]:
    """Those of the module, then those of its folder."""
    own = f"tests/{file.parent}/test_{file.stem}.py"
    others = TESTS[file.parts[1]]
    return (own, *(test for test in others if test != own)) if (ROOT / own).exists() else others


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
    limits: dict[str, Limits] = {}
    with tempfile.TemporaryDirectory(prefix="trimode-mutation-") as temporary:
        tree = Path(temporary)
        copy_tree(tree)
        shorten_waits(tree)
        for name in sorted({place.file.parts[1] for place in sample}):
            begun = time.monotonic()
            found = outcome(tree, TESTS[name])
            if found.caught_by is not None:
                print(f"without a mutant, the tests of {name} fail: {found.caught_by}", file=sys.stderr)
                return 2
            limits[name] = Limits(math.ceil(PATIENCE * found.seconds), LONGEST_WAIT * (time.monotonic() - begun))
            print(f"without a mutant, the tests of {name} take {found.seconds:.0f} s of processor time", flush=True)
        for place in sample:
            original = (tree / place.file).read_text()
            (tree / place.file).write_text(place.mutant.source)
            found = outcome(tree, tests_of(place.file), limits[place.file.parts[1]])
            (tree / place.file).write_text(original)
            outcomes[found.caught_by is not None] += 1
            verdict = "SURVIVED" if found.caught_by is None else "caught"
            print(f"{verdict} after {found.seconds:.0f} s: {place}\n    {found.caught_by or ''}".rstrip(), flush=True)
    print(f"{outcomes[True]} of {outcomes.total()} caught, {outcomes[True] / outcomes.total():.0%}")
    return 0 if outcomes[True] >= BAR * outcomes.total() else 1


if __name__ == "__main__":
    sys.exit(main())
