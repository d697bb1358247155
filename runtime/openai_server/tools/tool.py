"""The tools of a request, and which of them the answer may or must call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tool:
    """A function. parameters: the JSON schema of its arguments, an object. strict: keywords of the schema that cannot
    be enforced are errors, not ignored.
    """

    name: str
    parameters: Mapping[str, Any]
    strict: bool = False


@dataclass(frozen=True)
class ToolChoice:
    """tools: that may be called. required: the answer is a call. parallel: it may be several calls."""

    tools: Sequence[Tool]
    required: bool = False
    parallel: bool = True
