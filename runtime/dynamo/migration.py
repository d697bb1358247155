"""How a request moves to another worker when its worker dies.

Dynamo's frontend sends the request again, with the tokens that the first worker has emitted behind its prompt. It does
not say where the prompt ended, on which penalties, budgets and diffusion's blocks depend. But it returns, as
``migration_link``, the latest ``worker_trace_link`` of the first worker's chunks. That is a field of Dynamo's tracing:
the ids of a span, 16 and 8 bytes in hexadecimal. A worker of TriMode writes the number of prompt tokens there as the
span, and a hash of the prompt and of everything else that the answer depends on as the trace.

Tracing overwrites the link of a stream's first chunk, so every chunk has one. An answer whose first chunk is its only
one then cannot be continued, and is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from trimode.common.errors import TriModeError
from trimode.common.gpus import find_gpus
from trimode.common.machine import instruction_set
from trimode.common.version import __version__
from trimode.runtime.api.llm import EngineLLM

NOT_CONTINUED = (
    "the worker of this request has died, and this worker cannot continue the answer with the same tokens: the first "
    "one had another engine, other options or another machine, or Dynamo's tracing hid where the prompt ends; send the "
    "request again"
)


class Continuation(NamedTuple):
    """prompt: tokens of the client's prompt. begun: those that another worker has emitted; none in a new request."""

    prompt: list[int]
    begun: list[int]


class MigrationLinks:
    """Links of the answers of one worker. identity: the same on workers that continue each other's answers."""

    def __init__(self, identity: bytes) -> None:
        self._identity = identity

    @classmethod
    def of(cls, llm: EngineLLM) -> MigrationLinks:
        """Workers continue each other's answers if they have the same version, engine and defaults, and compute the
        same bits: the CPU's vector extensions choose kernels, and so does the GPU.
        """
        manifest = (llm.folder / "manifest.json").read_bytes()
        options = (llm.capacity.defaults, llm.capacity.context, llm.capacity.slot_context)
        machine = (instruction_set(), [gpu.name for gpu in find_gpus().found])
        identity = manifest + repr((__version__, options, machine)).encode()
        return cls(hashlib.blake2b(identity, digest_size=16).digest())

    def link(self, prompt: list[int]) -> dict[str, str]:
        """For the chunks of an answer to this prompt."""
        tokens = np.array(prompt, np.int64).tobytes()
        digest = hashlib.blake2b(self._identity + tokens, digest_size=16).hexdigest()
        return {"trace_id": digest, "span_id": f"{len(prompt):016x}"}

    def continuation(self, request: Mapping[str, Any]) -> Continuation:
        """Raises TriModeError if the request has migrated and this worker cannot continue its answer."""
        tokens, link = list(request["token_ids"]), request.get("migration_link")
        if link is None:
            return Continuation(tokens, [])
        prompt = tokens[: int(link["span_id"], 16)]
        if link != self.link(prompt):
            raise TriModeError(NOT_CONTINUED)
        return Continuation(prompt, tokens[len(prompt) :])
