"""Two workers behind Dynamo's frontend: equality with solo runs, KV-aware routing, and `kill -9` under load.

python -m scripts.serving.dynamo_check ENGINE [equality] [routing] [kills]    # all three by default

Needs the environment of `make dynamo-environment`. Exits with 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from scripts.serving.dynamo_cluster import MODEL_NAME, Cluster, Worker, dynamo_cluster
from scripts.serving.event_client import DONE, Streamed, stream
from trimode import LLM, GuidedDecodingParams, SamplingParams

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ROOT / "checkpoints" / "tiny" / "calibration.jsonl"
CLIENTS = 32
SAMPLED = {"temperature": 0.8, "top_p": 0.95}
SCHEMA = {"type": "object", "properties": {"steps": {"type": "string"}, "answer": {"type": "integer"}}}
# Of the frontend's fields, and of TriMode's own.
KINDS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({}, {"mode": "ar"}),
    ({}, {"mode": "linear_spec", "block_length": 16}),
    ({}, {"mode": "auto"}),
    ({}, {"mode": "diffusion", "block_length": 16}),
    (SAMPLED, {"mode": "ar"}),
    (SAMPLED, {"mode": "linear_spec", "lookup": True}),
    (SAMPLED, {"mode": "diffusion", "block_length": 8}),
    ({"presence_penalty": 0.6, "frequency_penalty": 0.4}, {"mode": "ar"}),
    ({"frequency_penalty": 0.5, **SAMPLED}, {"mode": "auto"}),
    ({"repetition_penalty": 1.15}, {"mode": "linear_spec"}),
    ({"stop": ["carry 2"]}, {"mode": "linear_spec", "tree_width": 24}),
)
GUIDED: tuple[dict[str, Any], dict[str, Any]] = ({"response_format": SCHEMA}, {"mode": "auto"})
# Outcomes of a request.
EQUAL, DIFFERENT, ERROR, LOST = "equal", "different", "ended with an error", "lost"
Outcome = Literal["equal", "different", "ended with an error", "lost"]
KILLS = 20
ANSWER_TOKENS = 250  # of the answers that are under way when a worker is killed


class Case(NamedTuple):
    """A request, as the body for the frontend and as input and parameters for a solo run."""

    body: dict[str, Any]
    messages: list[dict[str, Any]]
    params: SamplingParams

    @classmethod
    def of(cls, number: int, kind: tuple[dict[str, Any], dict[str, Any]], messages: Any, **fields: Any) -> Case:
        given, own = kind[0] | {"seed": number} | fields, dict(kind[1])
        params = {name: value for name, value in given.items() if name != "response_format"}
        if schema := given.get("response_format"):
            params["guided_decoding"] = GuidedDecodingParams(json=schema)
            form = {"type": "json_schema", "json_schema": {"name": "solution", "schema": schema}}
            given = given | {"response_format": form}
        annotations = [f"trimode.{name}={json.dumps(value).strip(chr(34))}" for name, value in own.items()]
        body = {"model": MODEL_NAME, "messages": messages, "stream": True, "nvext": {"annotations": annotations}}
        return cls(body | given, messages, SamplingParams(**params, **own))


class Received(NamedTuple):
    """The text of a stream, why it ended, and its error; a stream without both is not whole."""

    text: str
    finish_reason: str | None
    error: str | None

    @classmethod
    def of(cls, answer: Streamed) -> Received:
        events = [event for event in answer.events if event != DONE]
        choices = [choice for event in events for choice in event.get("choices", ())]
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
        reasons = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
        errors = [_message(event) for event in events if "error" in event or "message" in event]
        return cls(text, reasons[-1] if reasons else None, errors[0] if errors else None)

    def outcome(self, solo: Received) -> Outcome:
        if self.error is not None:
            # What was shown before the error must be the beginning of the text.
            return ERROR if solo.text.startswith(self.text) else DIFFERENT
        if self.finish_reason is None:
            return LOST
        return EQUAL if self == solo else DIFFERENT


def _message(event: dict[str, Any]) -> str:
    return str(event["error"]["message"] if "error" in event else event["message"])


def solo_runs(engine: Path, cases: Sequence[Case]) -> list[Received]:
    """Each case alone, in this process."""
    with LLM(engine, threads=1, max_batch_size=1, prefix_cache_bytes=0) as llm:
        outputs = [llm.generate(case.messages, case.params).outputs[0] for case in cases]
    return [Received(output.text, output.finish_reason, None) for output in outputs]


def chats() -> list[list[dict[str, Any]]]:
    records = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    return [[message for message in record["messages"] if message["role"] == "user"][:1] for record in records]


def check_equality(engine: Path, requests: int) -> bool:
    found = chats()
    kinds = (*KINDS, GUIDED)
    cases = [
        Case.of(number, kinds[number % len(kinds)], found[number % len(found)], max_tokens=64)
        for number in range(requests)
    ]
    solo = solo_runs(engine, cases)
    with dynamo_cluster(engine, "--threads", "1") as cluster:
        url = f"{cluster.url}/v1/chat/completions"
        received = asyncio.run(_ask_all(url, [case.body for case in cases]))
        shares = [_sample(worker, "trimode_answers_total") for worker in cluster.workers]
    outcomes = Counter(answer.outcome(alone) for answer, alone in zip(received, solo, strict=True))
    _show_failures(cases, received, solo)
    print(
        f"equality: {requests} requests, {CLIENTS} clients, {len(kinds)} kinds: {_listed(outcomes)}; "
        f"answers of each worker: {', '.join(f'{share:.0f}' for share in shares)}",
        flush=True,
    )
    return outcomes == {EQUAL: requests} and min(shares) > 0


async def _ask_all(url: str, bodies: Sequence[dict[str, Any]]) -> list[Received]:
    free = asyncio.Semaphore(CLIENTS)

    async def ask(body: dict[str, Any]) -> Received:
        async with free:
            return Received.of(await stream(url, body))

    return list(await asyncio.gather(*map(ask, bodies)))


class Hits(NamedTuple):
    """Of the requests whose prompt another one began with: how many found it cached, and the share of prompt tokens."""

    requests: int
    hits: int
    cached: float


def check_routing(engine: Path, groups: int = 12, turns: int = 6) -> bool:
    """Prompts in groups with the same long beginning, one request at a time."""
    found = {router: _hits(engine, router, groups, turns) for router in ("kv", "round-robin")}
    for router, hits in found.items():
        print(
            f"routing: {router}: {hits.hits} of {hits.requests} repeated beginnings were cached, and "
            f"{hits.cached:.0%} of all their prompt tokens",
            flush=True,
        )
    return found["kv"].hits == found["kv"].requests and found["kv"].cached > found["round-robin"].cached


def _hits(engine: Path, router: str, groups: int, turns: int) -> Hits:
    records, rng = chats(), np.random.default_rng(0)
    texts = [chat[0]["content"] for chat in records]
    beginnings = [" ".join(texts[place] for place in rng.permutation(len(texts))[:12]) for _ in range(groups)]
    order = rng.permutation(np.repeat(np.arange(groups), turns)).tolist()
    seen: set[int] = set()
    prompt = cached = hits = requests = 0
    with dynamo_cluster(engine, "--threads", "1", router=router) as cluster:
        for number, group in enumerate(order):
            messages = [{"role": "system", "content": beginnings[group]}, *records[number % len(records)]]
            body = {"model": MODEL_NAME, "messages": messages, "max_tokens": 4, "stream": True}
            body |= {"stream_options": {"include_usage": True}}
            answer = asyncio.run(stream(f"{cluster.url}/v1/chat/completions", body))
            usage = next(event["usage"] for event in answer.events if event != DONE and event.get("usage"))
            reused = usage["prompt_tokens_details"]["cached_tokens"] or 0
            if group in seen:
                requests, hits = requests + 1, hits + (reused > 100)
                prompt, cached = prompt + usage["prompt_tokens"], cached + reused
            seen.add(group)
            time.sleep(0.3)  # the router learns of blocks by events
    return Hits(requests, hits, cached / prompt)


def check_kills(engine: Path, kills: int, cases_count: int = 48) -> bool:
    found = chats()
    kinds = (*KINDS, GUIDED)
    cases = []
    for number in range(cases_count):
        kind = kinds[number % len(kinds)]
        # The frontend drops stop strings beside ignore_eos, and a grammar ends its text itself.
        endless = {} if kind[0].keys() & {"stop", "response_format"} else {"ignore_eos": True}
        cases.append(Case.of(number, kind, found[number % len(found)], max_tokens=ANSWER_TOKENS, **endless))
    solo = solo_runs(engine, cases)
    # On a slow machine, one request may meet every kill.
    with dynamo_cluster(engine, "--threads", "1", migrations=2 * kills) as cluster:
        outcomes, errors, asked = asyncio.run(_load_and_kill(cluster, cases, solo, kills))
        frontend = _frontend_migrations(cluster)
    print(
        f"kills: {kills} times kill -9, {CLIENTS} clients, {asked} requests: {_listed(outcomes)}; "
        f"the frontend moved {frontend:.0f} requests",
        flush=True,
    )
    for message, count in errors.most_common():
        print(f"  {count} x {message}")
    return outcomes[DIFFERENT] == outcomes[LOST] == 0 and frontend > 0


async def _load_and_kill(
    cluster: Cluster, cases: Sequence[Case], solo: Sequence[Received], kills: int
) -> tuple[Counter[Outcome], Counter[str], int]:
    outcomes, errors = Counter[Outcome](), Counter[str]()
    url, stopped, numbers = f"{cluster.url}/v1/chat/completions", asyncio.Event(), iter(range(1 << 30))

    async def client() -> None:
        while not stopped.is_set():
            number = next(numbers) % len(cases)
            received = Received.of(await stream(url, cases[number].body))
            outcome = received.outcome(solo[number])
            outcomes[outcome] += 1
            if received.error is not None:
                kind = "response_format" if "response_format" in cases[number].body else "other"
                errors[f"{kind}: {received.error}"] += 1
            if outcome in (DIFFERENT, LOST):
                _show_failures([cases[number]], [received], [solo[number]])

    clients = [asyncio.create_task(client()) for _ in range(CLIENTS)]
    for number in range(kills):
        worker = cluster.workers[number % 2]
        await asyncio.to_thread(_wait_for_load, worker)
        worker.process.send_signal(signal.SIGKILL)
        await asyncio.to_thread(worker.process.wait)
        await asyncio.to_thread(cluster.replace, worker)
        print(f"  {number + 1} of {kills} kills: {_listed(outcomes)}", file=sys.stderr, flush=True)
    stopped.set()
    await asyncio.gather(*clients)
    return outcomes, errors, sum(outcomes.values())


def _wait_for_load(worker: Worker) -> None:
    """Until the worker is in the middle of several answers."""
    deadline = time.monotonic() + 60
    while _sample(worker, "trimode_requests_running") < 4:
        if time.monotonic() > deadline:
            raise TimeoutError(f"worker {worker.number} has no requests")
        time.sleep(0.05)
    time.sleep(0.5)


def _sample(worker: Worker, name: str) -> float:
    return _value(worker.metrics(), name)


def _frontend_migrations(cluster: Cluster) -> float:
    return _value(cluster.frontend_metrics(), "dynamo_frontend_model_migration_total")


def _value(metrics: str, name: str) -> float:
    """The sum of a metric's samples."""
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", metrics, re.MULTILINE))


def _show_failures(cases: Sequence[Case], received: Sequence[Received], solo: Sequence[Received]) -> None:
    for case, answer, alone in zip(cases, received, solo, strict=True):
        if answer.outcome(alone) != EQUAL:
            print(f"{answer.outcome(alone)}: {case.body}\n  received: {answer}\n  alone:    {alone}", file=sys.stderr)


def _listed(outcomes: Counter[Outcome]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("parts", nargs="*", help="equality, routing, kills")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--kills", type=int, default=KILLS)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which stops the cluster
    parts = {
        "equality": lambda: check_equality(options.engine, options.requests),
        "routing": lambda: check_routing(options.engine),
        "kills": lambda: check_kills(options.engine, options.kills),
    }
    if unknown := set(options.parts) - set(parts):
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    passed = [parts[part]() for part in options.parts or parts]
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
