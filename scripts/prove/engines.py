"""`make prove`: compare the shipped checkpoint's engines with the PyTorch reference (first table of docs/results.md).

Texts are compared token by token. Where a greedy token differs, the table shows the margin: the reference's logit of
its own token minus that of the engine's token. A near-tie is not a fault, a wide margin is.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from scripts.bench.resident_memory import resident_mib
from scripts.prove.proof_table import ProofRow, print_table
from tests.support.random_checkpoint import write_random_checkpoint
from trimode import LLM, CompletionOutput, SamplingParams
from trimode.build.cpu.target import CpuTarget
from trimode.build.engine_builder import build_engine
from trimode.model.checkpoint import Checkpoint
from trimode.model.reference.loading import load_reference
from trimode.model.reference.network import NemotronLabsDiffusionModel
from trimode.model.reference.patterns import bidirectional, causal
from trimode.quantize import quantize_checkpoint
from trimode.runtime.executor import BidirectionalStep, CausalStep
from trimode.runtime.loading import load_engine

ROOT = Path(__file__).resolve().parents[2]
BLOCK_LENGTH, MAX_TOKENS = 16, 256
GROUP = 64  # as `make demo` quantises it
# Worker threads of PyTorch and of ONNX Runtime spin for some milliseconds after their work. Let them stop first.
SETTLING_SECONDS = 0.03
PROMPTS_PER_TURN = 10
MODES = ("ar", "diffusion", "linear_spec")
THRESHOLD = 0.9
ENGINES = (
    "w4a16: the build stores the int4 matrices of so small a network as fp32. "
    "w4a16 packed: they stay int4, and the int4 kernels run, as for larger networks."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints" / "tiny")
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts of the largest comparison")
    parser.add_argument(
        "--only", help="measure one part of the table: logits, tokens, accuracy, w4a8, memory, adapter or speed"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        rows = prove(arguments.checkpoint, Path(folder), arguments.prompts, arguments.only)
    print_table(rows, arguments.json, ENGINES)


def prove(source: Path, folder: Path, count: int, only: str | None) -> list[ProofRow]:
    records = [json.loads(line) for line in (ROOT / "tests/data/heldout.jsonl").read_text().splitlines()]
    quantize_checkpoint(Checkpoint(source), folder / "w4a16", method="awq", group=GROUP)
    whole = Checkpoint(source).config.vocab_size
    for checkpoint, engine in ((source, "fp32"), (folder / "w4a16", "int4")):
        build_engine(Checkpoint(checkpoint), folder / engine, top_k=whole)
    build_engine(Checkpoint(folder / "w4a16"), folder / "engine")
    exact, rounded = CpuTarget(activations="fp32", unpacked_bytes=0), CpuTarget(activations="int8", unpacked_bytes=0)
    build_engine(Checkpoint(folder / "w4a16"), folder / "packed", target=exact, top_k=whole)
    build_engine(Checkpoint(folder / "w4a16"), folder / "w4a8", target=rounded)
    fp32, int4, packed, w4a8 = (alone(folder / engine) for engine in ("fp32", "engine", "packed", "w4a8"))
    fp32_reference, int4_reference = (load_reference(Checkpoint(weights)) for weights in (source, folder / "w4a16"))
    render, encode = int4.tokenizer.apply_chat_template, int4.tokenizer.encode
    prompts = [encode(render(record["messages"])) for record in records]
    some, fewer = spread(prompts, count), spread(prompts, count // 2)
    answers = [record["answer"] for record in records]
    random = write_random_checkpoint(folder / "random")
    build_engine(Checkpoint(random), folder / "random-fp32", top_k=whole)
    parts: dict[str, Callable[[], list[ProofRow]]] = {
        "logits": lambda: [
            logits_row("fp32, random network", folder / "random-fp32", load_reference(Checkpoint(random)), 1e-4),
            logits_row("fp32, tiny", folder / "fp32", fp32_reference, 1e-4),
            logits_row("w4a16, tiny", folder / "int4", int4_reference, 2e-2),
            logits_row("w4a16 packed, tiny", folder / "packed", int4_reference, 2e-2),
        ],
        "tokens": lambda: [
            *tokens_rows({"fp32": fp32}, fp32_reference, fewer, 1.0),
            *tokens_rows({"w4a16": int4, "w4a16 packed": packed}, int4_reference, fewer, 0.99),
            lossless_row("w4a16", int4, int4_reference, some),
            lossless_row("w4a16 packed", packed, int4_reference, some),
        ],
        "accuracy": lambda: accuracy_rows(fp32, int4, prompts, answers),
        "w4a8": lambda: w4a8_rows(packed, w4a8, prompts, answers),
        "memory": lambda: [memory_row(folder)],
        "adapter": lambda: adapter_rows(int4, some),
        "speed": lambda: speed_rows(int4, int4_reference, spread(prompts, 48)),
    }
    if only not in (None, *parts):
        raise SystemExit(f"--only {only} is unknown; give one of {', '.join(parts)}")
    return [row for name, measure in parts.items() if only in (None, name) for row in measure()]


def alone(engine: Path) -> LLM:
    """One request at a time and no prefix cache, so that every pass is computed."""
    return LLM(engine, max_batch_size=1, prefix_cache_bytes=0)


def spread(items: list[Any], count: int) -> list[Any]:
    """``count`` items at even distances, which include every kind of problem."""
    return [items[index] for index in np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)]


@torch.no_grad()
def logits_row(name: str, folder: Path, reference: NemotronLabsDiffusionModel, bar: float) -> ProofRow:
    """The largest relative L2 distance between the logits of engine and reference, and the share of rows with the same
    best token. Passes: prefill, draft with adapter, and commit, at random lengths.
    """
    manifest, _, executor = load_engine(folder)
    rng, limits, model, distances, agreements = np.random.default_rng(0), manifest.limits, manifest.model, [], []

    def compare(found: Any, expected: Any) -> None:
        distances.append(distance(found, expected, model.mask_token_id))
        expected[..., model.mask_token_id] = -np.inf
        agreements.append(np.mean(found.tokens[..., 0] == expected.argmax(-1)))

    longest = min(limits.capacity, 4128) - 32
    slot, rows = executor.pool.acquire(), np.arange(32)[None]
    for length in sorted([*rng.integers(1, longest, 11), longest]):
        ids = rng.integers(0, model.vocab_size, (1, length + 32))
        ids[ids == model.mask_token_id] += 1
        prompt, block, past = ids[:, :length], ids[:, length:].copy(), None
        for begin in range(0, length, limits.prefill_step):
            chunk = prompt[:, begin : begin + limits.prefill_step]
            last = np.array([[chunk.shape[1] - 1]])
            found = executor.run(CausalStep.chain(slot, chunk, np.array([begin]), last))
            expected, past = reference_pass(reference, chunk, past, causal, False)
        compare(found, expected[:, -1:])
        masked = np.where(rng.random(block.shape) < 0.7, model.mask_token_id, block)
        at = np.array([length])
        found = executor.run(BidirectionalStep.block(slot, masked, at, rows, np.array([32]), np.array([True])))
        expected, _ = reference_pass(reference, masked, past, bidirectional, True)
        compare(found, expected)
        found = executor.run(CausalStep.chain(slot, block, at, rows))
        expected, _ = reference_pass(reference, block, past, causal, False)
        compare(found, expected)
    executor.pool.release(slot)
    worst = max(distances)
    found_text = f"{worst:.1e}; same best token in {np.mean(agreements):.2%}"
    return ProofRow(
        f"{name}: logits against the reference, up to {longest} tokens", f"<= {bar:g}", found_text, worst <= bar
    )


def reference_pass(reference: Any, ids: Any, past: Any, pattern: Callable[..., Any], adapter: bool) -> tuple[Any, Any]:
    start = 0 if past is None else past[0][0].shape[2]
    positions = torch.arange(start, start + ids.shape[1])[None]
    with reference.draft_adapter(adapter):
        hidden, present = reference.encoder(torch.from_numpy(ids), positions, pattern(1, ids.shape[1], start), past)
        return reference.diffusion_head(hidden).numpy(), present


def distance(found: Any, expected: Any, mask: int) -> float:
    dense = np.empty_like(found.logits)
    np.put_along_axis(dense, found.tokens, found.logits, axis=-1)
    dense, expected = np.delete(dense, mask, -1), np.delete(expected, mask, -1)
    return float(np.linalg.norm(dense - expected) / np.linalg.norm(expected))


def answer(llm: LLM, prompt: list[int], mode: Any, **options: Any) -> CompletionOutput:
    tokens = min(MAX_TOKENS, llm.manifest.limits.capacity - len(prompt))
    block = {} if mode == "ar" else {"block_length": BLOCK_LENGTH}
    params = SamplingParams(**{"mode": mode, "max_tokens": tokens} | block | options)
    return llm.generate(prompt, params).outputs[0]


def reference_answer(reference: NemotronLabsDiffusionModel, prompt: list[int], mode: str) -> list[int]:
    ids = torch.tensor([prompt])
    tokens = min(MAX_TOKENS, reference.config.max_position_embeddings - len(prompt))
    if mode == "ar":
        out, _ = reference.ar_generate(ids, tokens)
    elif mode == "diffusion":
        out, _ = reference.generate(ids, tokens, block_length=BLOCK_LENGTH, threshold=THRESHOLD)
    else:
        out, _ = reference.linear_spec_generate(ids, tokens, block_length=BLOCK_LENGTH)
    return out[0, len(prompt) :].tolist()


def tokens_rows(
    engines: dict[str, LLM], reference: NemotronLabsDiffusionModel, prompts: list[list[int]], bar: float
) -> list[ProofRow]:
    """For each mode and engine: the number of answers with exactly the reference's tokens."""
    rows = []
    for mode in MODES:
        exceptions: dict[str, list[float]] = {name: [] for name in engines}
        for prompt in track(prompts, f"tokens {mode}", transient=True, console=Console(stderr=True)):
            expected = reference_answer(reference, prompt, mode)
            for name, llm in engines.items():
                found = answer(llm, prompt, mode).token_ids
                if found != expected:
                    exceptions[name].append(margin(reference, prompt, found, expected, mode))
        for name, margins in exceptions.items():
            rows.append(equality_row(f"{name} {mode}: tokens equal to the reference's", bar, len(prompts), margins))
    return rows


