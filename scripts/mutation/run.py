"""Change one operator or constant of the runtime's core at a time, and count how often its tests notice.

A sample of all mutants of ``runtime/{decoding,scheduling,kv,api,grammar}`` is tested in a copy of the working tree. The
tests of these folders run once without a mutant, and the functions that each of them calls are recorded. A mutant's
tests are those that call its function, or if it is in none, any function of its file or no function of the core: the
fastest ones, as many as take MOST_SECONDS together. Limits are in processor time, so that other work on the machine
catches no mutant. Takes from seconds to minutes for each mutant; not part of CI. Exit code 1 if fewer than 92 % of the
sample are caught, 2 if the tests fail or no longer run without a mutant. Results: docs/results.md.

    python -m scripts.mutation.run --count 48 --seed 0
"""

from __future__ import annotations

import argparse
import importlib
import json
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
import threading
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from scripts.mutation.mutants import Mutant, mutants_of

ROOT = Path(__file__).resolve().parents[2]
BAR = 0.92
FOLDERS = ("decoding", "scheduling", "kv", "api", "grammar")
TESTS = tuple(f"tests/runtime/{folder}" for folder in (*FOLDERS, "request"))
MOST_SECONDS = 60  # of processor time, of a mutant's tests without it
# Processor time of a mutant's tests, in that of the tests without a mutant: tests that take longer do not end.
PATIENCE = 4
IDLE_SECONDS, IDLE_USE = 150, 0.5  # tests that take less processor time in so many seconds wait forever
SETUP_SECONDS = 30  # for what all tests share, such as engines
PATIENCE_OF_TESTS = 90  # seconds that a test waits for what must come, in place of HANG_SECONDS


class Place(NamedTuple):
    """A mutant and its file."""

    file: Path
    mutant: Mutant

    def __str__(self) -> str:
        return f"{self.file}:{self.mutant.line}: {self.mutant.before}  ->  {self.mutant.after}"


class RecordedTest(NamedTuple):
    """A test that ran without a mutant. seconds: of processor time. calls: file and first line of each function of the
    runtime's core that it called.
    """

    name: str
    seconds: float
    calls: frozenset[tuple[str, int]]

    @property
    def file(self) -> str:
        return self.name.partition("::")[0]


def all_mutants() -> list[Place]:
    files = [file for folder in FOLDERS for file in sorted((ROOT / "runtime" / folder).glob("*.py"))]
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
    processor time. failed: whether a test failed, rather than the whole run.
    """

    caught_by: str | None
    seconds: float
    failed: bool = False


class Failures:
    """A pytest plugin that sends the names of failed tests."""

    def __init__(self, failed: Connection) -> None:
        self._failed = failed

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._failed.send(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._failed.send(report.nodeid)


class Only:
    """A pytest plugin that runs these tests only."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.nodeid in self._names]


class Calls:
    """A pytest plugin that records which functions of the core each test calls, and writes them to ``file``."""

    def __init__(self, tree: Path, file: Path) -> None:
        self._tree, self._file = tree.resolve(), file
        self._files: dict[str, str | None] = {}
        self._called: set[tuple[str, int]] = set()
        self._tests: list[tuple[str, float, list[tuple[str, int]]]] = []

    def pytest_runtest_protocol(self) -> None:
        self._called.clear()
        self._begun = time.process_time()
        threading.settrace(self._call)
        sys.settrace(self._call)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        sys.settrace(None)
        self._tests.append((nodeid, time.process_time() - self._begun, sorted(self._called)))

    def pytest_sessionfinish(self) -> None:
        self._file.write_text(json.dumps(self._tests))

    def _call(self, frame: FrameType, _event: str, _argument: Any) -> None:
        code = frame.f_code
        name = code.co_filename
        if name not in self._files:
            self._files[name] = self._core_file(name)
        file = self._files[name]
        if file is not None:
            self._called.add((file, code.co_firstlineno))

    def _core_file(self, name: str) -> str | None:
        try:
            file = Path(name).resolve().relative_to(self._tree)
        except ValueError:
            return None
        return str(file) if file.parts[0] == "runtime" and file.parts[1] in FOLDERS else None


def outcome(tree: Path, tests: list[RecordedTest], most_seconds: int) -> Outcome:
    """Of these tests in the tree. most_seconds: of processor time."""
    files = list(dict.fromkeys(test.file for test in tests))
    return _in_a_process(tree, files, most_seconds, lambda: [Only(frozenset(test.name for test in tests))])


def recorded(tree: Path, file: Path) -> tuple[Outcome, list[RecordedTest]]:
    """Of all tests, without a mutant. file: for what they call."""
    found = _in_a_process(tree, list(TESTS), None, lambda: [Calls(tree, file)])
    if found.caught_by is not None:
        return found, []
    tests = json.loads(file.read_text())
    return found, [RecordedTest(name, seconds, frozenset(map(tuple, calls))) for name, seconds, calls in tests]


