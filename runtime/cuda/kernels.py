"""The kernels of an engine for one GPU, loaded when a pass first needs them."""

from __future__ import annotations

import logging
from pathlib import Path

from trimode.engine.kernel_library import KernelLibrary, library_folder, library_for
from trimode.plugins.operators import Node, Operator, Tactic
from trimode.runtime.gpu.device import Device, Kernel

log = logging.getLogger(__name__)


class Kernels:
    """folder: the engine's ``kernels``, and after loading those of them that the device runs. Raises TriModeError if
    there are none.
    """

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
        self.folder = library_folder(folder, chosen)
        self._is_native = chosen == present
        self._most_shared_bytes = device.most_shared_bytes
        self._loaded: dict[str, Kernel] = {}

    def fitting(self, operator: Operator, node: Node) -> dict[int, Tactic]:
        """The tactics for a node that the GPU can run, by their numbers."""
        tactics = operator.tactics(node)
        names = {number: operator.kernel_name(node, number) for number in tactics}
        return {
            number: tactics[number]
            for number in self._library.available(names)
            if self._library.find(names[number]).shared_bytes <= self._most_shared_bytes
        }

    def load(self, operator: Operator, node: Node, number: int) -> Kernel:
        """The kernel of a tactic for a node."""
        name = operator.kernel_name(node, number)
        if name not in self._loaded:
            entry = self._library.find(name)
            image = self._library.cubin(name) if self._is_native else self._library.ptx(name)
            self._loaded[name] = self._device.load_kernel(image, entry.entry, entry.threads, entry.shared_bytes)
        return self._loaded[name]