def lossless_row(name: str, llm: LLM, reference: NemotronLabsDiffusionModel, prompts: list[list[int]]) -> ProofRow:
    margins = []
    for prompt in track(prompts, f"{name}: linear_spec", transient=True, console=Console(stderr=True)):
        found, expected = (answer(llm, prompt, mode).token_ids for mode in ("linear_spec", "ar"))
        if found != expected:
            margins.append(margin(reference, prompt, found, expected, "ar"))
    return equality_row(f"{name} engine: linear_spec emits ar's tokens", 1.0, len(prompts), margins)


def equality_row(what: str, bar: float, count: int, margins: list[float]) -> ProofRow:
    """margins: of the texts that differ. count: number of all texts."""
    found = f"{count - len(margins)} of {count}"
    if margins:
        found += f"; margins {', '.join(f'{margin:.1e}' for margin in margins)}"
    return ProofRow(what, f"{bar:.0%}", found, count - len(margins) >= bar * count)


@torch.no_grad()
def margin(reference: Any, prompt: list[int], found: list[int], expected: list[int], mode: str) -> float:
    """Logit of the expected token minus logit of the found one at the first difference, in the pass in which the
    reference chose the token. Infinite if one text is a prefix of the other.
    """
    at = next((i for i, tokens in enumerate(zip(found, expected, strict=False)) if tokens[0] != tokens[1]), None)
    if at is None:
        return math.inf
    place = at % BLOCK_LENGTH
    if mode == "diffusion" and place:  # the first token of a block is a causal row's
        logits = accepting_logits(reference, prompt + expected[: at - place], place)
    else:
        with reference.draft_adapter(False):
            logits = reference(torch.tensor([prompt + expected[:at]])).logits[0, -1]
    return float(logits[expected[at]] - logits[found[at]])


