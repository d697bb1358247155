"""Compiles the decoding loop into the wheel, if TRIMODE_COMPILE is 1. Everything else is in pyproject.toml.

These modules run between two passes of an engine. Compiled by mypyc, they take about two thirds of the time
(docs/cycle.md). Their sources are plain Python: the working tree is interpreted, and only the wheel is compiled.
"""

import os
import shutil
import sys
import sysconfig

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
        sys.exit("TRIMODE_COMPILE=1 needs mypy and numpy, without build isolation: see `make wheel`")
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        sys.exit(f"TRIMODE_COMPILE=1 needs a C compiler, but {compiler} is not installed")
    options = {"group_name": "trimode", "debug_level": "0", "target_dir": ".setuptools/mypyc"}
    extensions = mypycify([*COMPILED, "--config-file=setup.cfg"], **options)

setup(ext_modules=extensions)
