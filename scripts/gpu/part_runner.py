"""Parts of a run on a GPU: each in a process of its own, with a time limit, and one line of JSON for each record.

A fault or a hang of one part does not affect the others, and the records of a stopped part are kept. All parts together
end within :data:`SECONDS`, whatever their own limits are.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Record = dict[str, Any]
# Of one run: six minutes.
SECONDS = 360.0
NO_TIME = "not run: no time left"
# MiB of all that is made beforehand. With the working tree, that is at most 64.
LARGEST = 54


def run_parts(module: str, limits: Mapping[str, float], folder: Path, out: Path) -> dict[str, str]:
    """Run ``python -m module part NAME folder lines`` for each part, for at most so many seconds. Returns how each
    ended: ``ended``, or why it did not, and its seconds; :data:`NO_TIME` for a part that could not begin.
    """
    out.mkdir(parents=True, exist_ok=True)
    states, end = {}, time.monotonic() + SECONDS
    for part, limit in limits.items():
        (lines := lines_of(out, part)).unlink(missing_ok=True)
        started = time.monotonic()
        command = [sys.executable, "-m", module, "part", part, str(folder.resolve()), str(lines.resolve())]
        if started < end:
            states[part] = f"{_run(command, min(limit, end - started))}, {time.monotonic() - started:.0f} s"
        else:
            states[part] = NO_TIME
        print(f"{part}: {states[part]}", flush=True)
    return states


def _run(command: list[str], limit: float) -> str:
    """How the command ended. At the limit, its own child processes are ended as well: they use the same GPU."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(limit)
        return "ended" if code == 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def write_lines(lines: Path, records: Iterable[Record]) -> None:
    """Write and print each record as soon as it is there."""
    with lines.open("w", encoding="utf-8") as file:
        for record in records:
            print(json.dumps(record), file=file, flush=True)
            print(json.dumps(record), flush=True)


def lines_of(out: Path, part: str) -> Path:
    return out / f"{part.replace(' ', '_')}.jsonl"


def read_lines(path: Path) -> Iterator[Record]:
    """The records of a part. An incomplete last line of a stopped part is ignored."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return
