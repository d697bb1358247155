"""Quantise a model and build its engine if they are out of date. Used by ``make``.

    python -m scripts.make_engine --model checkpoints/tiny --target cpu

Prints the engine directory on stdout. Next to each folder that it makes, it writes ``<folder>.made.json`` with the
options, the size and modification time of each file of the model, and the format of engines. It makes a folder again
only if these change, and keeps the old folder until the new one is complete. It refuses to replace a folder without
such a record. Other changes of the code are not detected: remove the folder to build it again.

Uses the standard library only.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

# The shipped checkpoint has 256 input channels; groups of 128 lose too much accuracy.
GROUPS = {"tiny": 64}
DEFAULT_GROUP = 128
COMMAND = Path(sys.executable).parent / "trimode"
MANIFEST_SOURCE = Path(__file__).resolve().parents[1] / "engine" / "manifest.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="", help="checkpoint folder or Hugging Face model ID [default: checkpoints/tiny]"
    )
    parser.add_argument("--engine", default="", help="engine directory [default: engines/<model>-<target>]")
    parser.add_argument("--target", default="", help="[default: cpu]")
    parser.add_argument("--method", default="", help="[default: awq]")
    parser.add_argument("--group", default="", help="[default: 64 for the shipped checkpoint, else 128]")
    parser.add_argument("--calibration", default="", help="JSONL for AWQ [default: the model's calibration.jsonl]")
    parser.add_argument("--existing", action="store_true", help="accept the given engine as it is, if it exists")
    parser.add_argument("--weights", action="store_true", help="make the quantised checkpoint too, if it is missing")
    arguments = parser.parse_args()
    model, target, method = arguments.model or "checkpoints/tiny", arguments.target or "cpu", arguments.method or "awq"
    name = Path(model).name
    group = int(arguments.group or GROUPS.get(name, DEFAULT_GROUP))
    engine = Path(arguments.engine or f"engines/{name}-{target}")
    if arguments.existing and arguments.engine and (engine / "manifest.json").is_file():
        print(engine)
        return
    weights = {"model": model, "files": stamps(Path(model))}
    source = Path(model)
    if not (source / "hf_quant_config.json").is_file():
        weights |= {"method": method, "group": group}
        if arguments.calibration:
            weights |= {"calibration": stamps(Path(arguments.calibration))}
        source = Path(f"engines/{name}-w4a16-{method}{group}")
    plan = weights | {"target": target, "format": engine_format()}
    stale = is_stale(engine, engine / "manifest.json", plan)
    if source != Path(model) and (stale or arguments.weights) and is_stale(source, source / "config.json", weights):
        log(f"Quantising {model} by {method} in groups of {group}, into {source}")
        options = ["--method", method, "--group", str(group)]
        options += ["--calibration", arguments.calibration] if arguments.calibration else []
        replace(source, weights, ["quantize", model], options)
    if stale:
        log(f"Building {engine} for {target}")
        replace(engine, plan, ["build", str(source)], ["--target", target])
    print(engine)


def stamps(path: Path) -> dict[str, list[int]]:
    """Size and modification time of a file, or of the files in a folder and its subfolders; empty for a hub id."""
    files = sorted([*path.glob("*"), *path.glob("*/*")]) if path.is_dir() else [path]
    found = ((file, file.stat()) for file in files if file.is_file())
    return {str(file): [status.st_size, status.st_mtime_ns] for file, status in found}


def engine_format() -> int:
    """The format of the engines that this tree builds and reads."""
    found = re.search(r"^FORMAT_VERSION = (\d+)$", MANIFEST_SOURCE.read_text(encoding="utf-8"), re.MULTILINE)
    return int(found[1]) if found else fail(f"{MANIFEST_SOURCE} has no FORMAT_VERSION")


def record_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.made.json")


def is_stale(folder: Path, main_file: Path, plan: dict[str, Any]) -> bool:
    """Whether the folder must be made. Exits with an error if the folder exists without a record."""
    record = record_of(folder)
    if not record.is_file():
        if folder.exists():
            fail(f"{folder} was not made by make; remove it, or give another folder")
        return True
    return not main_file.is_file() or json.loads(record.read_text(encoding="utf-8")) != plan


def replace(folder: Path, plan: dict[str, Any], command: list[str], options: list[str]) -> None:
    """Run ``trimode`` with a new folder as output, and replace the old folder if it succeeds."""
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([str(COMMAND), *command, str(new), *options], stdout=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        sys.exit(done.returncode)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    record_of(folder).write_text(json.dumps(plan), encoding="utf-8")


def log(message: str) -> None:
    print(message, file=sys.stderr)


def fail(message: str) -> NoReturn:
    log(message)
    sys.exit(1)


if __name__ == "__main__":
    main()
