"""Many streaming clients at once: equality of every text with its solo run, time to first token, memory, overhead.

python -m scripts.serving.load_test ENGINE                      # the OpenAI server: 64 clients, 1,000 requests
python -m scripts.serving.load_test ENGINE --server triton      # tritonserver, in the environment of `make triton`
python -m scripts.serving.load_test ENGINE --rounds 3           # and the runtime alone under the same load, in turn
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scripts.serving.event_client import DONE, Streamed, stream
from scripts.serving.server_process import KEY, Served, serving
from scripts.serving.triton_server import Ports, triton_server
from trimode import LLM, SamplingParams
from trimode.engine.files import TOKENIZER
from trimode.model.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
MODES: tuple[dict[str, Any], ...] = (
    {"mode": "ar"},
    {"mode": "linear_spec", "block_length": 16},
    {"mode": "diffusion", "block_length": 16},
    {"mode": "auto"},
)
MAX_TOKENS = 200
PORTS = Ports(18000, 18001, 18002)


class LoadAnswer(NamedTuple):
    text: str
    tokens: int
    first: float
    seconds: float


Ask = Callable[[int], Awaitable[LoadAnswer]]


@dataclass(frozen=True)
class Load:
    """``ask(i)`` answers request i; requests i and i + ``distinct`` are equal."""

    ask: Ask
    distinct: int
    requests: int

    @classmethod
    def of_chats(cls, url: str, records: Sequence[dict[str, Any]], requests: int) -> Load:
        """The OpenAI server; each problem in every mode."""

        async def ask(number: int) -> LoadAnswer:
            record, mode = _choose(records, number)
            body = {"messages": record["messages"], "max_tokens": MAX_TOKENS, "stream": True}
            options = {"stream_options": {"include_usage": True}}
            found = await stream(f"{url}/v1/chat/completions", body | options | mode, KEY, silent_events=1)
            _require_whole(found)
            *chunks, usage, done = found.events
            assert done == DONE
            text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
            return LoadAnswer(text, usage["usage"]["completion_tokens"], found.first or 0.0, found.seconds)

        return cls(ask, len(records) * len(MODES), requests)

    @classmethod
    def of_texts(cls, tokenizer: Tokenizer, records: Sequence[dict[str, Any]], requests: int) -> Load:
        """tritonserver, over HTTP's ``generate_stream``; each event has the text so far."""

        async def ask(number: int) -> LoadAnswer:
            record, mode = _choose(records, number)
            body = {"text_input": tokenizer.apply_chat_template(record["messages"]), "streaming": True}
            options = {"sampling_param_max_tokens": MAX_TOKENS, "return_finish_reason": True}
            url = f"http://127.0.0.1:{PORTS.http}/v2/models/tensorrt_llm/generate_stream"
            found = await stream(url, body | options | mode)
            _require_whole(found)
            text = found.events[-1]["text_output"]
            return LoadAnswer(text, len(tokenizer.encode(text)), found.first or 0.0, found.seconds)

        return cls(ask, len(records) * len(MODES), requests)

    @classmethod
    def of_runtime(cls, llm: LLM, records: Sequence[dict[str, Any]], requests: int) -> Load:
        """The same without a server."""

        async def ask(number: int) -> LoadAnswer:
            record, mode = _choose(records, number)
            begun, first = time.perf_counter(), None
            output = llm.generate_async(
                record["messages"], SamplingParams(max_tokens=MAX_TOKENS, **mode), streaming=True
            )
            async for _ in output:
                first = first or time.perf_counter() - begun
            (answer,) = output.outputs
            return LoadAnswer(answer.text, answer.length, first or 0.0, time.perf_counter() - begun)

        return cls(ask, len(records) * len(MODES), requests)


