"""A model repository for one engine: the model ``tensorrt_llm`` and, in front of it, the model ``ensemble``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from trimode.common.atomic_folder import atomic_folder
from trimode.runtime.triton.tensors import (
    ENSEMBLE_INPUTS,
    OPTIONAL_INPUTS,
    OUTPUTS,
    TEXT_INPUT,
    TEXT_OUTPUT,
    Tensor,
)

MODEL_NAME, ENSEMBLE_NAME = "tensorrt_llm", "ensemble"
_VERSION = "1"
_MODEL_FILE = "from trimode.runtime.triton.model import TritonPythonModel  # noqa: F401\n"


def write_repository(engine: Path, repository: Path, *, max_batch: int, max_queue: int, decoupled: bool = True) -> None:
    """Write the new folder ``repository``. Raises TriModeError if it exists.

    decoupled: responses can be streamed. If not, every request has one response, and Triton accepts plain ``infer``
    calls too.
    """
    with atomic_folder(repository) as folder:
        (folder / MODEL_NAME / _VERSION).mkdir(parents=True)
        (folder / ENSEMBLE_NAME / _VERSION).mkdir(parents=True)
        (folder / MODEL_NAME / _VERSION / "model.py").write_text(_MODEL_FILE, encoding="utf-8")
        parameters = {"engine": str(engine.resolve()), "max_batch": str(max_batch), "max_queue": str(max_queue)}
        (folder / MODEL_NAME / "config.pbtxt").write_text(_model_config(parameters, decoupled), encoding="utf-8")
        (folder / ENSEMBLE_NAME / "config.pbtxt").write_text(_ensemble_config(), encoding="utf-8")


def _model_config(parameters: Mapping[str, str], decoupled: bool) -> str:
    inputs = [_tensor("input", TEXT_INPUT), *(_tensor("input", tensor, optional=True) for tensor in OPTIONAL_INPUTS)]
    return _lines(
        (
            f'name: "{MODEL_NAME}"',
            'backend: "python"',
            # The engine's own scheduler batches requests, cycle by cycle.
            "max_batch_size: 0",
            f"model_transaction_policy {{ decoupled: {str(decoupled).lower()} }}",
            "instance_group [ { count: 1 kind: KIND_CPU } ]",
            *inputs,
            *(_tensor("output", tensor) for tensor in OUTPUTS),
            *(
                f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"
                for key, value in parameters.items()
            ),
        )
    )


def _ensemble_config() -> str:
    """Triton passes the request on to ``tensorrt_llm``, under the names of its inputs; there is one engine."""
    by_name = {tensor.name: tensor for tensor in OPTIONAL_INPUTS}
    inputs = {name: by_name[stands_for]._replace(name=name) for name, stands_for in ENSEMBLE_INPUTS.items()}
    passed_on = {TEXT_INPUT.name: TEXT_INPUT.name} | {stands_for: name for name, stands_for in ENSEMBLE_INPUTS.items()}
    return _lines(
        (
            f'name: "{ENSEMBLE_NAME}"',
            'platform: "ensemble"',
            "max_batch_size: 0",
            _tensor("input", TEXT_INPUT),
            *(_tensor("input", tensor, optional=True) for tensor in inputs.values()),
            _tensor("output", TEXT_OUTPUT),
            "ensemble_scheduling { step [ {",
            f'model_name: "{MODEL_NAME}"',
            "model_version: -1",
            *(f'input_map {{ key: "{key}" value: "{value}" }}' for key, value in passed_on.items()),
            f'output_map {{ key: "{TEXT_OUTPUT.name}" value: "{TEXT_OUTPUT.name}" }}',
            "} ] }",
        )
    )


def _tensor(kind: str, tensor: Tensor, optional: bool = False) -> str:
    tail = " optional: true" if optional else ""
    return f'{kind} {{ name: "{tensor.name}" data_type: {tensor.dtype} dims: {tensor.dims}{tail} }}'


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _lines(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
