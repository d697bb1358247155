"""The JSON of ModelOpt's unified int4 checkpoints: ``hf_quant_config.json``, and a section of ``config.json``.

Both state ``W4A16_AWQ``, ``pre_quant_scale`` and the producer ModelOpt for round to nearest as well: ModelOpt writes
these values for every int4 checkpoint, and readers expect them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimode.model.checkpoint import HEAD

ALGORITHM = "W4A16_AWQ"
# The release that defines this layout; the extra `build` pins the same one.
PRODUCER = {"name": "modelopt", "version": "0.47.0"}


def hf_quant_config(group: int, excluded: Sequence[str]) -> dict[str, Any]:
    """``hf_quant_config.json``; ``excluded``: modules that are not int4."""
    return {
        "producer": PRODUCER,
        "quantization": {
            "quant_algo": ALGORITHM,
            "kv_cache_quant_algo": None,
            "group_size": group,
            "has_zero_point": False,
            "pre_quant_scale": True,
            "exclude_modules": list(excluded),
        },
    }


def quantization_config(excluded: Sequence[str]) -> dict[str, Any]:
    """The section ``quantization_config`` of ``config.json``."""
    return {"ignore": list(excluded), "quant_algo": ALGORITHM, "producer": PRODUCER, "quant_method": "modelopt"}


def excluded_modules(int4_head: bool) -> list[str]:
    return ["encoder.embed_tokens"] if int4_head else [HEAD, "encoder.embed_tokens"]