@dataclass
class LoadResult:
    """``wrong``: numbers of the requests whose text differed from their solo run."""

    completed: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    wrong: list[int] = field(default_factory=list)

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds

    def line(self) -> str:
        p50, p99 = 1000 * np.percentile(self.first, [50, 99])
        return (
            f"{self.completed:,} answers, {self.tokens:,} tokens in {self.seconds:.1f} s ({self.speed:.0f} a second); "
            f"first token after {p50:.0f} ms (median), {p99:.0f} ms (p99); {len(self.wrong)} differ from their solo run"
        )


def run_load(load: Load, clients: int, solo: bool = True) -> LoadResult:
    """If ``solo``, run each distinct request alone first; then all of them by ``clients`` clients at once."""
    return asyncio.run(_run(load, clients, solo))


async def _run(load: Load, clients: int, solo: bool) -> LoadResult:
    expected = [await load.ask(number) for number in range(min(load.distinct, load.requests))] if solo else []
    found, numbers = LoadResult(), iter(range(load.requests))

    async def client() -> None:
        for number in numbers:
            answer = await load.ask(number)
            found.completed += 1
            found.tokens += answer.tokens
            found.first.append(answer.first)
            if solo and answer.text != expected[number % load.distinct].text:
                found.wrong.append(number)

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    found.seconds = time.perf_counter() - begun
    return found


def _choose(records: Sequence[dict[str, Any]], number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    return records[number // len(MODES) % len(records)], MODES[number % len(MODES)]


def _require_whole(found: Streamed) -> None:
    if found.status != 200 or not found.whole or "error" in found.events[-1]:
        raise RuntimeError(f"an answer failed: status {found.status}, {found.events[-1:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("--server", choices=["openai", "triton"], default="openai")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--threads", type=int, help="of the engine's passes, OpenAI server and runtime alone")
    parser.add_argument("--rounds", type=int, default=0, help="of comparison with the runtime alone")
    options = parser.parse_args()
    lines = (ROOT / "tests" / "data" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines[::5]]
    if options.server == "triton":
        tokenizer = Tokenizer.from_folder(options.engine / TOKENIZER)
        with triton_server(options.engine, PORTS):
            print(run_load(Load.of_texts(tokenizer, records, options.requests), options.clients).line())
        return
    threads = [] if options.threads is None else ["--threads", str(options.threads)]
    with serving(options.engine, *threads) as server:
        load = Load.of_chats(server.url, records, options.requests)
        print(run_load(load, options.clients).line(), f"; {server.resident_mib():.0f} MiB resident", sep="")
        run_load(load, options.clients, solo=False)
        print(f"after as many again: {server.resident_mib():.0f} MiB resident; log: {server.log}")
        if options.rounds:
            with LLM(options.engine, threads=options.threads) as llm:
                _compare(server, load, Load.of_runtime(llm, records, options.requests), options.clients, options.rounds)


def _compare(server: Served, served: Load, alone: Load, clients: int, rounds: int) -> None:
    """Alternate between the two, because the machine's speed changes. Also compare the processor time of the serving
    process, which does not depend on other work on the machine or on the client.
    """
    run_load(alone, clients, solo=False)
    by_wall, by_processor = [], []
    for _ in range(rounds):
        begun = server.cpu_seconds()
        found = run_load(served, clients, solo=False)
        used = server.cpu_seconds() - begun
        begun = time.process_time()
        bare = run_load(alone, clients, solo=False)
        bare_used = time.process_time() - begun
        by_wall.append(found.speed / bare.speed)
        by_processor.append((found.tokens / used) / (bare.tokens / bare_used))
        print(
            f"tokens a second: {found.speed:.0f} served, {bare.speed:.0f} by the runtime alone, {by_wall[-1]:.2f}; "
            f"a processor second: {found.tokens / used:.0f}, {bare.tokens / bare_used:.0f}, {by_processor[-1]:.2f}"
        )
    print(f"served against alone: {np.median(by_wall):.2f} by wall, {np.median(by_processor):.2f} by processor time")


if __name__ == "__main__":
    main()
