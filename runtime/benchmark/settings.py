"""Settings that a benchmark compares: modes and block lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from trimode.runtime.request.sampling_params import Mode

_WITH_BLOCKS: tuple[Mode, ...] = ("linear_spec", "diffusion")


class Setting(NamedTuple):
    """fields: of :class:`SamplingParams`, which a server takes under the same names."""

    name: str
    fields: dict[str, Any]


def settings_of(modes: Sequence[Mode], block_lengths: Sequence[int]) -> list[Setting]:
    """Every mode, and those with blocks at every block length; no block lengths: at the default one."""
    found: list[Setting] = []
    for mode in modes:
        if mode in _WITH_BLOCKS and block_lengths:
            found += [Setting(f"{mode} {length}", {"mode": mode, "block_length": length}) for length in block_lengths]
        else:
            found.append(Setting(mode, {"mode": mode}))
    return found