def accepting_logits(reference: Any, prompt: list[int], place: int) -> Any:
    """Logits of the denoise pass in which the block after ``prompt`` got its token at ``place``."""
    denoise, passes = reference._bidirectional_logits, []

    def recorded(block: torch.Tensor, cache: Any, adapter: bool) -> torch.Tensor:
        passes.append((block.clone(), denoise(block, cache, adapter)))
        return passes[-1][1]

    with mock.patch.object(reference, "_bidirectional_logits", recorded):
        ids = torch.tensor([prompt])
        reference.generate(ids, BLOCK_LENGTH + 1, block_length=BLOCK_LENGTH, threshold=THRESHOLD)
    return [logits[place] for block, logits in passes if block[place] == reference.config.mask_token_id][-1]


def accuracy_rows(fp32: LLM, int4: LLM, prompts: list[list[int]], answers: list[str]) -> list[ProofRow]:
    """Share of held-out prompts that are answered exactly."""

    def score(llm: LLM, name: str, mode: str) -> float:
        pairs = list(zip(prompts, answers, strict=True))
        shown = track(pairs, f"accuracy {name} {mode}", transient=True, console=Console(stderr=True))
        return 100 * statistics.fmean(answer(llm, prompt, mode).text == text for prompt, text in shown)

    rows = []
    for mode in ("ar", "diffusion"):
        whole, quantised = score(fp32, "fp32", mode), score(int4, "w4a16", mode)
        if mode == "ar":
            rows.append(ProofRow("fp32 ar, held-out exact match", ">= 85 %", f"{whole:.1f} %", whole >= 85))
        found = f"{whole:.1f} % fp32, {quantised:.1f} % w4a16 of {len(prompts)}"
        what = f"{mode}, held-out exact match, w4a16 in groups of {GROUP} against fp32"
        rows.append(ProofRow(what, "at most 1 point less", found, whole - quantised <= 1))
    return rows


