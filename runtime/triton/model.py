"""The model that Triton's Python backend runs: all requests go to one engine, whose scheduler batches them.

``execute`` returns at once; requests are coroutines of the model's own event loop. The backend could run coroutines
itself, but runs those of a model that is not decoupled one after the other.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import threading
import time
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from trimode.common.errors import TriModeError
from trimode.runtime.api.llm import EngineLLM
from trimode.runtime.api.request_output import RequestOutput
from trimode.runtime.kv.prefix_cache import BLOCK
from trimode.runtime.request.errors import QueueFullError, ShutDownError
from trimode.runtime.triton.engine_metrics import EngineMetrics
from trimode.runtime.triton.triton_request import TritonRequest, read, stops_another

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
# Time between two checks of whether the client has left, or the engine has stopped.
WATCH_SECONDS = 0.05
# Time that running requests have to finish before the model stops; tritonserver exits after 30 s.
DRAIN_SECONDS = 20.0
# Time to send the error of those that did not finish.
LAST_WORDS_SECONDS = 5.0


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        values = {name: value["string_value"] for name, value in config["parameters"].items()}
        self._decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        self._llm = EngineLLM(
            Path(values["engine"]),
            max_batch_size=int(values["max_batch"]),
            max_queue_size=int(values["max_queue"]),
        )
        self._running: dict[str, RequestOutput] = {}
        self._executing: set[Future[None]] = set()
        self._unloading = False
        self._metrics = EngineMetrics(self._llm)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="trimode-requests", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._watch(), self._loop)

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            future = asyncio.run_coroutine_threadsafe(self._execute(request), self._loop)
            self._executing.add(future)
            future.add_done_callback(self._executing.discard)

    def finalize(self) -> None:
        """Finish the running requests; those that need more than DRAIN_SECONDS end with an error."""
        unfinished = wait(set(self._executing), DRAIN_SECONDS).not_done
        self._metrics.stop()
        self._unloading = True
        self._llm.shutdown()
        wait(unfinished, LAST_WORDS_SECONDS)
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _watch(self) -> None:
        """Stop the server if the engine stops by an error, so that a supervisor starts both again. Triton's Python
        backend cannot report a model as not ready.
        """
        while self._llm.failure is None:
            await asyncio.sleep(WATCH_SECONDS)
        if self._unloading:  # a shutdown counts as a failure too
            return
        pb_utils.Logger.log_error(f"the server stops, because its engine has: {self._llm.failure}")
        stop_server()

    async def _execute(self, request: Any) -> None:
        sender = request.get_response_sender()
        try:
            if stops_another(request):
                self._stop(request.request_id())
                sender.send(_cancelled(), FINAL)
            else:
                await self._answer(request, sender)
        except TriModeError as error:
            sender.send(_failure(str(error), _code(error)), FINAL)
        except Exception as error:
            pb_utils.Logger.log_error(f"a request failed: {error!r}")
            sender.send(
                _failure("internal error; the server's log has the reason", pb_utils.TritonError.INTERNAL), FINAL
            )

    async def _answer(self, request: Any, sender: Any) -> None:
        triton_request, arrival = read(request, self._decoupled), time.monotonic_ns()
        output = self._llm.generate_async(triton_request.prompt, triton_request.params, triton_request.streaming)
        name = request.request_id()
        self._running[name] = output
        watch = asyncio.create_task(_abort_when_cancelled(sender, output))
        try:
            if triton_request.streaming:
                async for _ in output:
                    if not output.finished:
                        sender.send(_response(triton_request, output, arrival))
            else:
                await output
        finally:
            watch.cancel()
            self._running.pop(name, None)
        if any(answer.finish_reason == "cancelled" for answer in output.outputs):
            sender.send(_cancelled(), FINAL)
        else:
            sender.send(_response(triton_request, output, arrival), FINAL)

    def _stop(self, name: str) -> None:
        if not name:
            raise TriModeError("stop needs a request id: that of the request to end")
        if name in self._running:
            self._running[name].abort()


async def _cancel_others() -> None:
    """Cancel the event loop's other tasks, and wait until they have ended."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def stop_server() -> None:
    """Stop tritonserver, the parent of the backend's process, as SIGTERM from a supervisor does."""
    os.kill(os.getppid(), signal.SIGTERM)


