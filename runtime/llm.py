"""The Python API: ``LLM`` as users of TensorRT-LLM know it, over a scheduler that runs on a thread of its own."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import threading
from collections import deque
from collections.abc import AsyncIterator, Generator, Iterator
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any, Self, overload

from rich.progress import track

from trimode.model.errors import TriModeError
from trimode.model.progress import Progress, no_progress
from trimode.model.tokenizer import Message
from trimode.runtime.acceptance import LONGEST_BLOCK, Acceptance
from trimode.runtime.decoding import Sequence
from trimode.runtime.ending import Ending
from trimode.runtime.engine import load_engine
from trimode.runtime.errors import ContextLengthError, QueueFullError, ShutDownError
from trimode.runtime.outputs import CompletionOutput, Update
from trimode.runtime.pass_cost import PassCost
from trimode.runtime.prefix_cache import PrefixCache
from trimode.runtime.request import Request
from trimode.runtime.sampling_params import SamplingParams
from trimode.runtime.scheduler import Scheduler, Stats
from trimode.runtime.text_stream import TextStream
from trimode.runtime.thinking_budget import ThinkingBudget, ThinkingIds

Input = str | Many[int] | Many[Message]
Params = Any  # trimode.runtime.SamplingParams, or tensorrt_llm's, which need not be installed
DEFAULT_BATCH_SIZE = 16
DEFAULT_PREFIX_CACHE_BYTES = 256 << 20


class RequestOutput:
    """A prompt's answers, ready or on their way. ``await`` it or call :meth:`result`; iterate it, with ``async for`` or
    ``for``, to see each update.

    prompt: the text, None if token ids were given. outputs: ``n`` answers, as far as the caller has taken updates; a
    ``*_diff`` of theirs is what the latest update brought: all that came since the one before. Taken by one caller,
    from any thread.
    """

    def __init__(self, request_id: int, prompt: str | None, prompt_token_ids: list[int], answers: int) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.outputs = [CompletionOutput(index) for index in range(answers)]
        self._requests: list[Request] = []
        self._updates: deque[Update] = deque()
        self._arrived = threading.Condition()
        try:
            self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
            self._signal: asyncio.Event | None = asyncio.Event()
        except RuntimeError:
            self._loop = self._signal = None

    @property
    def finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)

    def abort(self) -> None:
        """End the request; its slot is free within one cycle, and its answers' finish_reason is ``cancelled``."""
        for request in self._requests:
            request.aborted = True

    def result(self, timeout: float | None = None) -> Self:
        """Wait until it is finished; raises TimeoutError after ``timeout`` seconds, or the engine's error."""
        while not self.finished:
            with self._arrived:
                if not self._arrived.wait_for(lambda: self._updates, timeout):
                    raise TimeoutError(f"request {self.request_id} is not finished after {timeout} s")
            self._take_all()
        return self

    def __iter__(self) -> Iterator[Self]:
        while not self.finished:
            with self._arrived:
                self._arrived.wait_for(lambda: self._updates)
            self._take_all()
            yield self

    def __await__(self) -> Generator[Any, None, Self]:
        return self._finish().__await__()

    async def __aiter__(self) -> AsyncIterator[Self]:
        while not self.finished:
            await self._wait()
            self._take_all()
            yield self

    async def _finish(self) -> Self:
        while not self.finished:
            await self._wait()
            self._take_all()
        return self

    async def _wait(self) -> None:
        if self._loop is not asyncio.get_running_loop() or self._signal is None:
            raise RuntimeError("await a RequestOutput in the event loop in which it was made, or call result()")
        while not self._updates:
            self._signal.clear()
            if not self._updates:
                await self._signal.wait()

    def _take_all(self) -> None:
        """What came since the last time, as one update: a slow reader is told more at once, not later."""
        for output in self.outputs:
            output.begin_update()
        while self._updates:
            update = self._updates.popleft()
            if update.error is not None:
                raise update.error
            self.outputs[update.index].apply(update)

    def _put(self, update: Update) -> None:
        """Called on the scheduler's thread."""
        with self._arrived:
            self._updates.append(update)
            self._arrived.notify()
        if self._loop is not None and self._signal is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._signal.set)


