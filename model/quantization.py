"""How a checkpoint is quantised: the methods, and ModelOpt's statement of which matrices are int4.

ModelOpt writes it to ``hf_quant_config.json`` and, with other names, to ``quantization_config`` of ``config.json``.
Newer releases write only the latter.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from trimode.common.errors import TriModeError
from trimode.common.records import describe, read_json_object
from trimode.model.config import CONFIG

QUANT_CONFIG_FILE = "hf_quant_config.json"
_SECTION = "quantization_config"
_MIXED = "MIXED_PRECISION"
Algorithm = Literal["W4A16_AWQ", "W4A16"]
Method = Literal["awq", "rtn"]  # activation-aware; round to nearest
HeadFormat = Literal["int4", "16bit"]


class Quantization(BaseModel):
    """group_size: input channels that share a scale. exclude_modules: patterns of modules that are not quantised.
    quantized_layers: the quantised modules; None for all except the excluded ones.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    quant_algo: Algorithm
    group_size: PositiveInt
    has_zero_point: Literal[False] = False
    exclude_modules: tuple[str, ...] = ()
    quantized_layers: frozenset[str] | None = None

    def is_int4(self, module: str) -> bool:
        """Whether the module's matrix is int4, by its full name, e.g. ``encoder.layers.0.mlp.up_proj``."""
        if self.quantized_layers is not None and module not in self.quantized_layers:
            return False
        return not any(_matches(pattern, module) for pattern in self.exclude_modules)


def read_quantization(folder: Path, group_size: int | None) -> Quantization | None:
    """The statement of a checkpoint folder; None if nothing is quantised.

    group_size: used if the statement has none, which is allowed in ``config.json``. Raises TriModeError that names the
    file and the method if the method is not int4 weights with 16-bit activations.
    """
    path = folder / QUANT_CONFIG_FILE
    if path.is_file():
        where, statement = f"{path}: quantization", read_json_object(path).get("quantization")
    else:
        path = folder / CONFIG
        where, statement = f"{path}: {_SECTION}", read_json_object(path).get(_SECTION)
        if statement is None:
            return None
        statement = _in_terms_of_the_file(statement, where) if isinstance(statement, dict) else statement
    if not isinstance(statement, dict):
        raise TriModeError(f"{where} must be an object")
    if (kv_cache := statement.get("kv_cache_quant_algo")) is not None:
        raise TriModeError(
            f"{where}: the KV cache is quantised (kv_cache_quant_algo {_name(kv_cache)}), which TriMode does not "
            "support; export the checkpoint again without it"
        )
    if statement.get("quant_algo") is None:
        return None
    if statement["quant_algo"] == _MIXED:
        statement = _one_method(statement, where)
    if statement.get("group_size") is None:
        statement = statement | {"group_size": group_size}
    try:
        return Quantization.model_validate(statement)
    except ValidationError as error:
        raise TriModeError(f"{where}.{describe(error)}; TriMode reads ModelOpt's int4 weights (W4A16)") from None


def _in_terms_of_the_file(section: dict[str, Any], where: str) -> dict[str, Any]:
    """``quantization_config`` with the names of ``hf_quant_config.json``."""
    method = section.get("quant_method", "modelopt")
    if method != "modelopt":
        raise TriModeError(f"{where}: quant_method {method!r} is not supported; TriMode reads ModelOpt's int4 weights")
    groups = section.get("config_groups")
    weights = [group.get("weights") for group in groups.values()] if isinstance(groups, dict) else []
    sizes = {entry["group_size"] for entry in weights if isinstance(entry, dict) and "group_size" in entry}
    size = section.get("group_size", sizes.pop() if len(sizes) == 1 else None)
    return section | {
        "kv_cache_quant_algo": section.get("kv_cache_quant_algo", section.get("kv_cache_scheme")),
        "exclude_modules": section.get("exclude_modules", section.get("ignore")) or (),
        "group_size": size,
    }


def _one_method(statement: dict[str, Any], where: str) -> dict[str, Any]:
    """The statement of a mixed checkpoint whose quantised layers all have one method and group size."""
    layers = statement.get("quantized_layers")
    if not isinstance(layers, dict) or not all(isinstance(layer, dict) for layer in layers.values()) or not layers:
        raise TriModeError(f"{where}: quant_algo is {_MIXED}, but quantized_layers does not state the layers' methods")
    methods = {(layer.get("quant_algo"), layer.get("group_size")): name for name, layer in layers.items()}
    if len(methods) > 1:
        shown = ", ".join(f"{method} in groups of {size} ({name})" for (method, size), name in methods.items())
        raise TriModeError(f"{where}: several methods in one checkpoint are not supported: {shown}")
    ((method, size),) = methods
    return statement | {"quant_algo": method, "group_size": size, "quantized_layers": list(layers)}


def _name(value: Any) -> str:
    """A name such as ``FP8`` for the description of a number type in ``config.json``."""
    if isinstance(value, dict) and "num_bits" in value:
        return f"{'FP' if value.get('type') == 'float' else 'INT'}{value['num_bits']}"
    return str(value)


def _matches(pattern: str, module: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), module) is not None