def w4a8_rows(exact: LLM, rounded: LLM, prompts: list[list[int]], answers: list[str]) -> list[ProofRow]:
    """Compare int8 activations in int4 products, the default for large models on a CPU, with exact products: exact
    match of the answers in each mode, and equality of the tokens of self-speculation and AR.
    """
    rows, texts = [], {}
    for mode in ("ar", "diffusion", "linear_spec"):
        scores = []
        for name, llm in (("w4a16 packed", exact), ("w4a8", rounded)):
            shown = track(prompts, f"{name} {mode}", transient=True, console=Console(stderr=True))
            texts[name, mode] = [answer(llm, prompt, mode) for prompt in shown]
            pairs = zip(texts[name, mode], answers, strict=True)
            scores.append(100 * statistics.fmean(found.text == text for found, text in pairs))
        shares = f"{scores[0]:.1f} % w4a16 packed, {scores[1]:.1f} % w4a8 of {len(prompts)}"
        what = f"{mode}, held-out exact match, int8 activations against exact products"
        rows.append(ProofRow(what, "at most 1 point less", shares, scores[0] - scores[1] <= 1))
    both = zip(texts["w4a8", "linear_spec"], texts["w4a8", "ar"], strict=True)
    equal = sum(found.token_ids == expected.token_ids for found, expected in both)
    what = "linear_spec = ar with int8 activations"
    rows.append(ProofRow(what, "all", f"{equal} of {len(prompts)}", equal == len(prompts)))
    return rows


def memory_row(folder: Path) -> ProofRow:
    """Proportional set size of a process that ran both engines, divided by that of a process that ran only AR.

    The random network has 250 million parameters, which makes the interpreter's own memory negligible.
    """
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "vocab_size": 32768}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
    write_random_checkpoint(folder / "large", **shape, **heads)
    quantize_checkpoint(Checkpoint(folder / "large"), folder / "large-int4", method="rtn", head="int4")
    build_engine(Checkpoint(folder / "large-int4"), folder / "large-engine")
    sizes = [statistics.median(resident_mib(folder / "large-engine", engines) for _ in range(3)) for engines in (1, 2)]
    ratio = sizes[1] / sizes[0]
    found = f"{ratio:.2f} ({sizes[0]:.0f} to {sizes[1]:.0f} MiB)"
    return ProofRow("memory (PSS) of both engines against one, 250 M parameters", "<= 1.15", found, ratio <= 1.15)


