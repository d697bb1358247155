"""The Python API: ``LLM`` as users of TensorRT-LLM know it, over a scheduler that runs on a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Generator, Iterator, Mapping
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any, NamedTuple, Self, overload

from rich.console import Console
from rich.progress import track

from trimode.common.errors import TriModeError
from trimode.common.progress import Progress, no_progress
from trimode.model.chat_template import Message
from trimode.model.tokenizer import Tokenizer
from trimode.runtime.api.foreign_options import refuse_foreign_options
from trimode.runtime.api.inputs import is_one, items_of, token_id
from trimode.runtime.decoding.acceptance import LONGEST_BLOCK, Acceptance
from trimode.runtime.decoding.ending import Ending
from trimode.runtime.decoding.sequence import Sequence
from trimode.runtime.decoding.text_stream import TextStream
from trimode.runtime.decoding.thinking_budget import ThinkingBudget, ThinkingIds
from trimode.runtime.kv.prefix_cache import PrefixCache
from trimode.runtime.loading import load_engine
from trimode.runtime.request.errors import ContextLengthError, QueueFullError, ShutDownError
from trimode.runtime.request.outputs import CompletionOutput, Update
from trimode.runtime.request.sampling_params import SamplingParams
from trimode.runtime.scheduling.pass_cost import PassCost
from trimode.runtime.scheduling.running_request import Request
from trimode.runtime.scheduling.scheduler import Scheduler, Stats

Input = str | Many[int] | Many[Message] | Mapping[str, Any]
Params = Any  # trimode.runtime.SamplingParams, or tensorrt_llm's, which need not be installed
# What a dict may have beside each kind of input.
_INPUT_OPTIONS: dict[str, frozenset[str]] = {
    "prompt": frozenset(),
    "prompt_token_ids": frozenset({"thinking"}),
    "messages": frozenset(inspect.signature(Tokenizer.chat_prompt).parameters) - {"self", "messages"},
}
DEFAULT_BATCH_SIZE = 16
DEFAULT_PREFIX_CACHE_BYTES = 256 << 20


class _Prompt(NamedTuple):
    """An encoded input. text: None if ids were given. thinking: whether it ends inside a thought; None: not known."""

    text: str | None
    token_ids: list[int]
    thinking: bool | None


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
        self._error: Exception | None = None
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
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.finished:
            left = None if deadline is None else deadline - time.monotonic()
            with self._arrived:
                if not self._arrived.wait_for(self._news, left):
                    raise TimeoutError(f"request {self.request_id} is not finished after {timeout} s")
            self._take_all()
        return self

    def __iter__(self) -> Iterator[Self]:
        while not self.finished:
            with self._arrived:
                self._arrived.wait_for(self._news)
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
        while not self._news():
            self._signal.clear()
            if not self._news():
                await self._signal.wait()

    def _news(self) -> bool:
        return bool(self._updates) or self._error is not None

    def _take_all(self) -> None:
        """What came since the last time, as one update: a slow reader is told more at once, not later. An error is
        raised whenever it is asked for.
        """
        for output in self.outputs:
            output.begin_update()
        while self._updates:
            update = self._updates.popleft()
            if update.error is None:
                self.outputs[update.index].apply(update)
            else:
                self._error = update.error
        if self._error is not None:
            raise self._error

    def _put(self, update: Update) -> None:
        """Called on the scheduler's thread."""
        with self._arrived:
            self._updates.append(update)
            self._arrived.notify()
        if self._loop is not None and self._signal is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody awaits
                self._loop.call_soon_threadsafe(self._signal.set)


