"""A Triton request, read from its tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import triton_python_backend_utils as pb_utils

from trimode.common.errors import TriModeError
from trimode.runtime.request.guided_decoding import GuidedDecodingParams
from trimode.runtime.request.sampling_params import SamplingParams
from trimode.runtime.triton.tensors import OPTIONAL_INPUTS, TEXT_INPUT, Tensor

# TensorRT-LLM's own client sends this parameter with every request to request a stream. TensorRT-LLM's model is not
# decoupled and ignores it.
STREAMING = "Streaming"
# TensorRT-LLM's guide types, and the fields of GuidedDecodingParams that take their guides. "json" has none.
_GUIDES = {"json_schema": "json", "regex": "regex", "ebnf_grammar": "grammar", "structural_tag": "structural_tag"}


class TritonRequest(NamedTuple):
    """``with_input``: the prompt precedes the text. The last four: additional outputs to send."""

    prompt: str
    params: SamplingParams
    streaming: bool
    with_input: bool
    finish_reason: bool
    stop_reason: bool
    cumulative_logprob: bool
    perf_metrics: bool


def stops_another(request: Any) -> bool:
    """Whether ``stop`` is set: the request cancels the running request with the same id."""
    return bool(_values(request).get("stop"))


def read(request: Any, decoupled: bool) -> TritonRequest:
    """Raises TriModeError that names the tensor or the field. decoupled: whether the model may stream."""
    values = _values(request)
    parameters = _parameters(request)
    (prompt,) = _one("text_input", _read(request, TEXT_INPUT))
    streaming = bool(values.get("streaming", decoupled and parameters.get(STREAMING)))
    if streaming and not decoupled:
        raise TriModeError("streaming needs a decoupled model; write the repository with --decoupled")
    with_logprob = bool(values.get("return_cumulative_logprob"))
    fields: dict[str, Any] = {
        tensor.field: values[tensor.name] for tensor in OPTIONAL_INPUTS if tensor.field and tensor.name in values
    }
    for field in ("stop", "bad"):
        if field in fields:
            fields[field] = [text for text in fields[field] if text]
    fields["guided_decoding"] = _guided_decoding(values)
    if with_logprob:
        fields["logprobs"] = 0
    return TritonRequest(
        prompt=prompt,
        params=SamplingParams(**fields),
        streaming=streaming,
        with_input=values.get("sampling_param_exclude_input_from_output") is False,
        finish_reason=bool(values.get("return_finish_reason")),
        stop_reason=bool(values.get("return_stop_reason")),
        cumulative_logprob=with_logprob,
        perf_metrics=bool(values.get("sampling_param_return_perf_metrics")),
    )


def _guided_decoding(values: Mapping[str, Any]) -> GuidedDecodingParams | None:
    """Empty texts stand for tensors that are left out."""
    kind, guide = values.get("guided_decoding_guide_type"), values.get("guided_decoding_guide")
    if not kind:
        if guide:
            raise TriModeError("guided_decoding_guide needs guided_decoding_guide_type")
        return None
    if kind == "json":
        return GuidedDecodingParams(json_object=True)
    if kind not in _GUIDES:
        raise TriModeError(f"guided_decoding_guide_type is {kind!r}; it must be one of json, {', '.join(_GUIDES)}")
    if not guide:
        raise TriModeError(f"guided_decoding_guide_type {kind} needs guided_decoding_guide")
    return GuidedDecodingParams(**{_GUIDES[kind]: guide})


def _parameters(request: Any) -> dict[str, Any]:
    """Triton's HTTP endpoint ``generate`` turns each field that is not an input into a parameter."""
    found: dict[str, Any] = json.loads(request.parameters() or "{}")
    for name in found:
        if name != STREAMING and not name.startswith("triton_"):
            raise TriModeError(f"there is no input {name}; config.pbtxt of this model lists all inputs")
    return found


def _values(request: Any) -> dict[str, Any]:
    """The optional inputs that the request has."""
    found = {}
    for tensor in OPTIONAL_INPUTS:
        values = _read(request, tensor)
        if values is not None:
            if tensor.lacking and any(value not in tensor.neutral for value in values):
                raise TriModeError(f"{tensor.name} is not supported: {tensor.lacking}")
            found[tensor.name] = values if tensor.many else _one(tensor.name, values)[0]
    return found


def _read(request: Any, tensor: Tensor) -> list[Any] | None:
    given = pb_utils.get_input_tensor_by_name(request, tensor.name)
    if given is None:
        return None
    array = given.as_numpy()
    if tensor.dtype == "TYPE_STRING":
        return [_text(tensor.name, value) for value in array.ravel()]
    if tensor.dtype == "TYPE_FP32":
        # The shortest decimal that rounds to this number is what the client wrote: 0.9, not 0.8999999761581421.
        return [float(str(value)) for value in array.ravel().astype(np.float32)]
    return array.ravel().tolist()  # type: ignore[no-any-return]


def _one(name: str, values: list[Any] | None) -> list[Any]:
    if values is None or len(values) != 1:
        raise TriModeError(f"{name} has {len(values or ())} elements; it must have one")
    return values


def _text(name: str, value: bytes | str) -> str:
    try:
        return value if isinstance(value, str) else value.decode()
    except UnicodeDecodeError as error:
        raise TriModeError(f"{name} is not UTF-8 (byte {error.start})") from None
