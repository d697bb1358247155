"""The kernels of an engine for one GPU, loaded when a pass first needs them."""

from __future__ import annotations

import logging
from pathlib import Path

from trimode.engine.kernel_library import FIRST_WAITING, KernelLibrary, library_for
from trimode.plugins.operators import Node, Operator, Tactic
from trimode.runtime.gpu.device import Device, Kernel

log = logging.getLogger(__name__)


class Kernels:
    """folder: the engine's ``kernels``. Raises TriModeError if it has none that can run on the device."""

    def __init__(self, device: Device, folder: Path) -> None:
        self._device = device
        present = device.compute_capability
        chosen = library_for(folder, present)
        if chosen != present:
            log.warning(
                "%s has no kernels for compute capability %d: those for %d are used; for full speed build with --sm %d",
                folder,
                present,
                chosen,
                present,
            )
        self._library = KernelLibrary(folder, chosen)
        self._is_native = chosen == present
        # Whether kernels wait for the kernels before them, so that they may be launched early.
        self.wait = chosen >= FIRST_WAITING
        self._most_shared_bytes = device.most_shared_bytes
        self._loaded: dict[str, Kernel] = {}

    def choose(self, operator: Operator, node: Node) -> tuple[Kernel, Tactic]:
        """The kernel for a node, of the operator's default tactic among those that the GPU can run."""
        tactics = operator.tactics(node)
        names = {number: operator.kernel_name(node, number) for number in tactics}
        fitting = [
            number
            for number in self._library.available(names)
            if self._library.find(names[number]).shared_bytes <= self._most_shared_bytes
        ]
        chosen = operator.default_tactic(node, fitting)
        return self._load(names[chosen]), tactics[chosen]

    def _load(self, name: str) -> Kernel:
        if name not in self._loaded:
            entry = self._library.find(name)
            image = self._library.cubin(name) if self._is_native else self._library.ptx(name)
            self._loaded[name] = self._device.load_kernel(image, entry.entry, entry.threads, entry.shared_bytes)
        return self._loaded[name]