def adapter_rows(llm: LLM, prompts: list[list[int]]) -> list[ProofRow]:
    """Tokens per cycle with and without the adapter on the same texts, with a paired bootstrap over prompts."""
    rows = []
    for size in (BLOCK_LENGTH, 32):
        cycles, tokens = [], []
        for prompt in track(prompts, f"adapter, block {size}", transient=True, console=Console(stderr=True)):
            options = ({"adapter": adapter, "block_length": size} for adapter in (True, False))
            both = [answer(llm, prompt, "linear_spec", **chosen) for chosen in options]
            cycles.append([result.counts.cycles for result in both])
            tokens.append(both[0].length - 1)
        counted, emitted = np.array(cycles), np.array(tokens)
        samples = np.random.default_rng(0).integers(0, len(prompts), (2000, len(prompts)))
        gains = counted[samples, 1].sum(1) / counted[samples, 0].sum(1) - 1
        low, high = np.quantile(gains, (0.025, 0.975))
        rates = emitted.sum() / counted.sum(0)
        gain = rates[0] / rates[1] - 1
        if size == BLOCK_LENGTH:
            rows.append(
                ProofRow(
                    "linear_spec without adapter, tokens per cycle, block 16",
                    ">= 4",
                    f"{rates[1]:.2f}",
                    bool(rates[1] >= 4),
                )
            )
        found = f"{rates[1]:.2f} to {rates[0]:.2f} tokens per cycle, {gain:+.1%} [{low:+.1%}, {high:+.1%}]"
        rows.append(ProofRow(f"gain of the adapter, block {size}", ">= 10 %", found, bool(gain >= 0.1)))
    return rows


def speed_rows(llm: LLM, reference: NemotronLabsDiffusionModel, prompts: list[list[int]]) -> list[ProofRow]:
    """Tokens per second over the prompts; engine and reference take turns of some prompts each.

    After 30 ms idle, ONNX Runtime's worker threads need milliseconds to wake, as long as a whole answer; hence turns of
    ten prompts. The comparison with the reference includes the prefill. The comparison between the engine's modes
    leaves out the prefill and the token that it gives.
    """
    tokens, seconds = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    turns = [prompts[first : first + PROMPTS_PER_TURN] for first in range(0, len(prompts), PROMPTS_PER_TURN)]
    for turn in track(turns, "speed", transient=True, console=Console(stderr=True)):
        for mode in MODES:
            time.sleep(SETTLING_SECONDS)
            begun = time.perf_counter()
            tokens["reference", mode] += sum(len(reference_answer(reference, prompt, mode)) for prompt in turn)
            seconds["reference", mode] += time.perf_counter() - begun
            time.sleep(SETTLING_SECONDS)
            begun = time.perf_counter()
            results = [answer(llm, prompt, mode) for prompt in turn]
            seconds["engine", mode] += time.perf_counter() - begun
            for result in results:
                tokens["engine", mode] += result.length
                tokens["decoding", mode] += result.length - 1
                seconds["decoding", mode] += result.seconds - result.time_to_first_token  # type: ignore[operator]
    pace = {key: tokens[key] / seconds[key] for key in tokens}
    rows = []
    for mode in MODES:
        ratio = pace["engine", mode] / pace["reference", mode]
        found = f"{ratio:.1f} ({pace['engine', mode]:.0f} against {pace['reference', mode]:.0f})"
        rows.append(ProofRow(f"{mode}: engine against the fp32 reference, tokens per second", "-", found, None))
    ratio = pace["decoding", "linear_spec"] / pace["decoding", "ar"]
    found = f"{ratio:.2f} ({pace['decoding', 'linear_spec']:.0f} against {pace['decoding', 'ar']:.0f})"
    rows.append(ProofRow("linear_spec against ar, engine, tokens per second after the prefill", "-", found, None))
    return rows


if __name__ == "__main__":
    main()