class LLM:
    """An engine directory that answers many requests at once, each in its own mode.

    model: the engine directory. threads: of the cpu target. max_batch_size: sequences that run at once, 16 unless told
    or what the engine was built for if that is less.
    max_queue_size: answers that may wait beyond those. kv_cache_bytes: that the KV pool may grow to, half of the free
    memory unless told. prefix_cache_bytes: for KV rows of earlier prompts and answers; 0 reuses nothing.
    update_seconds: between a stream's updates at least; 0 tells every cycle's tokens at once. An end never waits.
    measure_passes: learn now, in half a second, what passes cost, for ``auto`` to choose by; else it begins with a
    guess.

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
        measure_passes: bool = True,
        verify: bool = True,
        progress: Progress = no_progress,
        **foreign: Any,
    ) -> None:
        refuse_foreign_options(foreign)
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
        self.folder = Path(model)
        self.manifest = engine.manifest
        self.tokenizer = engine.tokenizer
        self._executor = engine.executor
        limits = self.manifest.limits
        if max_batch_size is None:
            max_batch_size = min(DEFAULT_BATCH_SIZE, limits.max_batch or DEFAULT_BATCH_SIZE)
        if limits.max_batch is not None and max_batch_size > limits.max_batch:
            raise TriModeError(
                f"max_batch_size is {max_batch_size}, but the engine was built for batches of {limits.max_batch}"
            )
        largest_step = max(limits.prefill_step, LONGEST_BLOCK)
        if limits.max_step is not None:
            largest_step = min(largest_step, limits.max_step)
        self._scheduler = Scheduler(
            engine.executor,
            max_batch=max_batch_size,
            capacity=limits.capacity,
            prefill_tokens=limits.prefill_step,
            cost=PassCost(max_batch_size, largest_step),
            prefix_cache=PrefixCache(prefix_cache_bytes) if prefix_cache_bytes else None,
        )
        if measure_passes:
            self._scheduler.measure_passes()
        self._shared_acceptance = Acceptance()
        self._max_batch_size = max_batch_size
        self._most_answers = max_batch_size + max_queue_size
        self._answers = 0  # that run or wait
        self._update_seconds = update_seconds
        self._ids = itertools.count(1)
        self._submitted: deque[Request] = deque()
        self._changed = threading.Condition()  # what was submitted, how much there is to do, or whether to go on
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="trimode-scheduler", daemon=True)
        self._thread.start()

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is a sequence of texts to the type checker
        self,
        inputs: Input,
        sampling_params: Params | None = ...,
        use_tqdm: bool = ...,
        enable_thinking: bool | None = ...,
    ) -> RequestOutput: ...

    @overload
    def generate(
        self,
        inputs: Many[Input],
        sampling_params: Params | Many[Params] | None = ...,
        use_tqdm: bool = ...,
        enable_thinking: bool | None = ...,
    ) -> list[RequestOutput]: ...

    def generate(
        self,
        inputs: Input | Many[Input],
        sampling_params: Params | Many[Params] | None = None,
        use_tqdm: bool = True,
        enable_thinking: bool | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Answer one input or many, and wait for all.

        inputs: a text, token ids, a chat's messages, or one of these as a dict: ``{"prompt": text}``,
        ``{"prompt_token_ids": ids}``, ``{"messages": messages}``; or a list of such. Beside ``messages`` a dict may
        have the options of :meth:`Tokenizer.chat_prompt`, such as ``tools`` and ``chat_template_kwargs``. Beside
        ``prompt_token_ids`` it may have ``thinking``: whether they end inside a thought; by default they do if their
        last mark is ``<think>``. sampling_params: for all, or one for each. use_tqdm: show a progress bar on a
        terminal. enable_thinking: whether the chat template opens a thought; None leaves it to the template. Requests
        beyond the queue's size wait their turn.
        """
        alone = is_one(inputs)
        asked: list[Any] = [inputs] if alone else list(inputs)
        params = sampling_params if isinstance(sampling_params, Many) else [sampling_params] * len(asked)
        if len(params) != len(asked):
            raise TriModeError(f"sampling_params has {len(params)} entries for {len(asked)} inputs")
        outputs: list[RequestOutput] = []
        try:
            for one, its_params in zip(asked, params, strict=True):
                output, request = self._prepare(one, its_params, enable_thinking, streaming=False)
                self._submit(request, wait=True)
                outputs.append(output)
            show = use_tqdm and not alone  # a bar has a thread of its own, which one short answer would wait for
            for output in (
                track(outputs, "Answering", console=Console(stderr=True), transient=True) if show else outputs
            ):
                output.result()
        except BaseException:
            for output in outputs:
                output.abort()
            raise
        return outputs[0] if alone else outputs

    def generate_async(
        self,
        inputs: Input,
        sampling_params: Params | None = None,
        streaming: bool = False,
        enable_thinking: bool | None = None,
    ) -> RequestOutput:
        """Begin to answer one input; returns at once. streaming: give updates as tokens come, not one at the end.

        Raises TriModeError, ContextLengthError if prompt and max_tokens exceed the capacity, QueueFullError if too many
        wait, ShutDownError after :meth:`shutdown`.
        """
        output, request = self._prepare(inputs, sampling_params, enable_thinking, streaming)
        self._submit(request, wait=False)
        return output

    def _prepare(
        self, inputs: Any, params: Any, enable_thinking: bool | None, streaming: bool
    ) -> tuple[RequestOutput, Request]:
        """A request and where its answers will come; refused if it cannot be answered at all."""
        params = SamplingParams() if params is None else SamplingParams.of(params)
        prompt = self._encode(inputs, enable_thinking)
        self._refuse(prompt.token_ids, params)
        output = RequestOutput(next(self._ids), prompt.text, prompt.token_ids, params.n)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        requests = [
            self._request(output, index, seed + index, params, prompt.thinking, streaming) for index in range(params.n)
        ]
        requests[0].siblings = requests[1:]
        output._requests = requests
        return output, requests[0]

    def _submit(self, request: Request, wait: bool) -> None:
        answers = 1 + len(request.siblings)

        def there_is_room() -> bool:
            return self._answers + answers <= self._most_answers

        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._closing or there_is_room())
            if self._closing:
                raise ShutDownError("the engine was shut down")
            if not there_is_room():
                waiting = max(0, self._answers - self._max_batch_size)
                raise QueueFullError(f"{waiting} answers wait already; try again later")
            self._answers += answers
            self._submitted.append(request)
            self._changed.notify_all()

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

    def _encode(self, inputs: Any, enable_thinking: bool | None) -> _Prompt:
        options: dict[str, Any] = {}
        if isinstance(inputs, Mapping):
            inputs, options = _input_and_options(inputs)
        if isinstance(inputs, str):
            return _Prompt(inputs, self.tokenizer.encode(inputs, add_special_tokens=True), None)
        items = items_of(inputs)
        if items and all(isinstance(item, dict) for item in items):
            chat = self.tokenizer.chat_prompt(items, **{"enable_thinking": enable_thinking} | options)
            return _Prompt(chat.text, self.tokenizer.encode(chat.text), chat.thinking)
        prompt = [self._known_token("prompt token", item) for item in items]
        return _Prompt(None, prompt, options.get("thinking"))

    def _known_token(self, what: str, token: Any) -> int:
        """The token's id. Raises TriModeError if it is not one of the vocabulary."""
        vocabulary, number = self.manifest.model.vocab_size, token_id(token)
        if number is None or not 0 <= number < vocabulary:
            raise TriModeError(f"{what} {token!r} is outside the model's vocabulary of {vocabulary}")
        return number

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
        rows = min(params.kv_rows(len(prompt)), limits.capacity)
        if not self._executor.pool.fits(rows):
            raise ContextLengthError(
                f"the KV rows of {rows} tokens exceed kv_cache_bytes; allow more, or ask for fewer tokens"
            )
        if limits.max_step is not None and params.longest_block > limits.max_step:
            raise TriModeError(
                f"block_length is {params.longest_block}, but the engine was built for steps of {limits.max_step}; "
                "lower it, or build with a larger --max-step"
            )
        if params.n > self._most_answers:
            raise TriModeError(
                f"n is {params.n}, but at most {self._most_answers} answers may run or wait; lower it, or raise "
                "max_queue_size"
            )
        if params.adapter and self.manifest.adapter is None:
            raise TriModeError("adapter is True, but the engine has no draft adapter; leave it out")
        for token in params.stop_token_ids or ():
            self._known_token("stop token", token)
        for stop in params.stop_strings if params.skip_special_tokens else ():
            for special in self.tokenizer.special_tokens:
                if special in stop and special != stop:
                    raise TriModeError(
                        f"stop {stop!r} has the special token {special} in it, which is left out of the text; give "
                        "skip_special_tokens=False, or the token alone"
                    )
        for field in ("top_k", "logprobs"):
            if (getattr(params, field) or 0) > limits.top_k:
                raise TriModeError(
                    f"{field} is {getattr(params, field)}, but the engine reports {limits.top_k} candidates a row; "
                    "lower it, or build with a larger --top-k"
                )

    def _request(
        self,
        output: RequestOutput,
        index: int,
        seed: int,
        params: SamplingParams,
        thinking: bool | None,
        streaming: bool,
    ) -> Request:
        prompt, model = output.prompt_token_ids, self.manifest.model
        # A special token is no part of the text, so a string that spells one is found by its id.
        special = self.tokenizer.special_tokens if params.skip_special_tokens else {}
        stops = tuple(stop for stop in params.stop_strings if stop not in special)
        text = TextStream(self.tokenizer, stops, params.include_stop_str_in_output, params.skip_special_tokens)
        budget = params.max_thinking_tokens
        ending = Ending(
            params,
            frozenset(model.eos_token_id),
            {special[stop]: stop for stop in params.stop_strings if stop in special},
            text if stops else None,
            None if budget is None else ThinkingBudget(budget, ThinkingIds.of(self.tokenizer), prompt, thinking),
        )
        sequence = Sequence(
            prompt,
            params,
            ending,
            Acceptance(self._shared_acceptance),
            context=self.manifest.limits.capacity,
            mask_id=model.mask_token_id,
            prefill_step=self.manifest.limits.prefill_step,
            seed=seed % 2**64,
        )
        update_seconds = self._update_seconds if streaming else None

        def hear(update: Update) -> None:
            output._put(update)
            if update.finish_reason is not None or update.error is not None:
                with self._changed:
                    self._answers -= 1
                    self._changed.notify_all()

        return Request(sequence, text, hear, index=index, update_seconds=update_seconds)

    def _run(self) -> None:
        """The scheduler's thread. However it ends, nobody waits for ever."""
        try:
            self._run_steps()
        finally:
            with self._changed:
                self._closing = True
                self._scheduler.waiting.extend(self._submitted)
                self._submitted.clear()
                self._changed.notify_all()
            self._scheduler.fail(ShutDownError("the engine was shut down before the request was finished"))

    def _run_steps(self) -> None:
        scheduler = self._scheduler
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._submitted or self._closing or scheduler.busy)
                scheduler.waiting.extend(self._submitted)
                self._submitted.clear()
                if self._closing:
                    return
            try:
                scheduler.step()
            except Exception as error:  # the engine failed under these requests; others may fare better
                scheduler.fail(error)


def _input_and_options(record: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    kind = next((name for name in _INPUT_OPTIONS if name in record), None)
    if kind is None or record.keys() - _INPUT_OPTIONS[kind] != {kind}:
        found = ", ".join(map(repr, record))
        raise TriModeError(f"an input has {found}; give 'prompt', 'prompt_token_ids' or 'messages', and its options")
    return record[kind], {name: value for name, value in record.items() if name != kind}


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
