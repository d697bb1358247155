"""The targets, by name.

A new target adds its name to :data:`NAMES`; no other shared code changes. By convention, ``engine/targets/<name>.py``
has its ``SECTION`` of the manifest, ``build/<name>/target.py`` its ``TARGET`` for builds, and
``runtime/<name>/target.py`` its ``TARGET`` for the runtime.
"""

from __future__ import annotations

from importlib import import_module

from trimode.engine.targets.section import TargetSection

NAMES = ("cpu", "cuda", "rtx", "tensorrt")

SECTIONS: dict[str, type[TargetSection]] = {name: import_module(f"{__name__}.{name}").SECTION for name in NAMES}
