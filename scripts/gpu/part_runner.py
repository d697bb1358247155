"""Parts of a run on a GPU: each in a process of its own, with a time limit, and one line of JSON for each record.

A fault or a hang of one part does not affect the others, and the records of a stopped part are kept.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Record = dict[str, Any]


def run_parts(module: str, limits: Mapping[str, float], folder: Path, out: Path) -> dict[str, str]:
    """Run ``python -m module part NAME folder lines`` for each part, for at most so many seconds. Returns how each
    ended: ``ended``, or why it did not, and its seconds.
    """
    out.mkdir(parents=True, exist_ok=True)
    states = {}
    for part, limit in limits.items():
        (lines := lines_of(out, part)).unlink(missing_ok=True)
        started = time.monotonic()
        command = [sys.executable, "-m", module, "part", part, str(folder.resolve()), str(lines.resolve())]
        try:
            ended = subprocess.run(command, cwd=ROOT, timeout=limit, check=False).returncode
            state = "ended" if ended == 0 else f"failed with exit code {ended}"
        except subprocess.TimeoutExpired:
            state = f"stopped after {limit:g} s"
        states[part] = f"{state}, {time.monotonic() - started:.0f} s"
        print(f"{part}: {states[part]}", flush=True)
    return states


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