def _in_a_process(tree: Path, files: list[str], most_seconds: int | None, plugins: Any) -> Outcome:
    context = multiprocessing.get_context("fork")
    begun, (failed, sender) = processor_seconds(), context.Pipe(duplex=False)
    process = context.Process(target=run_tests, args=(tree, files, most_seconds, sender, plugins))
    process.start()
    sender.close()
    ended = _ends(process)
    if not ended:
        process.kill()
        process.join()
    seconds = processor_seconds() - begun
    if process.exitcode == 0:
        return Outcome(None, seconds)
    if failed.poll():
        try:
            return Outcome(failed.recv(), seconds, failed=True)
        except EOFError:
            pass
    return Outcome(f"exit status {process.exitcode}" if ended else "waiting forever", seconds)


def _ends(process: ForkProcess) -> bool:
    """Wait for the end of a process; False if it waits itself, and takes no processor time."""
    since, used = time.monotonic(), 0.0
    while process.exitcode is None:
        process.join(1)
        try:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        seconds = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # its own, and that of its ended children
        now = time.monotonic()
        if seconds > used + IDLE_USE:
            since, used = now, seconds
        elif now - since > IDLE_SECONDS:
            return False
    return True


def processor_seconds() -> float:
    """Of the processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_tests(tree: Path, files: list[str], most_seconds: int | None, failed: Connection, plugins: Any) -> None:
    """In a process of its own: the tests of ``tree`` import the modules of ``tree``. Sends the first that fails."""
    os.setsid()
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    sys.path[:] = [str(tree), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
    sys.dont_write_bytecode = True
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    if most_seconds is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (most_seconds, most_seconds))
    import hypothesis
    import pytest

    hypothesis.settings.register_profile("mutation", deadline=None)  # tests are slower while their calls are recorded
    hypothesis.settings.load_profile("mutation")
    arguments = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", *files]
    sys.exit(pytest.main(arguments, plugins=[Failures(failed), *plugins()]))


def tests_of(place: Place, tests: list[RecordedTest]) -> list[RecordedTest]:
    """Those that call the mutant's function: the fastest ones, by file, the fastest file first."""
    file, function = str(place.file), place.mutant.function
    calling = [
        test for test in tests if ((file, function) in test.calls if function is not None else _may_read(test, file))
    ]
    chosen = list(_fastest(calling))
    seconds = {test.file: 0.0 for test in chosen}
    for test in chosen:
        seconds[test.file] += test.seconds
    return sorted(chosen, key=lambda test: (seconds[test.file], test.file, test.seconds))


def _may_read(test: RecordedTest, file: str) -> bool:
    """Whether a test calls functions of a file, or none of the core: then it may compare constants."""
    return not test.calls or any(name == file for name, _ in test.calls)


def _fastest(tests: list[RecordedTest]) -> Iterator[RecordedTest]:
    """The fastest one, and as many more as have time."""
    seconds = 0.0
    for number, test in enumerate(sorted(tests, key=lambda test: test.seconds)):
        seconds += test.seconds
        if number and seconds > MOST_SECONDS:
            return
        yield test


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", choices=FOLDERS, help="mutants of this folder alone")
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
    with tempfile.TemporaryDirectory(prefix="trimode-mutation-") as temporary:
        tree = Path(temporary) / "tree"
        copy_tree(tree)
        shorten_waits(tree)
        found, tests = recorded(tree, Path(temporary) / "calls.json")
        if found.caught_by is not None:
            print(f"without a mutant, the tests fail: {found.caught_by}", file=sys.stderr)
            return 2
        print(f"without a mutant, {len(tests)} tests take {found.seconds:.0f} s of processor time", flush=True)
        for place in sample:
            chosen = tests_of(place, tests)
            found = mutated_outcome(tree, place, chosen)
            if found.caught_by is not None and not found.failed and not runs_without_mutant(tree, chosen):
                print(f"the tests no longer run without a mutant ({found.caught_by})", file=sys.stderr)
                return 2
            outcomes[found.caught_by is not None] += 1
            verdict = "SURVIVED" if found.caught_by is None else "caught"
            print(f"{verdict} after {found.seconds:.0f} s, {len(chosen)} tests: {place}", flush=True)
            if found.caught_by is not None:
                print(f"    {found.caught_by}", flush=True)
    print(f"{outcomes[True]} of {outcomes.total()} caught, {outcomes[True] / outcomes.total():.0%}")
    return 0 if outcomes[True] >= BAR * outcomes.total() else 1


def mutated_outcome(tree: Path, place: Place, tests: list[RecordedTest]) -> Outcome:
    """Of these tests with the mutant in place; it survives where no test calls it."""
    if not tests:
        return Outcome(None, 0.0)
    seconds = SETUP_SECONDS + sum(test.seconds for test in tests)
    original = (tree / place.file).read_text()
    (tree / place.file).write_text(place.mutant.source)
    try:
        return outcome(tree, tests, math.ceil(PATIENCE * seconds))
    finally:
        (tree / place.file).write_text(original)


def runs_without_mutant(tree: Path, tests: list[RecordedTest]) -> bool:
    """Whether the fastest of these tests still passes in the unchanged tree."""
    fastest = min(tests, key=lambda test: test.seconds)
    return outcome(tree, [fastest], math.ceil(PATIENCE * (SETUP_SECONDS + fastest.seconds))).caught_by is None


if __name__ == "__main__":
    sys.exit(main())
