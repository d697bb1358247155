"""The choice of a tactic: by the operator's rule, or by time on this GPU.

All tactics of an operator give the same bits. Timed tactics are compared with the rule's all the same, and one with
other bits is not chosen. An operator is timed where it can run on any activations: it reads no index and no mask, and
overwrites nothing but its own outputs. Attention and the operators that write the KV pool follow their rule.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trimode.common.cache_folder import tactics_folder
from trimode.common.errors import TriModeError
from trimode.engine.kernel_library import INDEX
from trimode.model.step import COUNTERS
from trimode.plugins.launches import PlannedLaunch
from trimode.plugins.operators import Node, Operator
from trimode.runtime.gpu.device import BoundLaunch, Device

log = logging.getLogger(__name__)

VARIABLE = "TRIMODE_TACTICS"
_REPEATS = 5
# A tactic replaces the rule's if it needs at most this part of its time.
_GAIN = 0.97


class Output(NamedTuple):
    """Memory that a launch writes."""

    address: int
    bytes: int


class Candidate(NamedTuple):
    """A tactic, and the launches of a pass with it: one operator of one shape in every layer."""

    tactic: int
    launches: Sequence[BoundLaunch]


def can_be_timed(launch: PlannedLaunch) -> bool:
    """Whether a launch may run on arbitrary activations, and changes none of its inputs but the counters."""
    operator = launch.operator
    aliased = {operand.aliases for operand in operator.outputs if operand.aliases is not None}
    indices = [operand for operand in operator.inputs if operand.type in ("int64", "bool")]
    return aliased <= {COUNTERS} and not any(all(launch.node.fixed[operand.name]) for operand in indices)


class TacticTimes:
    """Tactics of this GPU that were timed, in ``file``. Without a readable file, all are timed again."""

    def __init__(self, device: Device, file: Path) -> None:
        self._device = device
        self._file = file
        self._chosen = _read(file)
        self._is_saved = True

    def known(self, key: str) -> int | None:
        """The tactic that was chosen before for a :func:`tactic_key`."""
        return self._chosen.get(key)

    def choose(self, key: str, rule: Candidate, others: Sequence[Candidate], output: Output) -> int:
        """Time the tactics, and remember the fastest one that gives the bits of the rule's.

        rule: the tactic of the operator's rule. output: that of the first launch of every candidate.
        """
        expected = self._bits(rule, output)
        # Before any timing, which may overwrite the inputs of the first launch.
        equal = [candidate for candidate in others if self._has_bits(candidate, output, expected, key)]
        best = self._seconds(rule), rule.tactic
        least = _GAIN * best[0]
        for candidate in equal:
            if (seconds := self._seconds(candidate)) < min(least, best[0]):
                best = seconds, candidate.tactic
        self._chosen[key], self._is_saved = best[1], False
        return best[1]

    def save(self) -> None:
        """Write new choices, all or nothing. Without a writable cache, the next process times again."""
        if self._is_saved:
            return
        temporary = self._file.with_name(f".{self._file.name}.{secrets.token_hex(4)}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._chosen, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            temporary.replace(self._file)
            self._is_saved = True
        except OSError as error:
            log.warning("%s cannot be written: %s; tactics will be timed again", self._file, error.strerror)

    def _has_bits(self, candidate: Candidate, output: Output, expected: Any, key: str) -> bool:
        is_equal = np.array_equal(self._bits(candidate, output), expected)
        if not is_equal:
            log.warning("tactic %d of %s gives other bits; it is not used", candidate.tactic, key)
        return is_equal

    def _bits(self, candidate: Candidate, output: Output) -> Any:
        found = np.empty(output.bytes, np.uint8)
        self._device.fill(output.address, 0xFF, output.bytes)
        self._device.launch_kernel(candidate.launches[0])
        self._device.download(found.ctypes.data, output.address, output.bytes)
        self._device.synchronize()
        return found

    def _seconds(self, candidate: Candidate) -> float:
        def enqueue() -> None:
            for launch in candidate.launches:
                self._device.launch_kernel(launch)

        graph = self._device.capture(enqueue)
        return min(self._device.seconds(lambda: self._device.launch(graph)) for _ in range(_REPEATS))


def tactic_times(device: Device, kernels: Path) -> TacticTimes | None:
    """Choices by time if ``$TRIMODE_TACTICS`` is ``timed``; None, for the rules, if it is ``rule`` or not set.

    kernels: the folder of the kernels that this GPU runs. Raises TriModeError for another value.
    """
    wanted = os.environ.get(VARIABLE, "rule")
    if wanted not in ("rule", "timed"):
        raise TriModeError(f"{VARIABLE} is {wanted}; set it to rule or timed")
    return TacticTimes(device, tactics_file(device, kernels)) if wanted == "timed" else None


def tactics_file(device: Device, kernels: Path) -> Path:
    """The file of the choices for this GPU, its driver, and these kernels."""
    digest = hashlib.sha256(f"{device.name} {device.driver_version}".encode())
    for file in (kernels / INDEX, *sorted(kernels.glob("*.cubin"))):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return tactics_folder() / f"{digest.hexdigest()[:16]}.json"


def tactic_key(operator: Operator, node: Node) -> str:
    """Names an operator and the sizes of its inputs, which decide what a tactic's time is."""
    sizes = [dict(node.fixed), dict(node.attributes)]
    return f"{operator.name} {json.dumps(sizes, sort_keys=True)}"


def _read(file: Path) -> dict[str, int]:
    """The choices of a file; none if it is missing or holds anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict) or not all(type(number) is int for number in found.values()):
        return {}
    return found
