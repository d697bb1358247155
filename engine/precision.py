"""Number types of an engine: as stored in the weight pool, and as computed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import ml_dtypes
import numpy as np
from pydantic import PositiveInt

from trimode.engine.record import Record

Real = Literal["fp32", "fp16", "bf16"]
Stored = Literal["int4"] | Real
NUMPY_TYPES: dict[Real, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
# How many modules a summary lists by name.
_MOST_NAMES = 4


class Precision(Record):
    """matrices: the type of every matrix that multiplies activations, by the checkpoint's module name. ``int4`` weights
    share a scale by ``group`` input channels. activations: the type of the hidden states.
    """

    matrices: dict[str, Stored]
    embedding: Real
    activations: Real
    kv_cache: Real
    group: PositiveInt | None

    def all_int4(self, modules: Iterable[str]) -> bool:
        """Whether each of these matrices is int4."""
        return all(self.matrices[module] == "int4" for module in modules)

    def summary(self) -> str:
        """The matrices' types in one line, e.g. ``int4 in groups of 128 (14 matrices), bf16 (1: diffusion_head)``."""
        parts = []
        for stored in dict.fromkeys(sorted(self.matrices.values(), key=lambda name: name != "int4")):
            modules = [module for module, found in self.matrices.items() if found == stored]
            count = f"{len(modules)} matrices" if len(modules) != 1 else "1 matrix"
            if len(modules) <= _MOST_NAMES and len(modules) < len(self.matrices):
                count += f": {', '.join(modules)}"
            name = f"int4 in groups of {self.group}" if stored == "int4" else stored
            parts.append(f"{name} ({count})")
        return "; ".join(parts)
