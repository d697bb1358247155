"""TriMode's own request fields. Dynamo's frontend refuses fields that it does not know, but passes annotations on:
``"nvext": {"annotations": ["trimode.mode=ar", "trimode.block_length=16"]}``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from trimode.common.errors import TriModeError

PREFIX = "trimode."
# Fields of SamplingParams that the frontend has no field for, or accepts and drops.
FIELDS = (
    "mode",
    "block_length",
    "adapter",
    "draft_threshold",
    "lookup",
    "tree_width",
    "denoising",
    "threshold",
    "denoising_steps",
    "denoising_top_n",
    "max_thinking_tokens",
    "allowed_token_ids",
    "bad_token_ids",
    "bad",
    "logit_bias",
    "stop_token_ids",
)


def own_fields(annotations: Iterable[str]) -> dict[str, Any]:
    """The fields of SamplingParams that these annotations set; other annotations are the frontend's.

    A value is JSON, or text if it is not. Raises TriModeError for a name that is not a field, and for a repeated one.
    """
    found: dict[str, Any] = {}
    for annotation in annotations:
        if not annotation.startswith(PREFIX):
            continue
        name, given, text = annotation.removeprefix(PREFIX).partition("=")
        if name not in FIELDS or not given:
            raise TriModeError(
                f"annotation {annotation!r}: write {PREFIX}FIELD=VALUE, where FIELD is one of {', '.join(FIELDS)}"
            )
        if name in found:
            raise TriModeError(f"annotation {annotation!r}: {name} is set twice")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    if isinstance(biases := found.get("logit_bias"), dict):
        found["logit_bias"] = {int(token) if token.isdecimal() else token: bias for token, bias in biases.items()}
    return found
