"""What this machine can build and run."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from pydantic import BaseModel

from trimode.build import registry
from trimode.common.gpus import Gpu, find_gpus
from trimode.common.installation import Installation
from trimode.common.machine import instruction_set
from trimode.runtime import loading

_OF_QUANTISATION = ("torch", "nvidia-modelopt")


class Findings(BaseModel):
    """``packages``: version, or None if it is not installed. ``targets``: a sentence each."""

    machine: str
    python: str
    driver: str
    gpus: list[Gpu]
    packages: dict[str, str | None]
    targets: dict[str, str]

    def lines(self) -> list[tuple[str, str]]:
        gpus = [f"{gpu.name}, compute capability {gpu.compute_capability}" for gpu in self.gpus]
        rows = [("machine", self.machine), ("python", self.python), ("CUDA driver", self.driver)]
        rows += [("GPU", gpu) for gpu in gpus or ["none"]]
        rows += [(name, found or "not installed") for name, found in self.packages.items()]
        rows += [(f"target {name}", sentence) for name, sentence in self.targets.items()]
        return rows


def examine() -> Findings:
    """Look at this machine; starts nothing and loads no model."""
    gpus = find_gpus()
    to_run = [name for target in loading.TARGETS.values() for name in target.packages]
    to_build = [name for target in registry.TARGETS.values() for name in target.packages]
    packages = {name: _version(name) for name in (*to_run, *to_build, *_OF_QUANTISATION)}
    return Findings(
        machine=instruction_set(),
        python=platform.python_version(),
        driver=gpus.driver,
        gpus=gpus.found,
        packages=packages,
        targets=_targets(Installation(packages, gpus)),
    )


def _targets(installation: Installation) -> dict[str, str]:
    return {
        name: f"{loading.TARGETS[name].can_run(installation)}; {target.can_build(installation)}"
        for name, target in registry.TARGETS.items()
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
