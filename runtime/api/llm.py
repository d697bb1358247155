"""The Python API over an engine directory. ``trimode.LLM`` adds checkpoints and hub ids."""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any, Self, overload

from rich.console import Console
from rich.progress import track

from trimode.common.errors import TriModeError
from trimode.common.progress import Progress, no_progress
from trimode.runtime.api.batch_size import batch_size_of
from trimode.runtime.api.capacity import Capacity, Defaults
from trimode.runtime.api.foreign_options import refuse_foreign_options
from trimode.runtime.api.inputs import Input, InputEncoder, is_one_input
from trimode.runtime.api.request_factory import RequestFactory
from trimode.runtime.api.request_output import RequestOutput
from trimode.runtime.api.scheduler_thread import SchedulerThread
from trimode.runtime.decoding.acceptance_rates import LONGEST_BLOCK
from trimode.runtime.executor import Executor, ExecutorLostError, OwningExecutor
from trimode.runtime.grammar.compiler import GrammarCompiler
from trimode.runtime.kv.prefix_cache import BlockListener, PrefixCache
from trimode.runtime.loading import load_engine
from trimode.runtime.request.errors import EngineDeadError
from trimode.runtime.request.guided_decoding import GuidedDecodingParams
from trimode.runtime.request.outputs import Update
from trimode.runtime.request.sampling_params import Mode, SamplingParams
from trimode.runtime.scheduling.pass_cost import EngineName, PassCost
from trimode.runtime.scheduling.running_request import Request
from trimode.runtime.scheduling.scheduler import Scheduler, Stats

Params = Any  # trimode.SamplingParams, or tensorrt_llm's, which need not be installed
DEFAULT_PREFIX_CACHE_BYTES = 256 << 20

log = logging.getLogger(__name__)


