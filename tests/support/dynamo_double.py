"""The part of Dynamo that a worker uses, without Dynamo: its modules, and a frontend that migrates requests as Dynamo's
does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple


class DynamoError(Exception):
    """Of the double: the base of Dynamo's exceptions."""


class EngineShutdown(DynamoError): ...  # noqa: N818 - Dynamo's name


class InvalidArgument(DynamoError): ...  # noqa: N818


class WorkerUnavailable(DynamoError): ...  # noqa: N818


class LLMEngine: ...


@dataclass
class LlmRegistration:
    context_length: int
    kv_cache_block_size: int
    total_kv_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass
class EngineConfig:
    model: str
    served_model_name: str
    llm: LlmRegistration


@dataclass
class WorkerConfig:
    namespace: str
    component: str
    endpoint: str
    model_name: str
    served_model_name: str
    discovery_backend: str
    request_plane: str
    event_plane: str
    tool_call_parser: str | None
    reasoning_parser: str | None
    enable_kv_routing: bool


class PushSource(NamedTuple):
    on_ready: Any
    dp_rank: int


@dataclass
class ComponentSnapshot:
    kv_used_blocks: int
    kv_total_blocks: int
    gpu_cache_usage: float
    kv_cache_hit_rate: float | None
    dp_rank: int


class Context:
    """Of one request."""

    def __init__(self, name: str) -> None:
        self._name = name

    def id(self) -> str:
        return self._name


class Publisher:
    """Of KV events and of snapshots."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.snapshots: list[ComponentSnapshot] = []

    def publish_stored(self, **event: Any) -> None:
        self.events.append(("stored", event))

    def publish_removed(self, **event: Any) -> None:
        self.events.append(("removed", event))

    def publish(self, dp_rank: int, snapshot: ComponentSnapshot) -> None:
        assert dp_rank == snapshot.dp_rank
        self.snapshots.append(snapshot)


@dataclass
class Frontend:
    """Sends requests to workers. ``chunks``: of the latest request. ``attempts``: the requests sent for it."""

    chunks: list[dict[str, Any]] = field(default_factory=list)
    attempts: list[dict[str, Any]] = field(default_factory=list)

    async def tokens(self, request: dict[str, Any], workers: list[Any], *cuts: int, name: str = "request") -> list[int]:
        """The answer's tokens. The n-th worker dies after ``cuts[n]`` chunks; the request moves to the next one."""
        self.chunks, self.attempts = [], []
        found: list[int] = []
        for number, worker in enumerate(workers):
            self.attempts.append(request)
            cut = cuts[number] if number < len(cuts) else None
            stream: AsyncGenerator[dict[str, Any], None] = worker.generate(request, Context(name))
            received: list[dict[str, Any]] = []
            while cut is None or len(received) < cut:
                chunk = await anext(stream, None)
                if chunk is None:
                    break
                received.append(chunk)
                if chunk.get("finish_reason"):  # Dynamo reads no chunk behind it
                    break
            await stream.aclose()
            self.chunks += received
            tokens = [token for chunk in received for token in chunk["token_ids"]]
            found += tokens
            if received and received[-1].get("finish_reason"):
                break
            request = self._resent(request, tokens, [chunk["worker_trace_link"] for chunk in received])
        return found

    @staticmethod
    def _resent(request: dict[str, Any], tokens: list[int], links: list[dict[str, str]]) -> dict[str, Any]:
        ends = dict(request["stop_conditions"])
        if ends.get("max_tokens") is not None:
            ends["max_tokens"] -= len(tokens)
        link = {"migration_link": links[-1]} if links else {}
        return request | {"token_ids": [*request["token_ids"], *tokens], "stop_conditions": ends} | link


def dynamo_modules(started: list[tuple[Any, WorkerConfig]]) -> dict[str, ModuleType]:
    """For ``sys.modules``. started: receives what ``run`` was called with."""

    def run(_engine_class: type, *, engine_factory: Any) -> None:
        started.append(asyncio.run(engine_factory(None)))

    contents: dict[str, dict[str, Any]] = {
        "dynamo": {},
        "dynamo.common": {},
        "dynamo.common.backend": {
            "LLMEngine": LLMEngine,
            "EngineConfig": EngineConfig,
            "LlmRegistration": LlmRegistration,
            "WorkerConfig": WorkerConfig,
        },
        "dynamo.common.backend.health_check": {
            "build_health_check_payload": lambda token: {
                "token_ids": [token],
                "stop_conditions": {"max_tokens": 1, "ignore_eos": True},
                "sampling_options": {"temperature": 0.0},
                "_HEALTH_CHECK": True,
            }
        },
        "dynamo.common.backend.metrics": {
            "register_engine_registry": lambda metrics, registry: metrics.append(registry)
        },
        "dynamo.common.backend.publisher": {"ComponentSnapshot": ComponentSnapshot, "PushSource": PushSource},
        "dynamo.common.backend.run": {"run": run},
        "dynamo.llm": {},
        "dynamo.llm.exceptions": {
            "EngineShutdown": EngineShutdown,
            "InvalidArgument": InvalidArgument,
            "WorkerUnavailable": WorkerUnavailable,
        },
    }
    return {name: _module(name, attributes) for name, attributes in contents.items()}


def _module(name: str, attributes: dict[str, Any]) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(attributes)
    module.__path__ = []
    return module


def request_of(token_ids: list[int], **options: Any) -> dict[str, Any]:
    """A request as Dynamo's frontend sends it: groups of fields, most of them None."""
    groups = {
        "stop_conditions": ("max_tokens", "stop", "stop_token_ids", "min_tokens", "ignore_eos", "max_thinking_tokens"),
        "sampling_options": (
            *("n", "best_of", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p"),
            *("top_k", "min_p", "use_beam_search", "length_penalty", "seed", "include_stop_str_in_output"),
            "guided_decoding",
        ),
        "output_options": ("logprobs", "prompt_logprobs", "skip_special_tokens"),
    }
    request: dict[str, Any] = {"model": "tiny", "token_ids": token_ids, "routing": {"dp_rank": 0}}
    request["annotations"] = options.pop("annotations", [])
    for group, names in groups.items():
        request[group] = {name: options.pop(name, None) for name in names}
    return request | options