async def _abort_when_cancelled(sender: Any, output: RequestOutput) -> None:
    while not sender.is_cancelled():
        await asyncio.sleep(WATCH_SECONDS)
    output.abort()


def _response(triton_request: TritonRequest, output: RequestOutput, arrival: int) -> Any:
    """The whole text so far, as TensorRT-LLM's model sends it."""
    answers = output.outputs
    before = triton_request.prompt if triton_request.with_input else ""
    tensors = [_strings("text_output", [before + answer.text for answer in answers])]
    if triton_request.finish_reason:
        tensors.append(_strings("finish_reason", [str(answer.finish_reason) for answer in answers]))
    if triton_request.stop_reason:
        tensors.append(_strings("stop_reason", [str(answer.stop_reason) for answer in answers]))
    if triton_request.cumulative_logprob:
        sums = [answer.cumulative_logprob or 0.0 for answer in answers]
        tensors.append(pb_utils.Tensor("cumulative_logprob", np.array(sums, np.float32)))
    if triton_request.perf_metrics and output.finished:
        tensors += _perf_metrics(output, arrival)
    return pb_utils.InferenceResponse(output_tensors=tensors)


def _perf_metrics(output: RequestOutput, arrival: int) -> list[Any]:
    """Times are on one monotonic clock. Draft counts are sums over all answers. Blocks are the prefix cache's; the KV
    pool does not allocate blocks.
    """
    counts = [answer.counts for answer in output.outputs]
    reused = math.ceil(counts[0].cached_tokens / BLOCK)
    scheduled = min(answer.time_to_slot or 0.0 for answer in output.outputs)
    first = min(answer.time_to_first_token or 0.0 for answer in output.outputs)
    last = max(answer.seconds or 0.0 for answer in output.outputs)
    drafted, accepted = sum(count.drafted for count in counts), sum(count.accepted for count in counts)
    found: dict[str, tuple[float, type[np.generic]]] = {
        "kv_cache_reused_block": (reused, np.int32),
        "kv_cache_missed_block": (math.ceil(len(output.prompt_token_ids) / BLOCK) - reused, np.int32),
        "kv_cache_alloc_new_blocks": (0, np.int32),
        "kv_cache_alloc_total_blocks": (0, np.int32),
        "kv_cache_hit_rate": (counts[0].cached_tokens / len(output.prompt_token_ids), np.float32),
        "arrival_time_ns": (arrival, np.int64),
        "first_scheduled_time_ns": (arrival + round(scheduled * 1e9), np.int64),
        "first_token_time_ns": (arrival + round(first * 1e9), np.int64),
        "last_token_time_ns": (arrival + round(last * 1e9), np.int64),
        "acceptance_rate": (accepted / drafted if drafted else 0.0, np.float32),
        "total_accepted_draft_tokens": (accepted, np.int32),
        "total_draft_tokens": (drafted, np.int32),
    }
    return [pb_utils.Tensor(name, np.array([value], dtype)) for name, (value, dtype) in found.items()]


def _strings(name: str, texts: list[str]) -> Any:
    return pb_utils.Tensor(name, np.array([text.encode() for text in texts], np.object_))


def _cancelled() -> Any:
    """The response of a cancelled request and, as TensorRT-LLM's clients expect, of the request that cancels it."""
    return _failure("the request was cancelled", pb_utils.TritonError.CANCELLED)


def _failure(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def _code(error: TriModeError) -> Any:
    busy = isinstance(error, QueueFullError | ShutDownError)
    return pb_utils.TritonError.UNAVAILABLE if busy else pb_utils.TritonError.INVALID_ARG