class LLM:
    """An engine directory that answers many requests at once, each in its own mode.

    model: the engine directory. threads: of the cpu target. max_batch_size: sequences that run at once, 16 unless told
    or what the engine was built for if that is less.
    max_queue_size: requests that may wait beyond those. kv_cache_bytes: that the KV pool may grow to, half of the free
    memory unless told. prefix_cache_bytes: for KV rows of earlier prompts and answers; 0 reuses nothing.
    update_seconds: between a stream's updates at least; 0 tells every cycle's tokens at once. An end never waits.

    Usable from many threads and event loops. Raises TriModeError if the directory is not a sound engine.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        threads: int | None = None,
        max_batch_size: int | None = None,
        max_queue_size: int = 1024,
        kv_cache_bytes: int | None = None,
        prefix_cache_bytes: int = DEFAULT_PREFIX_CACHE_BYTES,
        update_seconds: float = 0.0,
        verify: bool = True,
        progress: Progress = no_progress,
    ) -> None:
        for name, value, least in (
            ("max_batch_size", max_batch_size, 1),
            ("max_queue_size", max_queue_size, 1),
            ("kv_cache_bytes", kv_cache_bytes, 1),
            ("prefix_cache_bytes", prefix_cache_bytes, 0),
            ("update_seconds", update_seconds, 0),
        ):
            if value is not None and value < least:
                raise TriModeError(f"{name} is {value}; it must be at least {least}")
        limit = _free_memory() // 2 if kv_cache_bytes is None else kv_cache_bytes
        engine = load_engine(Path(model), threads=threads, kv_cache_bytes=limit, verify=verify, progress=progress)
        self.manifest = engine.manifest
        self.tokenizer = engine.tokenizer
        self._executor = engine.executor
        limits, built_for = self.manifest.limits, self.manifest.rtx
        if max_batch_size is None:
            max_batch_size = min(DEFAULT_BATCH_SIZE, built_for.max_batch if built_for else DEFAULT_BATCH_SIZE)
        if built_for is not None and max_batch_size > built_for.max_batch:
            raise TriModeError(
                f"max_batch_size is {max_batch_size}, but the engine was built for batches of {built_for.max_batch}"
            )
        largest_step = max(limits.prefill_step, LONGEST_BLOCK)
        if built_for is not None:
            largest_step = min(largest_step, built_for.max_step)
        self._scheduler = Scheduler(
            engine.executor,
            max_batch=max_batch_size,
            capacity=limits.capacity,
            prefill_tokens=limits.prefill_step,
            cost=PassCost(max_batch_size, largest_step),
            prefix_cache=PrefixCache(prefix_cache_bytes) if prefix_cache_bytes else None,
        )
        self._shared_acceptance = Acceptance()
        self._max_queue_size = max_queue_size
        self._update_seconds = update_seconds
        self._ids = itertools.count(1)
        self._submitted: deque[Request] = deque()
        self._changed = threading.Condition()  # what waits, or whether to go on
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="trimode-scheduler", daemon=True)
        self._thread.start()

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is a sequence of texts to the type checker
        self, inputs: Input, sampling_params: Params | None = ..., use_tqdm: bool = ...
    ) -> RequestOutput: ...

    @overload
    def generate(
        self, inputs: Many[Input], sampling_params: Params | Many[Params] | None = ..., use_tqdm: bool = ...
    ) -> list[RequestOutput]: ...

    def generate(
        self,
        inputs: Input | Many[Input],
        sampling_params: Params | Many[Params] | None = None,
        use_tqdm: bool = True,
    ) -> RequestOutput | list[RequestOutput]:
        """Answer one input or many, and wait for all.

        inputs: a text, token ids, or a chat's messages; or a list of such. sampling_params: for all, or one for each.
        use_tqdm: show a progress bar on a terminal. Requests beyond the queue's size wait their turn.
        """
        alone = _is_one(inputs)
        asked: Many[Any] = [inputs] if alone else inputs
        params = sampling_params if isinstance(sampling_params, Many) else [sampling_params] * len(asked)
        if len(params) != len(asked):
            raise TriModeError(f"sampling_params has {len(params)} entries for {len(asked)} inputs")
        outputs: list[RequestOutput] = []
        try:
            for one, its_params in zip(asked, params, strict=True):
                output, request = self._prepare(one, its_params, streaming=False)
                self._submit(request, wait=True)
                outputs.append(output)
            show = use_tqdm and not alone  # a bar has a thread of its own, which one short answer would wait for
            for output in track(outputs, "Answering", transient=True) if show else outputs:
                output.result()
        except BaseException:
            for output in outputs:
                output.abort()
            raise
        return outputs[0] if alone else outputs

    def generate_async(
        self, inputs: Input, sampling_params: Params | None = None, streaming: bool = False
    ) -> RequestOutput:
        """Begin to answer one input; returns at once. streaming: give updates as tokens come, not one at the end.

        Raises TriModeError, ContextLengthError if prompt and max_tokens exceed the capacity, QueueFullError if too many
        wait, ShutDownError after :meth:`shutdown`.
        """
        output, request = self._prepare(inputs, sampling_params, streaming)
        self._submit(request, wait=False)
        return output

    def _prepare(self, inputs: Any, params: Any, streaming: bool) -> tuple[RequestOutput, Request]:
        """A request and where its answers will come; refused if it cannot be answered at all."""
        params = SamplingParams() if params is None else SamplingParams.of(params)
        text, prompt = self._encode(inputs)
        self._refuse(prompt, params)
        output = RequestOutput(next(self._ids), text, prompt, params.n)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        requests = [self._request(output, index, seed + index, params, streaming) for index in range(params.n)]
        requests[0].siblings = requests[1:]
        output._requests = requests
        return output, requests[0]

    def _submit(self, request: Request, wait: bool) -> None:
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._closing or self._waiting < self._max_queue_size)
            if self._closing:
                raise ShutDownError("the engine was shut down")
            if self._waiting >= self._max_queue_size:
                raise QueueFullError(f"{self._waiting} requests wait already; try again later")
            self._submitted.append(request)
            self._changed.notify_all()

    @property
    def _waiting(self) -> int:
        return len(self._submitted) + len(self._scheduler.waiting)

    def stats(self) -> Stats:
        return self._scheduler.stats()

    def shutdown(self) -> None:
        """Finish the current cycle and end the requests that are not done with ShutDownError."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _encode(self, inputs: Any) -> tuple[str | None, list[int]]:
        if isinstance(inputs, str):
            return inputs, self.tokenizer.encode(inputs)
        items = list(inputs)
        if items and all(isinstance(item, dict) for item in items):
            text = self.tokenizer.apply_chat_template(items)
            return text, self.tokenizer.encode(text)
        vocabulary = self.manifest.model.vocab_size
        for token in items:
            if not isinstance(token, int) or not 0 <= token < vocabulary:
                raise TriModeError(f"prompt token {token!r} is outside the model's vocabulary of {vocabulary}")
        return None, items

    def _refuse(self, prompt: list[int], params: SamplingParams) -> None:
        limits = self.manifest.limits
        if not prompt:
            raise TriModeError("the prompt is empty; give at least one token")
        longest = len(prompt) + params.max_tokens
        if longest > limits.capacity:
            raise ContextLengthError(
                f"the prompt has {len(prompt)} tokens; with max_tokens {params.max_tokens} that exceeds the engine's "
                f"capacity of {limits.capacity}; shorten the prompt or lower max_tokens"
            )
        if not self._executor.pool.holds(1, longest):
            raise ContextLengthError(
                f"the KV rows of {longest} tokens exceed kv_cache_bytes; allow more, or ask for fewer tokens"
            )
        built_for = self.manifest.rtx
        if built_for is not None and params.longest_block > built_for.max_step:
            raise TriModeError(
                f"block_length is {params.longest_block}, but the engine was built for steps of {built_for.max_step}; "
                "lower it, or build with a larger --max-step"
            )
        for field in ("top_k", "logprobs"):
            if (getattr(params, field) or 0) > limits.top_k:
                raise TriModeError(
                    f"{field} is {getattr(params, field)}, but the engine reports {limits.top_k} candidates a row; "
                    "lower it, or build with a larger --top-k"
                )

    def _request(
        self, output: RequestOutput, index: int, seed: int, params: SamplingParams, streaming: bool
    ) -> Request:
        prompt, model = output.prompt_token_ids, self.manifest.model
        stops = params.stop_strings
        text = TextStream(self.tokenizer, stops, params.include_stop_str_in_output, params.skip_special_tokens)
        budget = params.max_thinking_tokens
        ending = Ending(
            params,
            frozenset(model.eos_token_id),
            text if stops else None,
            None if budget is None else ThinkingBudget(budget, ThinkingIds.of(self.tokenizer), prompt),
        )
        sequence = Sequence(
            prompt,
            params,
            ending,
            Acceptance(self._shared_acceptance),
            mask_id=model.mask_token_id,
            prefill_step=self.manifest.limits.prefill_step,
            seed=seed % 2**64,
        )
        update_seconds = self._update_seconds if streaming else None
        return Request(sequence, text, output._put, index=index, update_seconds=update_seconds)

    def _run(self) -> None:
        """The scheduler's thread."""
        scheduler = self._scheduler
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._submitted or self._closing or scheduler.busy)
                scheduler.waiting.extend(self._submitted)
                self._submitted.clear()
                if self._closing:
                    break
            try:
                scheduler.step()
            except Exception as error:  # the engine failed under these requests; others may fare better
                scheduler.fail(error)
            with self._changed:
                self._changed.notify_all()
        scheduler.fail(ShutDownError("the engine was shut down before the request was finished"))


def _is_one(inputs: Any) -> bool:
    """Whether this is one input: a text, token ids, or a chat's messages."""
    return isinstance(inputs, str) or (len(inputs) > 0 and isinstance(inputs[0], (int, dict)))


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
