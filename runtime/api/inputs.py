"""Inputs of ``LLM.generate``: token ids of any integer type, and one input against a list of inputs."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from trimode.common.errors import TriModeError

_EXPECTED = "give text, token ids, messages, or a list of these"


def token_id(value: Any) -> int | None:
    """``value`` as an int if it is an integer of Python, numpy or torch (a scalar), else None."""
    if isinstance(value, bool) or getattr(value, "ndim", 0) != 0 or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def is_one(inputs: Any) -> bool:
    """Whether ``inputs`` is one input, not a list of them. Raises TriModeError if it can be neither."""
    if isinstance(inputs, (str, bytes, bytearray, Mapping)):
        return True
    try:
        if len(inputs) == 0:
            return False
        first = inputs[0]
    except (TypeError, LookupError):
        raise TriModeError(f"an input is of type {type(inputs).__name__}; {_EXPECTED}") from None
    return token_id(first) is not None or (isinstance(first, Mapping) and "role" in first)


def items_of(one: Any) -> list[Any]:
    """The token ids or messages of one input. Raises TriModeError for bytes, and for what has no items."""
    if isinstance(one, (bytes, bytearray, memoryview)):
        raise TriModeError("an input is bytes; decode it to text, or give its token ids as a list")
    try:
        return list(one)
    except TypeError:
        raise TriModeError(f"an input is of type {type(one).__name__}; {_EXPECTED}") from None
