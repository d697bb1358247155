"""The interpreter in place of a GPU: executes the launches of the GPU check, and measures no time."""

from __future__ import annotations

from collections.abc import Callable

from scripts.gpu.kernel_launch import KernelLaunch
from tests.support.kernel_functions import launch


class InterpreterHost:
    device = "cpu"

    def launch(self, kernel: str, launched: KernelLaunch) -> None:
        assert kernel.startswith(f"{launched.operator.name}.")
        launch(launched)

    def microseconds(self, _run: Callable[[int], object], _runs: int) -> float | None:
        return None
