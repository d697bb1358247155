"""The quantisation methods: how each one writes the tensors of a checkpoint. A new one adds its function here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from trimode.common.errors import TriModeError
from trimode.common.progress import Progress
from trimode.model.checkpoint import HEAD, Checkpoint
from trimode.model.quantization import Method
from trimode.quantize.quiet import quiet
from trimode.quantize.report import CalibrationReport
from trimode.quantize.round_to_nearest import write_rounded


class Task(NamedTuple):
    """What to quantise. modules: whose matrices become int4. group: input channels that share a scale. texts: token ids
    of the calibration texts, empty for a method that uses none.
    """

    checkpoint: Checkpoint
    modules: list[str]
    group: int
    texts: list[list[int]]


class QuantMethod(NamedTuple):
    """calibrated: whether it reads calibration texts. write: writes all tensors into a folder; returns what it measured
    on the texts.
    """

    calibrated: bool
    write: Callable[[Task, Path, Progress], CalibrationReport | None]


def _awq(task: Task, folder: Path, progress: Progress) -> CalibrationReport:
    with quiet(progress) as shown:
        try:
            from trimode.quantize import awq
        except ImportError as error:
            raise TriModeError(
                f"--method awq needs {error.name}: pip install 'trimode[build]', or use --method rtn"
            ) from None
        before = awq.write_awq(task.checkpoint, folder, task.texts, task.group, HEAD in task.modules, shown)
        return awq.calibration_report(Checkpoint(folder), task.texts, before)


def _round_to_nearest(task: Task, folder: Path, progress: Progress) -> None:
    write_rounded(task.checkpoint, folder, task.modules, task.group, progress)


METHODS: Mapping[Method, QuantMethod] = {
    "awq": QuantMethod(calibrated=True, write=_awq),
    "rtn": QuantMethod(calibrated=False, write=_round_to_nearest),
}
