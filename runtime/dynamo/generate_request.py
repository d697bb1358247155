"""The parameters of a request of Dynamo's frontend."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from trimode.common.errors import TriModeError
from trimode.runtime.dynamo.annotations import own_fields
from trimode.runtime.request.guided_decoding import GuidedDecodingParams
from trimode.runtime.request.openai_defaults import set_temperature
from trimode.runtime.request.sampling_params import SamplingParams

# Fields of a request that another kind of worker serves, and what they are.
_LACKING = {
    "prompt_embeds": "prompt embeddings",
    "multi_modal_data": "images, audio and video",
    "prefill_result": "disaggregated prefill",
    "encoder_result": "disaggregated encoding",
    "bootstrap_info": "disaggregated prefill",
}
_NEUTRAL_SAMPLING: dict[str, Any] = {"best_of": 1, "use_beam_search": False, "length_penalty": 1.0}
_GUIDES = ("json", "json_object", "regex", "grammar", "choice", "structural_tag")


def sampling_params(
    request: Mapping[str, Any], request_id: str, *, end_ids: frozenset[int], top_k: int
) -> SamplingParams:
    """end_ids: the model's end tokens. top_k: candidates that the engine reports.

    A request without a seed gets one from its id, which is the same on the worker that it migrates to. Raises
    TriModeError for what TriMode lacks, and for values that it refuses.
    """
    for name, what in _LACKING.items():
        if request.get(name):
            raise TriModeError(f"{name}: this worker does not support {what}")
    routing = request.get("routing") or {}
    for name, what in (("lora_name", "LoRA adapters"), ("cache_salt", "separate prefix caches")):
        if routing.get(name):
            raise TriModeError(f"{name}: this worker does not support {what}")
    sampling, ends = request.get("sampling_options") or {}, request.get("stop_conditions") or {}
    wanted = request.get("output_options") or {}
    for name, neutral in _NEUTRAL_SAMPLING.items():
        if sampling.get(name) not in (None, neutral) and not (
            name == "best_of" and sampling[name] == sampling.get("n")
        ):
            raise TriModeError(f"{name} is {sampling[name]!r}; TriMode does not support it")
    if (sampling.get("n") or 1) > 1:
        raise TriModeError(
            f"n is {sampling['n']}; Dynamo ends the stream of a worker at the first answer: send n requests"
        )
    own = own_fields(request.get("annotations") or ())
    fields: dict[str, Any] = {
        "max_tokens": ends.get("max_tokens"),
        "min_tokens": ends.get("min_tokens"),
        "stop": ends.get("stop"),
        "stop_token_ids": _stop_tokens(ends, end_ids),
        "ignore_eos": ends.get("ignore_eos"),
        "max_thinking_tokens": ends.get("max_thinking_tokens"),
        "include_stop_str_in_output": sampling.get("include_stop_str_in_output"),
        "seed": sampling.get("seed"),
        "top_k": _top_k(sampling.get("top_k"), top_k),
        **{
            name: _shortest(sampling.get(name))
            for name in (
                "temperature",
                "top_p",
                "min_p",
                "presence_penalty",
                "frequency_penalty",
                "repetition_penalty",
            )
        },
        "guided_decoding": _guided(sampling.get("guided_decoding")),
        "logprobs": wanted.get("logprobs"),
        "prompt_logprobs": wanted.get("prompt_logprobs"),
        "skip_special_tokens": wanted.get("skip_special_tokens"),
    }
    given = {name: value for name, value in fields.items() if value is not None}
    for name in own.keys() & given.keys():
        raise TriModeError(f"{name} is set by the request and by an annotation; set it once")
    given |= own
    given.setdefault("max_tokens", None)
    set_temperature(given)
    given["seed"] = _seed_of(request_id) if given.get("seed") is None else given["seed"] % 2**64
    return SamplingParams(**given)


def _stop_tokens(ends: Mapping[str, Any], end_ids: frozenset[int]) -> list[int] | None:
    """The frontend lists the model's end tokens among the hidden ones."""
    names = ("stop_token_ids", "stop_token_ids_visible", "stop_token_ids_hidden")
    found = {token for name in names for token in ends.get(name) or ()} - end_ids
    return sorted(found) or None


def _top_k(requested: int | None, reported: int) -> int | None:
    """The engine reports its best candidates; a larger top_k draws from all of them, as 0 and -1 do."""
    if requested is None:
        return None
    return requested if 0 <= requested <= reported else 0


def _shortest(value: float | None) -> float | None:
    """The frontend sends 32-bit numbers. The shortest decimal that rounds to one is what the client wrote."""
    return None if value is None else float(str(np.float32(value)))


def _guided(found: Mapping[str, Any] | None) -> GuidedDecodingParams | None:
    if not found:
        return None
    given = {name: found[name] for name in _GUIDES if found.get(name)}
    return GuidedDecodingParams(**given)


def _seed_of(request_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest(), "little") >> 1
