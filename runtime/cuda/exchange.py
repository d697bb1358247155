"""Memory through which the ranks of an engine add up their partial sums: each rank's, mapped by all others.

The operator ``AllReduce`` (:mod:`trimode.plugins.operators.all_reduce`) defines its content and its use.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from trimode.engine.launch_list import LaunchList
from trimode.engine.manifest import Manifest
from trimode.engine.precision import NUMPY_TYPES
from trimode.model.step import RANKS
from trimode.plugins.arena import partial_sums
from trimode.plugins.operators.all_reduce import EXCHANGE_HEADER
from trimode.runtime.gpu.device import Device
from trimode.runtime.ranks.group import Group

# The driver shares whole blocks of this size. An allocation of whole blocks shares no other memory.
_BLOCK = 2 << 20
_ALIGNMENT = 256


class Exchange:
    """This rank's memory, and that of the others. All ranks make one at the same time. Raises TriModeError if this GPU
    cannot read the memory of another rank's.
    """

    def __init__(self, device: Device, group: Group, manifest: Manifest) -> None:
        max_batch, max_step = manifest.limits.largest_pass
        item = NUMPY_TYPES[manifest.precision.activations].itemsize
        largest = max_batch * max_step * manifest.model.hidden_size * item
        partial = -(-largest // _ALIGNMENT) * _ALIGNMENT
        size = -(-(EXCHANGE_HEADER + 2 * partial) // _BLOCK) * _BLOCK
        own = device.allocate(size, "the partial sums of ranks")
        device.fill(own.address, 0, size)
        device.synchronize()
        names = enumerate(group.gathered(device.share(own)))
        self._memory = [own if rank == group.rank else device.open_shared(name) for rank, name in names]
        addresses = [memory.address for memory in self._memory]
        self._ranks = device.store(np.array([*addresses, group.rank], np.int64), "the addresses of ranks")
        self._partials = [own.address + EXCHANGE_HEADER + index * partial for index in range(2)]

    def addresses(self, launches: LaunchList) -> Mapping[str, int]:
        """Where an engine's partial sums are, and its input ``ranks``. Consecutive sums alternate between two places,
        also from one pass to the next, since a pass has two sums in each layer.
        """
        sums = partial_sums(launches)
        return {RANKS: self._ranks.address, **{name: self._partials[index % 2] for index, name in enumerate(sums)}}
