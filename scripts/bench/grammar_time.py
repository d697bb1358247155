"""Measure the processor time of decoding outside the engines, a cycle, with and without a grammar.

    python -m scripts.bench.grammar_time checkpoints/tiny

The vocabulary has 131,072 tokens: those of the checkpoint's tokenizer, and made-up pieces of words. There is no
network. Candidates are made up, as many as target cpu returns: the token of an answer to the schema first with the
given probability, else among random tokens. So the time is that of choosing drafts, masks, verification and emission,
on one thread, with the server's settings of the garbage collector. Each schema was answered once before, with other
values. The answers of a batch do each of these in turn, as in the scheduler, and a new answer takes the place of one
that ends.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.support.drawn_schemas import Schema, drawn_schema
from trimode.model.tokenizer import TOKENIZER_FILE, Tokenizer
from trimode.runtime.decoding.acceptance_rates import Acceptance, SharedAcceptance
from trimode.runtime.decoding.ending import Ending
from trimode.runtime.decoding.ruled_rows import AgainRate
from trimode.runtime.decoding.sequence import Pass, Sequence
from trimode.runtime.decoding.token_rules import TokenRules
from trimode.runtime.executor import Candidates
from trimode.runtime.grammar.compiler import GrammarCompiler
from trimode.runtime.grammar.matcher import GrammarMatcher
from trimode.runtime.openai_server.server import GARBAGE_OBJECTS
from trimode.runtime.request.guided_decoding import GuidedDecodingParams
from trimode.runtime.request.sampling_params import SamplingParams

VOCABULARY, TOP_K, END, MASK = 131_072, 64, 11, 100
_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="whose tokenizer is enlarged")
    parser.add_argument("--batches", default="1,16", help="answers at once, with commas")
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--right", type=float, default=0.9, help="probability that a draft is right")
    arguments = parser.parse_args()
    # If RUST_BACKTRACE is 1, llguidance captures a backtrace wherever a grammar ends, which takes 25 to 80 us.
    os.environ["RUST_LIB_BACKTRACE"] = "0"
    gc.set_threshold(GARBAGE_OBJECTS)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = enlarged_tokenizer(arguments.checkpoint, Path(folder))
    compiler, other = (GrammarCompiler(tokenizer, VOCABULARY, [END]) for _ in range(2))
    schemas = [drawn_schema(seed) for seed in range(arguments.schemas)]
    answers_of = [answer_to(other, schema, seed) for seed, schema in enumerate(schemas)]
    for seed, schema in enumerate(schemas):
        answer_to(compiler, schema, arguments.schemas + seed)
    batches = [int(batch) for batch in arguments.batches.split(",")]
    table = Table("mode", "grammar", *(f"batch of {batch}: median; 90th percentile, ms a cycle" for batch in batches))
    for constrained in (True, False):
        for mode in ("ar", "linear_spec"):
            params = SamplingParams(
                max_tokens=400, mode=mode, block_length=None if mode == "ar" else arguments.block
            ).with_defaults(mode=mode, block_length=None, max_tokens=400)
            cells = []
            for batch in batches:
                matchers = [
                    compiler.compile(GuidedDecodingParams(json=schema)).matcher() if constrained else None
                    for schema in schemas
                ]
                answers = list(made_up_answers(answers_of, matchers, arguments.right, params))
                gc.freeze()
                cycles = Cycles()
                cycles.run(iter(answers), batch)
                high = float(np.percentile(cycles.seconds, 90))
                cells.append(f"{1e3 * statistics.median(cycles.seconds):.3f}; {1e3 * high:.3f}")
            table.add_row(mode, "yes" if constrained else "no", *cells)
            if constrained:
                shown = f"{mode} with the grammar: {cycles.tokens_a_cycle:.2f} tokens a cycle"
    Console(width=140).print(table)
    Console().print(shown)


def enlarged_tokenizer(checkpoint: Path, folder: Path) -> Tokenizer:
    """The checkpoint's tokenizer with pieces of words up to VOCABULARY tokens."""
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / TOKENIZER_FILE
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    for piece, (left, right) in _pieces():
        if piece not in vocabulary:
            vocabulary[piece] = len(vocabulary)
            merges.append([left, right])
        if len(vocabulary) == VOCABULARY:
            break
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return Tokenizer.from_folder(folder)


def _pieces() -> Iterator[tuple[str, tuple[str, str]]]:
    """Each with the two shorter pieces that it is merged from. ``Ġ`` is a space."""
    for length in itertools.count(2):
        for letters in itertools.product(_LETTERS, repeat=length - 1):
            for first in ("Ġ", *_LETTERS[:8]):
                piece = first + "".join(letters)
                yield piece, (piece[:-1], piece[-1])


