"""`make prove-runtime`: check the runtime with many requests at once (second table of docs/results.md).

Texts are compared on the shipped checkpoint's engine. The distribution of samples, and the KV pool under random events,
are checked on a small language whose exact distribution is known (tests/support/exact_law.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from scripts.prove.proof_table import ProofRow, print_table
from tests.support.exact_law import (
    Bench,
    ExactLawExecutor,
    WeakDraftExecutor,
    greedy_text,
    prompts,
    text_law,
    total_variation,
)
from trimode import LLM, CompletionOutput, SamplingParams
from trimode.runtime.request.outputs import Update
from trimode.runtime.scheduling.running_request import Request

ROOT = Path(__file__).resolve().parents[2]
MAX_TOKENS = 200
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 4},
    {"temperature": 1.0, "top_k": 5, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.3},
)
SAMPLED_PROMPTS = ((2, 3), (6,), (4, 5), (3,), (5, 2))
MODES: tuple[dict[str, Any], ...] = (
    {"mode": "ar"},
    {"mode": "linear_spec", "block_length": 16},
    {"mode": "auto"},
    {"mode": "diffusion", "block_length": 16},
    {"mode": "linear_spec", "block_length": 32, "adapter": False},
)


# How self-speculation may draft beside a chain of one draft pass, in linear_spec unless it is said.
DRAFTING: tuple[dict[str, Any], ...] = (
    {"block_length": 16, "tree_width": 8},
    {"block_length": 16, "tree_width": 32},
    {"block_length": 32, "tree_width": 64, "adapter": False},
    {"block_length": 16, "lookup": True},
    {"block_length": 16, "tree_width": 24, "lookup": True, "adapter": False},
    {"mode": "auto"},
    {"mode": "auto", "lookup": True},
)
# Trees for the draws: wider than the block is long, as wide, and with long paths.
TREES: tuple[dict[str, Any], ...] = (
    {"block_length": 3, "tree_width": 12},
    {"block_length": 4, "tree_width": 4},
    {"block_length": 6, "tree_width": 9},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path, help="engine directory of the shipped checkpoint")
    parser.add_argument(
        "--checkpoint", type=Path, help="what it was built from; needed to show the margins of texts that differ"
    )
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--draws", type=int, default=210_000, help="texts of three tokens drawn for each sampling")
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = [
        *equality_rows(arguments.engine, arguments.checkpoint, arguments.prompts),
        *(
            distribution_row(sampling, prompt, arguments.draws)
            for sampling, prompt in zip(SAMPLINGS, SAMPLED_PROMPTS, strict=True)
        ),
        *(
            distribution_row(sampling, prompt, arguments.draws, tree)
            for sampling, prompt, tree in zip(SAMPLINGS, SAMPLED_PROMPTS, TREES, strict=False)
        ),
        *drafting_rows(arguments.engine, arguments.checkpoint),
        *overhead_rows(arguments.engine),
        events_row(arguments.events),
        memory_row(arguments.engine, arguments.requests),
        prefix_row(arguments.engine),
    ]
    print_table(rows, arguments.json)


def equality_rows(engine: Path, checkpoint: Path | None, count: int) -> list[ProofRow]:
    """Answer every prompt alone; then all prompts at once with mixed modes, at several batch sizes."""
    records = [json.loads(line) for line in (ROOT / "tests/data/heldout.jsonl").read_text().splitlines()]
    chosen = [records[at] for at in np.linspace(0, len(records) - 1, min(count, len(records))).astype(int)]
    messages = [record["messages"] for record in chosen]
    modes = [MODES[index % len(MODES)] for index in range(len(messages))]
    params = [SamplingParams(max_tokens=MAX_TOKENS, **mode) for mode in modes]
    with LLM(engine, max_batch_size=1, prefix_cache_bytes=0) as llm:
        alone = [output.outputs[0] for output in llm.generate(messages, params)]
        encoded = [llm.tokenizer.encode(llm.tokenizer.apply_chat_template(each)) for each in messages]
        ar, spec = (
            [output.outputs[0] for output in llm.generate(messages, SamplingParams(max_tokens=MAX_TOKENS, **mode))]
            for mode in MODES[:2]
        )
    margins = _Margins(checkpoint)
    own = [mode["mode"] for mode in modes]
    rows = [_equality("linear_spec emits ar's tokens, each alone", encoded, ["ar"] * len(encoded), spec, ar, margins)]
    for batch in (2, 4, 8, 16):
        with LLM(engine, max_batch_size=batch) as llm:
            together = [output.outputs[0] for output in llm.generate(messages, params)]
        rows.append(_equality(f"modes mixed in batches of {batch}: as alone", encoded, own, together, alone, margins))
    return rows


def _equality(
    what: str,
    encoded: list[list[int]],
    modes: list[str],
    found: list[CompletionOutput],
    expected: list[CompletionOutput],
    margins: _Margins,
) -> ProofRow:
    differing = [
        (prompt, one.token_ids, other.token_ids, mode)
        for prompt, mode, one, other in zip(encoded, modes, found, expected, strict=True)
        if one.token_ids != other.token_ids
    ]
    shown = f"{len(found) - len(differing)} of {len(found)}"
    if differing:
        shown += "; margins of logits " + ", ".join(margins.of(*each) for each in differing)
    return ProofRow(what, "all", shown, not differing)


class _Margins:
    """Margins by which the reference prefers the expected token at the first difference of two texts. Torch is imported
    for the first such text, because it would change the other measurements.
    """

    def __init__(self, checkpoint: Path | None) -> None:
        self._checkpoint = checkpoint

    @cached_property
    def _reference(self) -> Any:
        from trimode.model.checkpoint import Checkpoint
        from trimode.model.reference.loading import load_reference

        assert self._checkpoint is not None
        return load_reference(Checkpoint(self._checkpoint))

    def of(self, prompt: list[int], found: list[int], expected: list[int], mode: str) -> str:
        if self._checkpoint is None:
            return "unknown (give --checkpoint)"
        from scripts.prove.engines import margin

        return f"{margin(self._reference, prompt, found, expected, mode):.1e}"


def drafting_rows(engine: Path, checkpoint: Path | None) -> list[ProofRow]:
    """Every held-out prompt, greedy and sampled, in batches of 8. Each question is asked twice, so that the second
    answer can be copied from the first.
    """
    records = [json.loads(line) for line in (ROOT / "tests/data/heldout.jsonl").read_text().splitlines()]
    messages = [
        [*record["messages"], {"role": "assistant", "content": record["answer"]}, record["messages"][-1]]
        for record in records
    ]
    margins, rows = _Margins(checkpoint), []
    with LLM(engine, max_batch_size=8) as llm:
        encoded = [llm.tokenizer.encode(llm.tokenizer.apply_chat_template(each)) for each in messages]

        def answers(**options: Any) -> list[CompletionOutput]:
            params = SamplingParams(max_tokens=MAX_TOKENS, **options)
            return [output.outputs[0] for output in llm.generate(messages, params, use_tqdm=False)]

        for sampling in ({}, {"temperature": 1.0, "seed": 1}):
            expected = answers(mode="ar", **sampling)
            for drafting in DRAFTING:
                found = answers(**{"mode": "linear_spec"} | drafting, **sampling)
                names = ", ".join(f"{key} {value}" for key, value in (drafting | sampling).items())
                cycles = sum(output.counts.cycles for output in found)
                lookups = sum(output.counts.lookups for output in found)
                tokens = sum(output.length - 1 for output in found)
                row = _equality(f"{names}: ar's tokens", encoded, ["ar"] * len(encoded), found, expected, margins)
                shown = f"{row.found}; {tokens / cycles:.2f} tokens a cycle, {lookups} of {cycles} cycles with copies"
                rows.append(dataclasses.replace(row, found=shown))
    return rows


def distribution_row(
    sampling: dict[str, Any], prompt: tuple[int, ...], draws: int, tree: dict[str, Any] | None = None
) -> ProofRow:
    """The distribution of complete texts of three tokens, and of the second token, the first one that a cycle draws.
    Trees are drafted by an executor whose best candidates are often wrong.
    """
    counts = Counter[tuple[int, ...]]()
    executor = ExactLawExecutor if tree is None else WeakDraftExecutor
    bench = Bench(max_batch=16, capacity=32, end=False, prefix_cache=False, executor=executor)
    params = SamplingParams(max_tokens=3, mode="linear_spec", **(tree or {"block_length": 4}), **sampling)

    def receive(update: Update) -> None:
        counts[tuple(update.token_ids)] += 1

    for start in track(range(0, draws, 1000), f"sampling {sampling}", transient=True, console=Console(stderr=True)):
        for seed in range(start, start + 1000):
            bench.add(prompt, params, receive, seed)
        bench.run()
    exact = text_law(prompt, 3, params)
    texts = total_variation(counts, exact)
    tokens = total_variation(_second_tokens(counts), _second_tokens(exact))
    shown = ", ".join(
        f"{what} {found.distance:.4f} (chance {found.by_chance:.4f}, deviation {found.deviation:.4f})"
        for what, found in (("texts", texts), ("next token", tokens))
    )
    name = ", ".join(f"{key} {value}" for key, value in ((tree or {}) | sampling).items())
    holds = texts.is_chance and tokens.is_chance
    return ProofRow(
        f"{draws} texts drawn by linear_spec at {name}: total variation from AR's distribution", "chance", shown, holds
    )


def _second_tokens(texts: dict[tuple[int, ...], Any]) -> dict[tuple[int, ...], Any]:
    found: dict[tuple[int, ...], Any] = {}
    for text, share in texts.items():
        found[text[1:2]] = found.get(text[1:2], 0) + share
    return found


def overhead_rows(engine: Path) -> list[ProofRow]:
    """Milliseconds of a cycle that are spent outside ONNX Runtime. Prompts are given as token ids."""
    rows = []
    for batch in (1, 4, 16):
        with LLM(engine, max_batch_size=batch, prefix_cache_bytes=0) as llm:
            inside = _time_engines(llm)
            questions = [llm.tokenizer.encode(f"What is {number}% of 440?") for number in range(1, 65)]
            params = SamplingParams(max_tokens=64, mode="linear_spec", block_length=16, ignore_eos=True)
            llm.generate(questions, params, use_tqdm=False)
            milliseconds = []
            for _ in range(15):
                before, steps, begun = inside(), llm.stats().steps, time.perf_counter()
                llm.generate(questions, params, use_tqdm=False)
                outside = time.perf_counter() - begun - (inside() - before)
                milliseconds.append(1e3 * outside / (llm.stats().steps - steps))
        found = statistics.median(milliseconds)
        rows.append(ProofRow(f"time outside the engines per cycle, batch {batch}", "-", f"{found:.2f} ms", None))
    return rows


def _time_engines(llm: LLM) -> Any:
    """A function that returns the seconds spent inside the sessions so far."""
    spent = 0.0

    class Timed:
        def __init__(self, session: Any) -> None:
            self._session = session

        def __getattr__(self, name: str) -> Any:
            return getattr(self._session, name)

        def run_with_iobinding(self, binding: Any) -> None:
            nonlocal spent
            begun = time.perf_counter()
            self._session.run_with_iobinding(binding)
            spent += time.perf_counter() - begun

    sessions = llm._executor._sessions  # type: ignore[attr-defined]
    for kind in sessions:
        sessions[kind] = Timed(sessions[kind])
    return lambda: spent


def events_row(events: int) -> ProofRow:
    """Random submits, steps and aborts. Every text must be right. The executor checks all KV rows that it reads."""
    rng, wrong, ended = np.random.default_rng(0), 0, 0
    bench = Bench(max_batch=12, capacity=64, end=True, prefix_cache=True)
    running: dict[int, Request] = {}
    pool = prompts(40, 0)

    def submit(number: int) -> None:
        nonlocal wrong, ended
        prompt = pool[rng.integers(len(pool))] + pool[rng.integers(len(pool))]
        mode = ({"mode": "ar"}, {"mode": "linear_spec", "block_length": 6}, {"mode": "auto"})[rng.integers(3)]
        params = SamplingParams(max_tokens=int(rng.integers(1, 30)), **mode)
        expected = greedy_text(prompt, params.max_tokens)

        def receive(update: Update) -> None:
            nonlocal wrong, ended
            ended += 1
            whole = update.finish_reason != "cancelled"
            wrong += update.token_ids != (expected if whole else expected[: len(update.token_ids)])
            running.pop(number)

        running[number] = bench.add(prompt, params, receive)

    submitted = 0
    for _ in track(range(events), "events", transient=True, console=Console(stderr=True)):
        event = rng.choice(["join", "step", "step", "cancel"])
        if event == "join" and len(running) < 40:
            submit(submitted)
            submitted += 1
        elif event == "cancel" and running:
            list(running.values())[rng.integers(len(running))].aborted = True
        bench.scheduler.step()
    bench.run()
    leaked = bench.executor.pool.active + len(running) + (submitted - ended)
    found = f"{submitted} requests, {wrong} wrong, {leaked} leaked"
    return ProofRow(
        f"{events} random joins, finishes and cancels on one KV pool", "none wrong or leaked", found, not wrong + leaked
    )


def memory_row(engine: Path, requests: int) -> ProofRow:
    """Resident memory after each third of the requests. ONNX Runtime keeps memory for every new shape of a pass; the
    last third has no new shape.
    """
    sizes = []
    with LLM(engine, prefix_cache_bytes=8 << 20) as llm:
        rng = np.random.default_rng(0)
        for turn in track(range(30), "memory", transient=True, console=Console(stderr=True)):
            asked = [rng.integers(200, 700, 24).tolist() for _ in range(requests // 10)]
            llm.generate(asked, SamplingParams(max_tokens=6, **MODES[turn % len(MODES)]), use_tqdm=False)
            if turn % 10 == 9:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                sizes.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    shown = f"{sizes[1]:.0f} MiB before, {sizes[2]:.0f} after ({sizes[0]:.0f} after the first {requests})"
    return ProofRow(
        f"memory over {requests} requests, after every shape of a pass was seen",
        "flat (2 MiB)",
        shown,
        sizes[2] - sizes[1] <= 2,
    )


def prefix_row(engine: Path) -> ProofRow:
    """The second turn of a chat of about a thousand tokens."""
    with LLM(engine) as llm:
        turn = [{"role": "user", "content": "Count the words: " + " ".join(["stone", "river"] * 240)}]
        prompt = llm.tokenizer.encode(llm.tokenizer.apply_chat_template(turn))
        answer = llm.generate(prompt, SamplingParams(max_tokens=64, mode="linear_spec", ignore_eos=True)).outputs[0]
        known = [*prompt, *answer.token_ids]
        new = llm.tokenizer.encode("And how many of them are rivers?")
        second = llm.generate([*known, *new], SamplingParams(max_tokens=8)).outputs[0]
    computed = len(known) + len(new) - second.counts.cached_tokens
    shown = f"{len(known)} known, {len(new)} new: {computed} prefilled in {second.counts.prefill} pass"
    # The first answer's last token was emitted but not committed.
    return ProofRow("second turn of a chat", "only what is new", shown, computed <= len(new) + 1)


if __name__ == "__main__":
    main()
