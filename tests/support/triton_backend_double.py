"""The part of Triton's Python backend that the model uses, without a server: requests are dicts of arrays."""

from __future__ import annotations

import json
import threading
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

COMPLETE_FINAL = 1


class Tensor(NamedTuple):
    name: str
    array: np.ndarray

    def as_numpy(self) -> np.ndarray:
        return self.array


class TritonError(NamedTuple):
    UNAVAILABLE, INVALID_ARG, CANCELLED, INTERNAL = "unavailable", "invalid", "cancelled", "internal"
    message: str
    code: str


class InferenceResponse(NamedTuple):
    output_tensors: tuple[Tensor, ...] = ()
    error: TritonError | None = None

    def texts(self) -> list[str]:
        (found,) = (tensor for tensor in self.output_tensors if tensor.name == "text_output")
        return [text.decode() for text in found.array]


class BackendRequest:
    """One request and the responses to it."""

    def __init__(self, **inputs: Any) -> None:
        self.inputs = {
            name: np.array([value], None if isinstance(value, bool) else np.asarray(value).dtype)
            for name, value in inputs.items()
        }
        self.responses: list[InferenceResponse] = []
        self.answered = threading.Event()

    def parameters(self) -> str:
        return "{}"

    def request_id(self) -> str:
        return ""

    def get_response_sender(self) -> BackendRequest:
        return self

    def is_cancelled(self) -> bool:
        return False

    def send(self, response: InferenceResponse, flags: int = 0) -> None:
        self.responses.append(response)
        if flags == COMPLETE_FINAL:
            self.answered.set()


class _Metric:
    def __init__(self, **_: Any) -> None: ...
    def set(self, _: float) -> None: ...
    def increment(self, _: float) -> None: ...


class _MetricFamily:
    GAUGE, COUNTER = "gauge", "counter"
    Metric = _Metric

    def __init__(self, *_: Any) -> None: ...


class _Logger:
    @staticmethod
    def log_error(message: str) -> None:
        raise AssertionError(message)


def _get_input(request: BackendRequest, name: str) -> Tensor | None:
    found = request.inputs.get(name)
    if found is None:
        return None
    return Tensor(name, np.array([str(text).encode() for text in found], object) if found.dtype.kind == "U" else found)


def backend_module() -> ModuleType:
    """For ``sys.modules["triton_python_backend_utils"]``."""
    module = ModuleType("triton_python_backend_utils")
    vars(module).update(
        Tensor=Tensor,
        TritonError=TritonError,
        InferenceResponse=InferenceResponse,
        MetricFamily=_MetricFamily,
        Logger=_Logger,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=COMPLETE_FINAL,
        get_input_tensor_by_name=_get_input,
        using_decoupled_model_transaction_policy=lambda config: config["decoupled"],
    )
    return module


def model_arguments(engine: str) -> dict[str, str]:
    values = {"engine": engine, "max_batch": "4", "max_queue": "16"}
    parameters = {name: {"string_value": value} for name, value in values.items()}
    return {"model_config": json.dumps({"decoupled": True, "parameters": parameters})}