def answer_to(compiler: GrammarCompiler, schema: Schema, seed: int) -> list[int]:
    """The tokens of a random answer: forced ones where there are some, else a legal token.

    As in texts, the n-th token is drawn with a probability of about 1 / n: a vocabulary's first tokens are the common
    ones.
    """
    draw = np.random.default_rng(seed)
    matcher = compiler.compile(GuidedDecodingParams(json=schema)).matcher()
    tokens: list[int] = []
    while len(tokens) < 300 and not matcher.ended:
        token = matcher.forced_token
        if token is None:
            legal = np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little"))
            token = int(legal[int(len(legal) ** draw.random()) - 1])
        if not matcher.take(token):
            raise ValueError(f"token {token} is not legal")
        tokens.append(token)
    return tokens


class MadeUpNetwork:
    """right: probability that a draft's best candidate is the answer's token; verification always has it."""

    def __init__(self, answer: list[int], right: float, seed: int) -> None:
        self._answer = [*answer, *[END] * 400]
        self._right = right
        self._draw = np.random.default_rng(seed)

    def run(self, needed: Pass, emitted: int, asked: int | None) -> Candidates:
        rows, ranks = len(needed.rows), asked or TOP_K
        tokens = self._draw.integers(101, VOCABULARY, (rows, ranks))
        begin = emitted + (0 if needed.kind == "commit" else -1)
        for row, place in enumerate(needed.rows.tolist()):
            if needed.kind != "draft" or self._draw.random() < self._right:
                tokens[row, 0] = self._answer[begin + place]
        if needed.kind == "prefill":
            tokens[0, 0] = self._answer[0]
        logits = np.tile(np.arange(ranks, 0, -1, dtype=np.float32), (rows, 1))
        return Candidates(logits, tokens, np.full(rows, ranks + 1, np.float32))


class Answer(NamedTuple):
    """An answer behind its prefill, and what stands for its network."""

    sequence: Sequence
    network: MadeUpNetwork


def made_up_answers(
    texts: list[list[int]], matchers: list[GrammarMatcher | None], right: float, params: SamplingParams
) -> Iterator[Answer]:
    again_rate = AgainRate()
    for seed, (text, matcher) in enumerate(zip(texts, matchers, strict=True)):
        network = MadeUpNetwork(text, right, seed)
        rules = None if matcher is None else TokenRules(VOCABULARY, {END}, grammar=matcher)
        one = sequence(params, rules, again_rate)
        first = one.next_pass()
        one.absorb(first, network.run(first, 0, one.candidates))
        if one.ending.finish_reason is None:
            yield Answer(one, network)


def sequence(params: SamplingParams, rules: TokenRules | None, again_rate: AgainRate) -> Sequence:
    ending = Ending(params, frozenset([END]))
    options: dict[str, Any] = {"context": 4096, "mask_id": MASK, "prefill_step": 512, "seed": 0}
    rates = {"acceptance": Acceptance(SharedAcceptance()), "again_rate": again_rate}
    return Sequence([300, 301], params, ending, rules=rules, **rates, **options)


class Cycles:
    """seconds: processor time of each cycle of a whole batch, without the network's."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._answers: list[Answer] = []
        self._spent = 0.0

    @property
    def tokens_a_cycle(self) -> float:
        """Of one answer. Its first token comes from the prefill."""
        tokens = sum(len(answer.sequence.emitted) - 1 for answer in self._answers)
        return tokens / sum(answer.sequence.counts.cycles for answer in self._answers)

    def run(self, answers: Iterator[Answer], batch: int) -> None:
        """Decode the answers, always so many at once. Cycles of fewer are not run."""
        active: list[Answer] = []
        while True:
            active = [answer for answer in active if answer.sequence.ending.finish_reason is None]
            joining = list(itertools.islice(answers, batch - len(active)))
            active += joining
            self._answers += joining
            if len(active) < batch:
                return
            self._spent = 0.0
            begun = time.thread_time()
            for one, _ in active:
                one.open_block(one.longest_block)
            self._spent += time.thread_time() - begun
            self._passes([answer for answer in active if answer.sequence.fills_block])
            self._passes([answer for answer in active if not answer.sequence.needs_block])
            self._passes([answer for answer in active if answer.sequence.runs_again])
            self.seconds.append(self._spent)

    def _passes(self, answers: list[Answer]) -> None:
        """One pass of each, as the scheduler makes them: all are prepared, run, and processed."""
        begun = time.thread_time()
        needed = [one.next_pass() for one, _ in answers]
        self._spent += time.thread_time() - begun
        found = [
            network.run(each, len(one.emitted), one.draft_candidates if each.kind == "draft" else one.candidates)
            for each, (one, network) in zip(needed, answers, strict=True)
        ]
        begun = time.thread_time()
        for each, (one, _), candidates in zip(needed, answers, found, strict=True):
            one.absorb(each, candidates)
        self._spent += time.thread_time() - begun


if __name__ == "__main__":
    main()
