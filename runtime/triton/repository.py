"""A model repository for an engine: ``tensorrt_llm/config.pbtxt`` and a model file of one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from trimode.common.atomic_folder import atomic_folder
from trimode.runtime.triton.tensors import OPTIONAL_INPUTS, OUTPUTS, TEXT_INPUT, Tensor

MODEL_NAME = "tensorrt_llm"
_MODEL_FILE = "from trimode.runtime.triton.model import TritonPythonModel  # noqa: F401\n"


def write_repository(engine: Path, repository: Path, *, max_batch: int, max_queue: int, decoupled: bool = True) -> None:
    """Write the new folder ``repository``. Raises TriModeError if it exists.

    decoupled: answers can be streamed. If not, each request has one answer, and Triton takes plain ``infer`` calls too.
    """
    with atomic_folder(repository) as folder:
        model = folder / MODEL_NAME
        (model / "1").mkdir(parents=True)
        (model / "1" / "model.py").write_text(_MODEL_FILE, encoding="utf-8")
        parameters = {"engine": str(engine.resolve()), "max_batch": str(max_batch), "max_queue": str(max_queue)}
        (model / "config.pbtxt").write_text(_config(parameters, decoupled), encoding="utf-8")


def _config(parameters: Mapping[str, str], decoupled: bool) -> str:
    inputs = [_tensor("input", TEXT_INPUT), *(_tensor("input", tensor, optional=True) for tensor in OPTIONAL_INPUTS)]
    return _lines(
        (
            f'name: "{MODEL_NAME}"',
            'backend: "python"',
            # Requests are batched by the engine's own scheduler, cycle by cycle.
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


def _tensor(kind: str, tensor: Tensor, optional: bool = False) -> str:
    tail = " optional: true" if optional else ""
    return f'{kind} {{ name: "{tensor.name}" data_type: {tensor.dtype} dims: {tensor.dims}{tail} }}'


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _lines(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
