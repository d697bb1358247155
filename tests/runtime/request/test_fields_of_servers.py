"""Every server offers each field of SamplingParams, or says here that it does not: a new field is nowhere forgotten."""

from __future__ import annotations

import dataclasses

from trimode import SamplingParams
from trimode.runtime.dynamo import annotations
from trimode.runtime.openai_server.request_bodies import ChatCompletionRequest, CompletionRequest
from trimode.runtime.triton.tensors import OPTIONAL_INPUTS

FIELDS = {field.name for field in dataclasses.fields(SamplingParams)}
IN_PYTHON_ONLY = {"logits_processor"}  # a function
OTHER_HTTP_NAMES = {
    "bad": "bad_words",
    "guided_decoding": "structured_outputs",
    "record_drafts": "return_token_origins",
}
NOT_OVER_HTTP = {"bad_token_ids"} | IN_PYTHON_ONLY
# Triton's ensemble builds guided_decoding from two tensors.
OF_TWO_TENSORS = {"guided_decoding"}
NOT_IN_TRITON = {
    *("allowed_token_ids", "bad_token_ids", "logit_bias", "logprobs", "prompt_logprobs", "record_drafts"),
    *IN_PYTHON_ONLY,
}
# Of requests through Dynamo, what the frontend has a field for: test_generate_request.py sends each.
OF_DYNAMOS_FRONTEND = {
    *("max_tokens", "min_tokens", "stop", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens"),
    *("temperature", "top_k", "top_p", "min_p", "seed"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("guided_decoding", "logprobs", "prompt_logprobs"),
}
NOT_THROUGH_DYNAMO = {"n", "record_drafts"} | IN_PYTHON_ONLY


def test_http() -> None:
    names = {OTHER_HTTP_NAMES.get(field, field) for field in FIELDS - NOT_OVER_HTTP}
    assert names - CompletionRequest.model_fields.keys() == set()
    assert names - ChatCompletionRequest.model_fields.keys() == {"prompt_logprobs"}  # refused with a pointer
    assert NOT_OVER_HTTP.isdisjoint(CompletionRequest.model_fields)


def test_triton() -> None:
    assert {tensor.field for tensor in OPTIONAL_INPUTS} - {None} == FIELDS - NOT_IN_TRITON - OF_TWO_TENSORS


def test_dynamo() -> None:
    own = set(annotations.FIELDS)
    assert own | OF_DYNAMOS_FRONTEND == FIELDS - NOT_THROUGH_DYNAMO
    assert own.isdisjoint(OF_DYNAMOS_FRONTEND)
