"""The worker behind a small double of Dynamo: chunks, migration, KV events, load, errors and shutdown."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.dynamo_double import (
    Context,
    EngineShutdown,
    Frontend,
    InvalidArgument,
    Publisher,
    WorkerConfig,
    WorkerUnavailable,
    dynamo_modules,
    request_of,
)
from tests.support.patience import wait_until
from trimode import LLM, SamplingParams
from trimode.runtime.dynamo.block_events import BlockEvents
from trimode.runtime.dynamo.worker_options import WorkerOptions, has_broker, listen_on
from trimode.runtime.kv.prefix_cache import BLOCK
from trimode.runtime.scheduling.scheduler import Scheduler

PROMPT = "<|im_start|>user\nCompute 47 * 36 step by step.<|im_end|>\n<|im_start|>assistant\n"


class Rig:
    """Two workers with one engine each, and a frontend."""

    def __init__(self, engine: Path, module: Any) -> None:
        self.events = [BlockEvents(), BlockEvents()]
        self.llms = [
            LLM(
                engine, threads=1, max_batch_size=4, max_queue_size=4, measure_passes=False, prefix_cache_listener=taker
            )
            for taker in (events.take for events in self.events)
        ]
        options = WorkerOptions(model_name="tiny")
        self.workers = [
            module.DynamoWorker(llm, events, options) for llm, events in zip(self.llms, self.events, strict=True)
        ]
        self.prompt = self.llms[0].tokenizer.encode(PROMPT, add_special_tokens=False)
        self.frontend = Frontend()

    def tokens(self, request: dict[str, Any], *cuts: int) -> list[int]:
        workers = [self.workers[number % 2] for number in range(len(cuts) + 1)]
        return asyncio.run(self.frontend.tokens(request, workers, *cuts))


@pytest.fixture(scope="module")
def started() -> list[tuple[Any, WorkerConfig]]:
    return []


@pytest.fixture(scope="module")
def module(started: list[tuple[Any, WorkerConfig]]) -> Iterator[Any]:
    name = "trimode.runtime.dynamo.worker"
    with pytest.MonkeyPatch.context() as patch:
        for dynamo, double in dynamo_modules(started).items():
            patch.setitem(sys.modules, dynamo, double)
        yield importlib.import_module(name)
        del sys.modules[name]


@pytest.fixture(scope="module")
def rig(tiny_engine: Path, module: Any) -> Iterator[Rig]:
    rig = Rig(tiny_engine, module)
    yield rig
    for llm in rig.llms:
        llm.shutdown()


def test_chunks_hold_the_answer_its_log_probabilities_and_its_usage(rig: Rig) -> None:
    found = rig.tokens(request_of(rig.prompt, max_tokens=12, temperature=0.0, logprobs=2, prompt_logprobs=1))
    params = SamplingParams(max_tokens=12, logprobs=2, prompt_logprobs=1)
    solo = rig.llms[0].generate(rig.prompt, params)
    assert found == solo.outputs[0].token_ids
    chunks = rig.frontend.chunks
    assert solo.outputs[0].logprobs is not None
    own = [row[token].logprob for token, row in zip(found, solo.outputs[0].logprobs, strict=True)]
    assert [value for chunk in chunks for value in chunk["log_probs"]] == own
    alternatives = [row for chunk in chunks for row in chunk["top_logprobs"]]
    assert all(len(row) in (2, 3) and row[0]["rank"] == 1 for row in alternatives)
    assert all("finish_reason" not in chunk for chunk in chunks[:-1])
    last = chunks[-1]
    assert last["finish_reason"] == "length"
    assert last["completion_usage"]["total_tokens"] == len(rig.prompt) + 12
    prompt_logprobs = last["engine_data"]["prompt_logprobs"]
    assert prompt_logprobs[0] is None
    assert len(prompt_logprobs) == len(rig.prompt)
    assert str(rig.prompt[1]) in prompt_logprobs[1]


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("ar", {"temperature": 0.0}),
        ("ar", {"temperature": 0.8, "seed": 5, "presence_penalty": 0.8, "frequency_penalty": 0.4}),
        ("linear_spec", {"temperature": 0.8}),
        ("auto", {"repetition_penalty": 1.2, "stop": ["zzz"], "logprobs": 0}),
        ("diffusion", {"temperature": 0.7, "seed": 3}),
    ],
    ids=str,
)
def test_an_answer_is_the_same_when_its_workers_die(rig: Rig, mode: str, options: dict[str, Any]) -> None:
    annotations = [f"trimode.mode={mode}", *([] if mode == "ar" else ["trimode.block_length=4"])]
    request = request_of(rig.prompt, max_tokens=40, ignore_eos=True, annotations=annotations, **options)
    whole = rig.tokens(request)
    assert rig.tokens(request, 0, 2, 2) == whole
    assert len(rig.frontend.attempts) == 4
    assert rig.frontend.attempts[3]["stop_conditions"]["max_tokens"] < 40
    assert rig.frontend.chunks[-1]["completion_usage"]["completion_tokens"] == 40


def test_what_this_worker_would_continue_differently_is_refused(rig: Rig, module: Any) -> None:
    other = module.DynamoWorker(rig.llms[1], BlockEvents(), WorkerOptions(model_name="tiny"))
    other._links = module.MigrationLinks(b"another engine")
    request = request_of(rig.prompt, max_tokens=40, ignore_eos=True, annotations=["trimode.mode=ar"])
    with pytest.raises(InvalidArgument, match="cannot continue the answer with the same tokens"):
        asyncio.run(rig.frontend.tokens(request, [rig.workers[0], other], 2))
    # Dynamo's tracing has written a link of its own.
    request |= {"migration_link": {"trace_id": "5874624c9ba9257b2a4aec13fef89e02", "span_id": "88ac46766bcd2566"}}
    with pytest.raises(InvalidArgument, match="Dynamo's tracing hid where the prompt ends"):
        rig.tokens(request)


def test_a_diffusion_answer_cut_inside_a_block_is_refused(rig: Rig) -> None:
    annotations = ["trimode.mode=diffusion", "trimode.block_length=4"]
    request = request_of([*rig.prompt, 5, 6], max_tokens=20, annotations=annotations)
    request["migration_link"] = rig.workers[0]._links.link(rig.prompt)
    with pytest.raises(InvalidArgument, match="do not end where a block"):
        rig.tokens(request)


def test_bad_requests_full_queues_and_stopped_engines_are_told_apart(rig: Rig, module: Any, tiny_engine: Path) -> None:
    with pytest.raises(InvalidArgument, match="temperature"):
        rig.tokens(request_of(rig.prompt, temperature=-1.0))
    with LLM(tiny_engine, threads=1, max_batch_size=1, max_queue_size=1, measure_passes=False) as llm:
        worker = module.DynamoWorker(llm, BlockEvents(), WorkerOptions(model_name="tiny"))
        llm.max_answers = 0
        llm._thread._max_answers = 0
        with pytest.raises(WorkerUnavailable, match="wait already"):
            asyncio.run(rig.frontend.tokens(request_of(rig.prompt), [worker]))
    with pytest.raises(EngineShutdown, match="shut down"):
        asyncio.run(rig.frontend.tokens(request_of(rig.prompt), [worker]))


def test_abort_and_a_closed_stream_free_the_slot(rig: Rig) -> None:
    async def run(end: Callable[[Any, Context], Any]) -> None:
        context = Context("to abort")
        stream = rig.workers[0].generate(request_of(rig.prompt, max_tokens=1500, ignore_eos=True), context)
        await anext(stream)
        answer = rig.workers[0]._answers[context.id()]
        await end(stream, context)
        await stream.aclose()
        assert answer._requests[0].aborted

    async def abort(stream: Any, context: Context) -> None:
        await rig.workers[0].abort(context)
        last = [chunk async for chunk in stream][-1]
        assert last["finish_reason"] == "cancelled"

    async def leave(stream: Any, context: Context) -> None: ...

    for end in (abort, leave):
        asyncio.run(run(end))
        wait_until(lambda: not rig.llms[0].stats().running)
        assert rig.workers[0]._answers == {}


def test_kv_events_name_whole_blocks_by_their_chain_of_hashes(rig: Rig, tiny_engine: Path) -> None:
    events, publisher = BlockEvents(), Publisher()
    events.publish(publisher)
    row_bytes = rig.llms[0].capacity.kv_bytes_per_token
    limit = 3 * BLOCK * row_bytes
    with LLM(
        tiny_engine, threads=1, prefix_cache_bytes=limit, prefix_cache_listener=events.take, measure_passes=False
    ) as llm:
        rng = np.random.default_rng(0)
        first, second = (rng.integers(20, 200, 2 * BLOCK + 5).tolist() for _ in range(2))
        llm.generate(first, SamplingParams(max_tokens=1))
        llm.generate(second, SamplingParams(max_tokens=1))
    events.stop()
    stored = [event for kind, event in publisher.events if kind == "stored"]
    assert [event["token_ids"] for event in stored[:2]] == [first[:BLOCK], first[BLOCK : 2 * BLOCK]]
    assert stored[0]["parent_hash"] is None
    assert stored[1]["parent_hash"] == stored[0]["block_hashes"][0]
    assert {tuple(event["num_block_tokens"]) for event in stored} == {(BLOCK,)}
    known: set[int] = set()
    for kind, event in publisher.events:
        (name,) = event["block_hashes"]
        assert -(2**63) <= name < 2**63
        assert (name in known) == (kind == "removed")
        known ^= {name}
    assert len(known) == events.blocks
    assert any(kind == "removed" for kind, _ in publisher.events)


def test_start_registers_the_engine_and_reports_its_load(rig: Rig) -> None:
    worker, publisher, registries = rig.workers[0], Publisher(), []  # type: ignore[var-annotated]

    async def run() -> Any:
        worker.attach_snapshot_publisher(publisher)
        config = await worker.start(7)
        await worker.register_prometheus(registries)
        while not publisher.snapshots:
            await asyncio.sleep(0.01)
        worker._reports.cancel()
        return config, await worker.health_check_payload(), await worker.kv_event_sources()

    config, payload, sources = asyncio.run(run())
    assert (config.served_model_name, config.llm.kv_cache_block_size) == ("tiny", BLOCK)
    assert {path.name for path in Path(config.model).iterdir()} >= {"config.json", "tokenizer.json"}
    assert publisher.snapshots[0].kv_total_blocks == config.llm.total_kv_blocks > 0
    assert publisher.snapshots[0].kv_used_blocks == 0
    assert rig.tokens(payload)
    assert [source.dp_rank for source in sources] == worker.component_metrics_dp_ranks() == [0]
    assert registries[0].get_sample_value("trimode_requests_running") == 0


def test_an_engine_that_dies_ends_the_worker_with_code_1(
    tiny_engine: Path, module: Any, started: list[tuple[Any, WorkerConfig]], monkeypatch: pytest.MonkeyPatch
) -> None:
    signals: list[int] = []
    monkeypatch.setattr(module.os, "kill", lambda _pid, number: signals.append(number))
    monkeypatch.setattr(Scheduler, "step", lambda _self: (_ for _ in ()).throw(SystemExit("out of memory")))
    with LLM(tiny_engine, threads=1, measure_passes=False) as llm:

        def run(_class: type, *, engine_factory: Any) -> None:
            async def whole() -> None:
                worker, config = await engine_factory(None)
                started.append((worker, config))
                with pytest.raises(EngineShutdown, match="out of memory"):
                    await Frontend().tokens(request_of([1, 2, 3]), [worker])
                await worker.start(1)
                await worker._reports
                await worker.cleanup()
                await worker.cleanup()

            asyncio.run(whole())

        monkeypatch.setattr(module, "run", run)
        with pytest.raises(SystemExit) as exit_code:
            module.serve(llm, BlockEvents(), WorkerOptions(model_name="tiny", tool_call_parser="hermes"))
    assert exit_code.value.code == 1
    assert signals == [module.signal.SIGTERM]
    config = started[-1][1]
    assert (config.discovery_backend, config.tool_call_parser, config.request_plane) == ("file", "hermes", "tcp")
    assert config.model_name.endswith("tokenizer")


def test_a_worker_listens_on_the_given_host_unless_dynamos_variables_say_otherwise() -> None:
    environment = {"DYN_SYSTEM_HOST": "10.0.0.1"}
    listen_on("127.0.0.1", environment)
    assert environment.pop("DYN_SYSTEM_HOST") == "10.0.0.1"
    assert set(environment.values()) == {"127.0.0.1"}
    assert len(environment) == 3
    assert not has_broker(environment)
    assert has_broker({"DYN_ZMQ_BROKER_URL": "xsub=tcp://127.0.0.1:1 , xpub=tcp://127.0.0.1:2"})
