"""The JSON of ModelOpt's unified int4 checkpoints: ``hf_quant_config.json``, and a section of ``config.json``.

Both say ``W4A16_AWQ`` and ``pre_quant_scale`` for round to nearest too, and name ModelOpt as producer: that is what
ModelOpt itself writes for every int4 checkpoint, and what its readers look for.
"""

from __future__ import annotations

from typing import Any

from trimode.model.checkpoint import HEAD

QUANT_CONFIG_FILE = "hf_quant_config.json"
ALGORITHM = "W4A16_AWQ"
# The release whose layout this is; `[build]` pins the same.
PRODUCER = {"name": "modelopt", "version": "0.47.0"}


def hf_quant_config(group: int, int4_head: bool) -> dict[str, Any]:
    """``hf_quant_config.json``."""
    return {
        "producer": PRODUCER,
        "quantization": {
            "quant_algo": ALGORITHM,
            "kv_cache_quant_algo": None,
            "group_size": group,
            "has_zero_point": False,
            "pre_quant_scale": True,
            "exclude_modules": _excluded(int4_head),
        },
    }


def quantization_config(int4_head: bool) -> dict[str, Any]:
    """The section that ``config.json`` gains."""
    return {"ignore": _excluded(int4_head), "quant_algo": ALGORITHM, "producer": PRODUCER, "quant_method": "modelopt"}


def _excluded(int4_head: bool) -> list[str]:
    return ["encoder.embed_tokens"] if int4_head else [HEAD, "encoder.embed_tokens"]
