"""Signals, progress and optimisation profiles for the builders of TensorRT and TensorRT-RTX, which share an API."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping

from trimode.common.progress import Progress
from trimode.engine.plan_file import MOST_ASKED, MOST_MASKED_ROWS


class HeldSignals:
    """Hold SIGINT and SIGTERM while the builder runs, and raise them again when it has ended. Raised immediately, they
    would surface inside a TensorRT callback, which swallows exceptions.
    """

    def __init__(self) -> None:
        self.pending: int | None = None

    def __enter__(self) -> HeldSignals:
        on_main_thread = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if on_main_thread else ()
        self._former = {number: signal.signal(number, self._hold) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if self.pending is not None:
            signal.raise_signal(self.pending)

    def _hold(self, number: int, _frame: object) -> None:
        self.pending = number


class BuilderProgress:
    """The methods of TensorRT's progress monitor. They report the builder's phases to ``progress``, and stop the
    builder after a signal or an exception from ``progress``.
    """

    def __init__(self, stage: str, progress: Progress, signals: HeldSignals) -> None:
        self._stage = stage
        self._progress = progress
        self._signals = signals
        self._steps: dict[str, int] = {}
        self.interruption: BaseException | None = None

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:  # noqa: ARG002
        self._steps[phase_name] = num_steps

    def step_complete(self, phase_name: str, step: int) -> bool:
        try:
            self._progress(f"{self._stage}: {phase_name}", step + 1, self._steps.get(phase_name, step + 1))
        except BaseException as error:
            self.interruption = error
        return self.interruption is None and self._signals.pending is None

    def phase_finish(self, phase_name: str) -> None:
        self._steps.pop(phase_name, None)


# Minimum, optimum and maximum.
SizeRange = tuple[int, int, int]


def optional_inputs(max_step: int) -> dict[str, SizeRange]:
    """The dimensions of token masks and asked ids, which most passes lack."""
    return {"masked_rows": (0, 0, min(MOST_MASKED_ROWS, max_step)), "asked": (0, 0, MOST_ASKED)}


class ProfileSizes:
    """The dynamic dimensions of an optimisation profile. others: further dimensions of the target."""

    def __init__(self, max_batch: int, step: SizeRange, rows: SizeRange, others: Mapping[str, SizeRange]) -> None:
        self._ranges = {"batch": (1, 1, max_batch), "step": step, "rows": rows, **others}

    def of(self, dims: list[str | int]) -> list[tuple[int, ...]]:
        """The minimum, optimum and maximum shape of an input."""
        return [tuple(self._ranges[dim][at] if isinstance(dim, str) else dim for dim in dims) for at in range(3)]
