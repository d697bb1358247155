"""The memory that a KV pool on the host may take unless a limit is given."""

from __future__ import annotations

from trimode.common.machine import available_memory

# Of the available memory; the rest is for activations, the prefix cache and other processes.
KV_SHARE = 0.8


def default_kv_bytes(weight_bytes: int) -> int:
    """KV_SHARE of the memory that is available once the weights are read. Mapped weights count as available before."""
    return max(1, int(KV_SHARE * (available_memory() - weight_bytes)))
