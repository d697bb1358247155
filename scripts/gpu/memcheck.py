"""Passes of every kind of the shipped checkpoint under compute-sanitizer's memcheck.

    compute-sanitizer --report-api-errors no --error-exitcode 9 python -m scripts.gpu.memcheck .gpu

The tool sees accesses outside an allocation. Weights, KV pool and activations are one allocation each, so it does not
see an access from one tensor of an allocation to another.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ERROR = 9
PROMPTS, MAX_TOKENS = 3, 12


def checked_memory(folder: Path) -> Iterator[dict[str, Any]]:
    """The tool's last line, or that it is not installed."""
    what = "memcheck of tiny-bf16"
    if shutil.which("compute-sanitizer") is None:
        yield {"what": what, "memcheck": "not run: compute-sanitizer is not installed"}
        return
    # cuda-bindings looks for functions that an older driver lacks, and the tool would count each as an error.
    command = ["compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", str(ERROR)]
    program = [sys.executable, "-m", "scripts.gpu.memcheck", str(folder)]
    ended = subprocess.run([*command, *program], capture_output=True, text=True, check=False)
    lines = [line for line in (ended.stdout + ended.stderr).splitlines() if "ERROR SUMMARY" in line]
    found = lines[-1] if lines else f"no summary, exit code {ended.returncode}"
    yield {"what": what, "memcheck": found, "code": ended.returncode}


def run_every_mode(folder: Path, prompts: int = PROMPTS, max_tokens: int = MAX_TOKENS) -> None:
    """Answer prompts in every setting: prefills, single tokens, drafts, verifications and denoise passes."""
    from scripts.gpu.token_check import Setting, read_expected
    from trimode.runtime.api.llm import EngineLLM

    expected = read_expected(folder)
    with EngineLLM(folder / "engines" / "tiny-bf16", measure_passes=False) as llm:
        for fields in expected["settings"]:
            llm.generate(expected["prompts"][:prompts], Setting(*fields).params(max_tokens))


if __name__ == "__main__":
    run_every_mode(Path(sys.argv[1]))