class EngineLLM:
    """A loaded engine directory that answers many requests at once, each in its own mode.

    model: the engine directory. threads: of a pass on target cpu; by default, the CPUs that this process may use.
    max_batch_size: answers that run at once; by default 16, or what the engine was built for if that is less.
    max_queue_size: answers that may wait beyond those. max_seq_len: the longest prompt and answer together, in tokens;
    by default the engine's capacity. kv_cache_bytes: the most memory of the KV pool; by default most of the memory that
    is available. prefix_cache_bytes: memory for KV rows of earlier prompts and answers; 0 reuses none.
    prefix_cache_listener: called for each block of them that is stored or removed, on the scheduler's thread.
    mode, block_length, enable_thinking: for requests that do not set them; an enable_thinking of None leaves it to the
    chat template. update_seconds: the least time between two updates of a stream; 0 sends every step's tokens.
    measure_passes: spend half a second, on a GPU a second, on measuring what passes cost, for mode ``auto``; otherwise
    it learns that from the passes of requests.

    Usable from many threads and event loops of the process that loaded it. Logs its :attr:`capacity`. Raises
    TriModeError if the directory is not a valid engine.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        threads: int | None = None,
        max_batch_size: int | None = None,
        max_queue_size: int = 1024,
        max_seq_len: int | None = None,
        kv_cache_bytes: int | None = None,
        prefix_cache_bytes: int = DEFAULT_PREFIX_CACHE_BYTES,
        prefix_cache_listener: BlockListener | None = None,
        mode: Mode = "auto",
        block_length: int | None = None,
        enable_thinking: bool | None = None,
        update_seconds: float = 0.0,
        measure_passes: bool = True,
        verify: bool = True,
        progress: Progress = no_progress,
        **foreign: Any,
    ) -> None:
        refuse_foreign_options(foreign)
        for name, value, least in (
            ("threads", threads, 1),
            ("max_batch_size", max_batch_size, 1),
            ("max_queue_size", max_queue_size, 1),
            ("max_seq_len", max_seq_len, 2),
            ("kv_cache_bytes", kv_cache_bytes, 1),
            ("prefix_cache_bytes", prefix_cache_bytes, 0),
            ("update_seconds", update_seconds, 0),
        ):
            if value is not None and value < least:
                raise TriModeError(f"{name} is {value}; it must be at least {least}")
        SamplingParams(mode=mode, block_length=None if mode == "ar" else block_length)  # raises if they are not valid
        engine = load_engine(
            Path(model), threads=threads, kv_cache_bytes=kv_cache_bytes, verify=verify, progress=progress
        )
        self.folder = Path(model)
        self.manifest = engine.manifest
        self.tokenizer = engine.tokenizer
        self._executor = engine.executor
        limits = self.manifest.limits
        if max_seq_len is not None and max_seq_len > limits.capacity:
            raise TriModeError(
                f"max_seq_len is {max_seq_len}, but the engine was built for {limits.capacity} tokens; lower it"
            )
        max_batch_size = batch_size_of(limits, max_batch_size)
        largest_step = max(limits.prefill_step, LONGEST_BLOCK)
        if limits.max_step is not None:
            largest_step = min(largest_step, limits.max_step)
        self.capacity = Capacity.of(
            engine.executor.pool,
            model=self.manifest.source,
            target=self.manifest.target.name,
            built_context=limits.capacity,
            max_seq_len=max_seq_len,
            slots=max_batch_size,
            prefix_cache_bytes=prefix_cache_bytes,
            threads=engine.executor.threads,
            defaults=Defaults(mode, block_length, enable_thinking),
        )
        self._encoder = InputEncoder(self.tokenizer, self.manifest.model.vocab_size)
        self._grammars = GrammarCompiler(
            self.tokenizer, self.manifest.model.vocab_size, self.manifest.model.eos_token_id
        )
        self._factory = RequestFactory(
            self.manifest,
            self.tokenizer,
            self._encoder,
            self.capacity,
            self._grammars,
            max_answers=max_batch_size + max_queue_size,
            update_seconds=update_seconds,
        )
        self._cost = PassCost(max_batch_size, largest_step)
        self._scheduler = Scheduler(
            engine.executor,
            max_batch=max_batch_size,
            context=self.capacity.context,
            prefill_tokens=limits.prefill_step,
            cost=self._cost,
            prefix_cache=PrefixCache(prefix_cache_bytes, prefix_cache_listener) if prefix_cache_bytes else None,
        )
        if measure_passes:
            try:
                self._scheduler.measure_passes()
            except ExecutorLostError as error:
                raise EngineDeadError(f"the engine has stopped: {error}") from None
        self._ids = itertools.count(1)
        self.max_answers = max_batch_size + max_queue_size
        self._thread = SchedulerThread(self._scheduler, max_batch_size, self.max_answers)
        # Also without a call of shutdown: the thread must end before the interpreter does.
        self._stop = weakref.finalize(self, _stop, self._thread, engine.executor)
        log.info("%s", self.capacity)

    def pass_seconds(self, engine: EngineName, batch: int, step: int) -> float:
        """What a pass of one engine over ``batch`` sequences with ``step`` tokens each takes, as measured so far."""
        return self._cost.seconds(engine, batch, step)

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

        inputs: a text, token ids, a chat's messages, or one of these as a dict, ``{"prompt": text}``,
        ``{"prompt_token_ids": ids}`` or ``{"messages": messages}``; or a list of such inputs. Beside ``messages`` a
        dict may have the options of :meth:`Tokenizer.chat_prompt`, such as ``tools`` and ``chat_template_kwargs``;
        beside ``prompt_token_ids`` it may have ``thinking``: whether they end inside a thought, by default whether
        their last mark is ``<think>``; and ``answer_token_ids``: the first tokens of an answer that another process
        began with the same parameters and seed. The answer is then continued as that process would have: the output
        holds all of it. sampling_params: for all inputs, or one for each. use_tqdm: show a progress bar on a terminal.
        enable_thinking: for chats, whether the template opens a thought; None for the LLM's default.
        Inputs beyond the queue's size wait until there is room.
        """
        one = is_one_input(inputs)
        many: list[Any] = [inputs] if one else list(inputs)
        params = sampling_params if isinstance(sampling_params, Many) else [sampling_params] * len(many)
        if len(params) != len(many):
            raise TriModeError(f"sampling_params has {len(params)} entries for {len(many)} inputs")
        outputs: list[RequestOutput] = []
        try:
            for each, its_params in zip(many, params, strict=True):
                output, request = self._prepare(each, its_params, enable_thinking, streaming=False)
                self._thread.submit(request, wait=True)
                outputs.append(output)
            show = use_tqdm and not one  # a bar has a thread of its own, which would delay one short answer
            for output in (
                track(outputs, "Answering", console=Console(stderr=True), transient=True) if show else outputs
            ):
                output.result()
        except BaseException:
            for output in outputs:
                output.abort()
            raise
        return outputs[0] if one else outputs

    def generate_async(
        self,
        inputs: Input,
        sampling_params: Params | None = None,
        streaming: bool = False,
        enable_thinking: bool | None = None,
    ) -> RequestOutput:
        """Begin to answer one input; returns at once. streaming: send updates as tokens come, not one at the end.

        Raises TriModeError; ContextLengthError if prompt and max_tokens exceed the context, QueueFullError if too many
        requests wait, ShutDownError after :meth:`shutdown`, EngineDeadError if the engine has stopped by an error.
        """
        output, request = self._prepare(inputs, sampling_params, enable_thinking, streaming)
        self._thread.submit(request, wait=False)
        return output

    def compile_grammar(self, params: GuidedDecodingParams) -> None:
        """Compile a grammar now, on this thread, so that a request with it begins at once. Compiled grammars are kept
        for later requests, the latest 128. Raises GrammarError with the reason if it cannot be used.
        """
        self._grammars.compile(params)

    @property
    def failure(self) -> str | None:
        """Why no request can be answered any more; None as long as requests can be."""
        executor = self._executor
        return self._thread.failure or (executor.failure if isinstance(executor, OwningExecutor) else None)

    def stats(self) -> Stats:
        """A snapshot of the scheduler."""
        self._thread.require_process()
        return self._scheduler.stats()

    def shutdown(self) -> None:
        """Finish the current step and end the requests that are not finished with ShutDownError."""
        self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _prepare(
        self, inputs: Any, params: Any, enable_thinking: bool | None, streaming: bool
    ) -> tuple[RequestOutput, Request]:
        """The output of a new request, and the request to submit."""
        self._thread.require_process()
        params = SamplingParams() if params is None else SamplingParams.of(params)
        if enable_thinking is None:
            enable_thinking = self.capacity.defaults.enable_thinking
        prompt = self._encoder.encode(inputs, enable_thinking)
        params = self._factory.resolve(prompt, params)
        output = RequestOutput(next(self._ids), prompt.text, prompt.token_ids, params.n)
        output._llm = self
        mailbox, thread = output._mailbox, self._thread

        def listen(update: Update) -> None:
            try:
                mailbox.put(update)
            finally:
                if update.finish_reason is not None or update.error is not None:
                    thread.finished()

        output._requests = self._factory.requests(output.request_id, prompt, params, listen, streaming)
        return output, output._requests[0]


def _stop(thread: SchedulerThread, executor: Executor) -> None:
    thread.stop()
    if isinstance(executor, OwningExecutor):
        executor.close()
