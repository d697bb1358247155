"""What the builders of TensorRT and of TensorRT-RTX need alike: they are one interface in two packages."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping

from trimode.common.progress import Progress


class HeldSignals:
    """Ctrl-C and SIGTERM while the builder runs: noted, and raised again when it has ended. Raised at once, they would
    do so inside one of its calls of ours, and it drops exceptions.
    """

    def __init__(self) -> None:
        self.pending: int | None = None

    def __enter__(self) -> HeldSignals:
        on_main_thread = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if on_main_thread else ()
        self._former = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if self.pending is not None:
            signal.raise_signal(self.pending)

    def _note(self, number: int, _frame: object) -> None:
        self.pending = number


class BuilderProgress:
    """A progress monitor's methods: tells the builder's phases, and stops it for a signal or an exception of the
    listener.
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


# Least, usual and largest.
Sizes = tuple[int, int, int]


class ProfileSizes:
    """The dynamic dimensions of an optimisation profile; ``others``: those that a target has beside these."""

    def __init__(self, max_batch: int, step: Sizes, rows: Sizes, others: Mapping[str, Sizes]) -> None:
        self._ranges = {"batch": (1, 1, max_batch), "step": step, "rows": rows, **others}

    def of(self, dims: list[str | int]) -> list[tuple[int, ...]]:
        """The shapes of an input, least, usual and largest."""
        return [tuple(self._ranges[dim][at] if isinstance(dim, str) else dim for dim in dims) for at in range(3)]
