"""Run a script with the wheel in dist/, whose decoding loop is compiled, rather than with the working tree.

    make wheel
    python -m scripts.with_wheel scripts.bench.grammar_time checkpoints/tiny

The wheel is installed for this run alone. Other packages are those of the environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit((__doc__ or "").strip())
    module, *arguments = sys.argv[1:]
    wheels = sorted((ROOT / "dist").glob("trimode-*.whl"))
    if not wheels:
        sys.exit("dist/ has no wheel; run `make wheel`")
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(run(wheels[-1], Path(folder), module, arguments))


def run(wheel: Path, folder: Path, module: str, arguments: list[str]) -> int:
    """Runs the module in the current folder. folder: an empty one. Returns the exit status."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(wheel)]
    subprocess.run(pip, check=True)
    for name in ("scripts", "tests"):
        (folder / name).symlink_to(ROOT / name)
    # Python adds the current folder, which has the working tree's package, unless PYTHONSAFEPATH is set.
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, "-m", module, *arguments], env=environment, check=False).returncode


if __name__ == "__main__":
    main()
