"""Install the wheel alone in a fresh environment and answer a prompt there: ``make wheel-test``.

    python -m scripts.check_wheel dist

The environment holds the base dependencies only. Its answer must equal the one that the working tree gives.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

from trimode.build.engine_builder import build_engine
from trimode.model.checkpoint import Checkpoint
from trimode.quantize import quantize_checkpoint

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "What is 60% of 440?"
BUILD_PACKAGES = {"torch", "onnx", "transformers", "peft", "nvidia-modelopt", "fastapi"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with one wheel")
    (wheel,) = parser.parse_args().folder.resolve().glob("trimode-*.whl")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        quantize_checkpoint(Checkpoint(ROOT / "checkpoints/tiny"), scratch / "w4a16", method="rtn", group=64)
        build_engine(Checkpoint(scratch / "w4a16"), scratch / "engine")
        venv.create(scratch / "environment", with_pip=True)
        binaries = scratch / "environment" / "bin"
        output(scratch, binaries / "python", "-m", "pip", "install", "--quiet", wheel)
        installed = {package["name"] for package in pip_list(scratch, binaries / "python")}
        surplus = installed & BUILD_PACKAGES
        if surplus:
            sys.exit(f"{wheel.name}: the base dependencies include {', '.join(sorted(surplus))}")
        arguments = ("generate", scratch / "engine", "--prompt", PROMPT, "--max-tokens", "40", "--json")
        found = json.loads(output(scratch, binaries / "trimode", *arguments))
        expected = json.loads(output(ROOT, sys.executable, "-m", "trimode", *arguments))
    if found["token_ids"] != expected["token_ids"]:
        sys.exit(f"{wheel.name} answers {found['text']!r}; the working tree answers {expected['text']!r}")
    print(f"{wheel.name} with {len(installed)} packages answers {found['text']!r}, as the working tree does")


def pip_list(folder: Path, python: Path) -> Any:
    return json.loads(output(folder, python, "-m", "pip", "list", "--format", "json"))


def output(folder: Path, *command: object) -> str:
    """Standard output of a command that must succeed. PYTHONPATH is unset, so the installed package is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    parts = [str(part) for part in command]
    done = subprocess.run(parts, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} ended with {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    main()
