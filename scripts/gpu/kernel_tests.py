"""The part of the GPU check that executes the kernel tests on the GPU: ``pytest tests/plugins --gpu``.

The tests compare every kernel with its reference over random shapes, and check which memory it writes and which bits
depend on what. Their kernels are compiled beforehand: the tests run once on the interpreter, which lists them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
# In the folder that the check's ``emit`` writes.
KERNELS = "tests"
TESTS = "tests/plugins"
PYTEST = (sys.executable, "-m", "pytest", "--quiet", f"--confcutdir={TESTS}", "-p", "no:cacheprovider")


def emit_test_kernels(folder: Path, sm: int) -> int:
    """Compile the kernels that the tests launch for one GPU, 90 for 9.0. Returns their number.

    The random cases depend on the version of hypothesis, so the GPU's machine needs the same one.
    """
    from tests.support.gpu_kernels import compile_kernels

    listed = folder / "tested_kernels.json"
    subprocess.run([*PYTEST, TESTS, f"--list-kernels={listed}", f"--sm={sm}"], cwd=ROOT, check=True)
    return compile_kernels(listed, folder / KERNELS, sm)


def results_of_tests(folder: Path, *arguments: str) -> Iterator[dict[str, Any]]:
    """How many tests passed. Raises SystemExit if one failed, or if no kernel was launched. arguments: pytest's, if not
    all tests are to run.
    """
    report = folder / "kernel_tests.xml"
    report.unlink(missing_ok=True)
    command = [*PYTEST, *(arguments or [TESTS]), "--gpu", f"--kernels={folder / KERNELS}", f"--junitxml={report}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    launched = re.search(r"(\d+) launches on the GPU, (\d+) kernels missing", ended.stdout)
    if not report.is_file() or launched is None:
        raise SystemExit(f"the kernel tests did not run:\n{ended.stdout}{ended.stderr}")
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))  # noqa: S314 - pytest wrote it
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    names = [f"{case.get('classname')}::{case.get('name')}" for case in failed]
    yield {
        "what": f"{TESTS} --gpu",
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": names,
        "skipped": len(skipped),
        "kernel_launches": int(launched[1]),
        "missing": int(launched[2]),
    }
    if failed or not int(launched[1]):
        raise SystemExit(f"{len(failed)} kernel tests failed: {', '.join(names)}\n{ended.stdout}")
