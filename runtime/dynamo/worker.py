"""A worker over Dynamo's engine interface. Dynamo's own code registers it, reads requests, and handles signals."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from typing import Any, NoReturn

from dynamo.common.backend import EngineConfig, LLMEngine, LlmRegistration, WorkerConfig
from dynamo.common.backend.health_check import build_health_check_payload
from dynamo.common.backend.metrics import register_engine_registry
from dynamo.common.backend.publisher import ComponentSnapshot, PushSource
from dynamo.common.backend.run import run
from dynamo.llm.exceptions import EngineShutdown, InvalidArgument, WorkerUnavailable

from trimode.common.errors import TriModeError
from trimode.runtime.api.engine_metrics import EngineMetrics
from trimode.runtime.api.llm import EngineLLM
from trimode.runtime.api.request_output import RequestOutput
from trimode.runtime.dynamo.block_events import BlockEvents
from trimode.runtime.dynamo.chunks import Chunk, chunk_of
from trimode.runtime.dynamo.generate_request import sampling_params
from trimode.runtime.dynamo.migration import MigrationLinks
from trimode.runtime.dynamo.worker_options import WorkerOptions
from trimode.runtime.kv.prefix_cache import BLOCK
from trimode.runtime.request.errors import QueueFullError, ShutDownError

log = logging.getLogger(__name__)

REPORT_SECONDS = 0.5
ENGINE_DEAD_EXIT = 1


class DynamoWorker(LLMEngine):
    """llm: the engine; its prefix cache's listener is ``events.take``. failure: why the engine has stopped by an error,
    None if it has not.
    """

    def __init__(self, llm: EngineLLM, events: BlockEvents, options: WorkerOptions) -> None:
        self.failure: str | None = None
        self._llm = llm
        self._events = events
        self._options = options
        self._metrics = EngineMetrics(llm)
        self._links = MigrationLinks.of(llm)
        self._answers: dict[str, RequestOutput] = {}  # that run, by the request's id
        self._prompt_tokens = 0  # of finished requests
        self._cached_tokens = 0  # of them, those whose KV rows were reused
        self._snapshots: Any = None
        self._reports: asyncio.Task[None] | None = None

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> NoReturn:
        raise NotImplementedError("trimode dynamo parses the arguments")

    @property
    def card(self) -> str:
        """The folder that the frontend reads the tokenizer and the chat template from."""
        return str((self._llm.folder / "tokenizer").resolve())

    @property
    def total_blocks(self) -> int:
        """Of the KV pool, in blocks of the prefix cache's size."""
        capacity = self._llm.capacity
        return capacity.slots * (capacity.slot_context // BLOCK)

    async def start(self, worker_id: int) -> EngineConfig:
        log.info("worker %d serves %s", worker_id, self._llm.capacity)
        self._reports = asyncio.get_running_loop().create_task(self._report())
        return EngineConfig(
            model=self.card,
            served_model_name=self._options.model_name,
            llm=LlmRegistration(
                context_length=self._llm.capacity.context,
                kv_cache_block_size=BLOCK,
                total_kv_blocks=self.total_blocks,
                max_num_seqs=self._llm.capacity.slots,
                max_num_batched_tokens=self._llm.manifest.limits.prefill_step,
            ),
        )

    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[Chunk, None]:
        try:
            answer, begun = self._begin(request, context.id())
        except QueueFullError as error:
            raise WorkerUnavailable(str(error)) from None
        except ShutDownError as error:
            raise EngineShutdown(str(error)) from None
        except TriModeError as error:
            raise InvalidArgument(str(error)) from None
        link = self._links.link(answer.prompt_token_ids)
        logprobs = (request.get("output_options") or {}).get("logprobs") is not None
        self._answers[context.id()] = answer
        try:
            async for update in answer:
                chunk = chunk_of(update, begun=begun, link=link, logprobs=logprobs)
                if chunk is not None:
                    yield chunk
        except ShutDownError as error:  # the frontend moves the request to another worker
            raise EngineShutdown(str(error)) from None
        except TriModeError as error:
            raise InvalidArgument(str(error)) from None
        finally:
            answer.abort()  # the frontend may have left
            self._answers.pop(context.id(), None)
            self._metrics.observe(answer)
            self._prompt_tokens += len(answer.prompt_token_ids)
            self._cached_tokens += answer.outputs[0].counts.cached_tokens

    def _begin(self, request: Mapping[str, Any], request_id: str) -> tuple[RequestOutput, int]:
        """The running answer, and the number of its tokens that another worker has sent."""
        llm = self._llm
        prompt, begun = self._links.continuation(request)
        params = sampling_params(
            request,
            request_id,
            end_ids=frozenset(llm.manifest.model.eos_token_id),
            top_k=llm.manifest.limits.top_k,
        )
        if params.max_tokens is not None:  # the frontend has subtracted what was sent
            params = dataclasses.replace(params, max_tokens=params.max_tokens + len(begun))
        record = {"prompt_token_ids": prompt, "answer_token_ids": begun}
        return llm.generate_async(record, params, streaming=True), len(begun)

    async def abort(self, context: Any) -> None:
        if (answer := self._answers.get(context.id())) is not None:
            answer.abort()

    async def cleanup(self) -> None:
        if self._reports is not None:
            self._reports.cancel()
            with suppress(asyncio.CancelledError):
                await self._reports
            self._reports = None
        await asyncio.to_thread(self._llm.shutdown)
        await asyncio.to_thread(self._events.stop)

    async def health_check_payload(self) -> dict[str, Any]:
        """A prompt of one end token, and one token for an answer."""
        payload: dict[str, Any] = build_health_check_payload(self._llm.manifest.model.eos_token_id[0])
        return payload

    async def register_prometheus(self, metrics: Any) -> None:
        register_engine_registry(metrics, self._metrics.registry)

    async def kv_event_sources(self) -> list[Any]:
        return [PushSource(on_ready=self._events.publish, dp_rank=0)] if self._options.kv_events else []

    def component_metrics_dp_ranks(self) -> list[int]:
        return [0]

    def attach_snapshot_publisher(self, publisher: Any) -> None:
        self._snapshots = publisher

    def used_blocks(self) -> int:
        """Of the KV pool, by the running answers."""
        return sum(
            -(-(len(answer.prompt_token_ids) + answer.outputs[0].length) // BLOCK) for answer in self._answers.values()
        )

    async def _report(self) -> None:
        """Publish the load at regular intervals. If the engine has stopped, stop this process, so that the frontend
        moves its requests and a supervisor starts it again.
        """
        while True:
            if self._llm.failure is not None:
                self.failure = self._llm.failure
                log.critical("%s", self.failure)
                os.kill(os.getpid(), signal.SIGTERM)
                return
            if self._snapshots is not None:
                self._snapshots.publish(0, self._snapshot())
            await asyncio.sleep(REPORT_SECONDS)

    def _snapshot(self) -> ComponentSnapshot:
        used = self.used_blocks()
        return ComponentSnapshot(
            kv_used_blocks=used,
            kv_total_blocks=self.total_blocks,
            gpu_cache_usage=used / self.total_blocks,
            kv_cache_hit_rate=self._cached_tokens / self._prompt_tokens if self._prompt_tokens else None,
            dp_rank=0,
        )


def serve(llm: EngineLLM, events: BlockEvents, options: WorkerOptions) -> None:
    """Answer requests until SIGTERM or SIGINT. If the engine stops by an error, exit with code 1, so that a supervisor
    restarts the worker.
    """
    worker = DynamoWorker(llm, events, options)
    config = WorkerConfig(
        namespace=options.namespace,
        component=options.component,
        endpoint="generate",
        model_name=worker.card,
        served_model_name=options.model_name,
        discovery_backend=options.discovery,
        request_plane="tcp",
        event_plane="zmq",
        tool_call_parser=options.tool_call_parser,
        reasoning_parser=options.reasoning_parser,
        enable_kv_routing=options.kv_events,
    )

    async def with_parsed_arguments(_argv: list[str] | None) -> tuple[DynamoWorker, WorkerConfig]:
        return worker, config

    run(DynamoWorker, engine_factory=with_parsed_arguments)
    if worker.failure is not None:
        log.critical("the worker exits with code %d: %s", ENGINE_DEAD_EXIT, worker.failure)
        sys.exit(ENGINE_DEAD_EXIT)
