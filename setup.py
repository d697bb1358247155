"""Compiles the decoding loop into the wheel, if TRIMODE_COMPILE is 1. Everything else is in pyproject.toml.

Between two passes of an engine, the host runs a few thousand lines of Python. Compiled by mypyc, they take about two
thirds of the time (docs/cycle.md). The sources stay as they are: the working tree is interpreted, the wheel is compiled.
"""

import os
import sys

from setuptools import setup

COMPILED = [
    *(
        f"trimode/runtime/decoding/{module}.py"
        for module in (
            "acceptance_rates",
            "draft_sources",
            "draft_tree",
            "ruled_rows",
            "ruled_tree",
            "sampling",
            "sequence",
            "token_rules",
        )
    ),
    "trimode/runtime/grammar/matcher.py",
    *(f"trimode/runtime/scheduling/{module}.py" for module in ("auto_block", "batching", "pass_cost")),
]

extensions = []
# The other commands of a build read the metadata only.
if os.environ.get("TRIMODE_COMPILE") == "1" and "bdist_wheel" in sys.argv:
    try:
        from mypyc.build import mypycify
    except ImportError:
        sys.exit("TRIMODE_COMPILE=1 needs mypy and trimode's own dependencies where it builds: see `make wheel`")
    extensions = mypycify([*COMPILED, "--config-file=setup.cfg"], debug_level="0", target_dir=".setuptools/mypyc")

setup(ext_modules=extensions)
