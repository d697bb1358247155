"""Constrained decoding equals masked autoregression over the whole vocabulary, in every causal mode.

Two engines: the shipped checkpoint with 64 candidates a row, and a random network with 4 candidates, of which hardly
ever one is legal, so that nearly every row is run again with its mask.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import numpy as np
import pytest

from tests.support.drawn_schemas import drawn_schema
from tests.support.masked_ar import masked_ar
from trimode import LLM, CompletionOutput, GuidedDecodingParams, SamplingParams
from trimode.build.engine_builder import build_engine
from trimode.common.errors import TriModeError
from trimode.model.checkpoint import Checkpoint
from trimode.model.reference.loading import load_reference
from trimode.model.reference.network import NemotronLabsDiffusionModel
from trimode.runtime.decoding.acceptance_rates import Acceptance, SharedAcceptance
from trimode.runtime.decoding.bad_words import BadWords
from trimode.runtime.decoding.ending import Ending
from trimode.runtime.decoding.ruled_rows import Biases, RuledRows
from trimode.runtime.decoding.sequence import Sequence
from trimode.runtime.decoding.token_rules import TokenRules, are_legal
from trimode.runtime.executor import Candidates
from trimode.runtime.grammar.compiler import CompiledGrammar
from trimode.runtime.request.errors import GrammarError

MODES: tuple[dict[str, Any], ...] = (
    {"mode": "ar"},
    {"mode": "linear_spec", "block_length": 8},
    {"mode": "linear_spec", "block_length": 16, "draft_threshold": 0.5},
    {"mode": "linear_spec", "block_length": 8, "tree_width": 16},
    {"mode": "auto"},
)
CHAT = [{"role": "user", "content": "Describe a user as JSON."}]
GRAMMARS: tuple[dict[str, Any], ...] = (
    {"json_object": True},
    {"regex": r"(the answer is (yes|no)[.!] ?){1,3}"},
    {"choice": ["Paris", "Łódź", "São Paulo", "Parma"]},
    {"grammar": 'start: item ("," item)~1..4\nitem: /[a-z]{1,6}/ "=" /[0-9]{1,3}/'},
    {
        "structural_tag": {
            "triggers": ["<call>"],
            "structures": [{"begin": "<call>", "schema": drawn_schema(3), "end": "</call>"}],
        }
    },
)


class Case(NamedTuple):
    llm: LLM
    reference: NemotronLabsDiffusionModel

    @property
    def prompt(self) -> list[int]:
        return self.llm.tokenizer.encode(self.llm.tokenizer.apply_chat_template(CHAT))

    def compiled(self, guided: GuidedDecodingParams) -> CompiledGrammar:
        return self.llm._grammars.compile(guided)

    def answers(self, *beside: SamplingParams, **options: Any) -> list[CompletionOutput]:
        """Answers with these options in all modes, and then those of other parameters: all in one batch."""
        params = [*(SamplingParams(**options, **mode) for mode in MODES), *beside]
        return [answer.outputs[0] for answer in self.llm.generate([self.prompt] * len(params), params)]

    def expected(self, max_tokens: int, guided: GuidedDecodingParams | None = None, **rules: Any) -> list[int]:
        model = self.llm.manifest.model
        grammar = None if guided is None else self.compiled(guided)
        return masked_ar(
            self.reference, self.prompt, grammar, max_tokens, model.eos_token_id, mask_id=model.mask_token_id, **rules
        )


@pytest.fixture(scope="module", params=["tiny", "random"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    if request.param == "tiny":
        engine = request.getfixturevalue("tiny_engine")
        checkpoint = engine.parent / "w4a16"
    else:
        checkpoint = request.getfixturevalue("random_checkpoint")
        engine = tmp_path_factory.mktemp("engine") / "four"
        build_engine(Checkpoint(checkpoint), engine, top_k=4)
    with LLM(engine, max_batch_size=8) as llm:
        yield Case(llm, load_reference(Checkpoint(checkpoint)))


@pytest.fixture(scope="module")
def tiny(tiny_engine: Path) -> Iterator[LLM]:
    with LLM(tiny_engine, max_batch_size=8) as llm:
        yield llm


# Objects with arrays, numbers, and patterns; a union, definitions, an array.
@pytest.mark.parametrize("seed", [0, 5, 22, 1, 3, 32])
def test_greedy_answers_under_drawn_schemas_are_those_of_masked_ar(case: Case, seed: int) -> None:
    """Beside an answer without rules."""
    schema = drawn_schema(seed)
    guided = GuidedDecodingParams(json=schema)
    free = SamplingParams(max_tokens=30, mode="linear_spec")
    *answers, beside = case.answers(free, max_tokens=100, guided_decoding=guided)
    expected = case.expected(100, guided)
    for mode, output in zip(MODES, answers, strict=True):
        assert output.token_ids == expected, mode
        if output.finish_reason == "stop":
            jsonschema.validate(json.loads(output.text), schema)
    assert beside.token_ids == case.llm.generate(case.prompt, free).outputs[0].token_ids


@pytest.mark.parametrize("fields", GRAMMARS, ids=lambda fields: next(iter(fields)))
def test_greedy_answers_under_each_kind_of_grammar_are_those_of_masked_ar(case: Case, fields: dict[str, Any]) -> None:
    guided = GuidedDecodingParams(**fields)
    expected = case.expected(60, guided)
    for mode, output in zip(MODES, case.answers(max_tokens=60, guided_decoding=guided), strict=True):
        assert output.token_ids == expected, mode


def test_biases_banned_tokens_and_least_lengths_are_exact(case: Case) -> None:
    """Also for tokens outside the candidates: a bias that lifts the least likely token is honoured."""
    free = case.expected(40)
    frequent = max(set(free), key=free.count)
    rules: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
        ({"logit_bias": {200: 8.0, frequent: -5.0, 300: 7.5}}, {"biases": {200: 8.0, frequent: -5.0, 300: 7.5}}),
        ({"logit_bias": dict.fromkeys(range(101, 300), 3.0)}, {"biases": dict.fromkeys(range(101, 300), 3.0)}),
        ({"logit_bias": dict.fromkeys(free, -100)}, {"biases": dict.fromkeys(free, -100.0)}),
        ({"bad_token_ids": free}, {"banned": free}),
        ({"allowed_token_ids": [200, 201, 202]}, {"banned": sorted({*range(768)} - {200, 201, 202})}),
        ({"min_tokens": 30}, {"min_tokens": 30}),
    )
    for options, of_reference in rules:
        expected = case.expected(40, **of_reference)
        for mode, output in zip(MODES, case.answers(max_tokens=40, **options), strict=True):
            assert output.token_ids == expected, (mode, options)


def test_biases_beside_a_grammar_are_exact(case: Case) -> None:
    guided = GuidedDecodingParams(json=drawn_schema(7))
    end = case.llm.manifest.model.eos_token_id[0]
    biases = dict.fromkeys(case.llm.tokenizer.encode('0123456789"'), 5.0) | {end: 1.0}
    expected = case.expected(60, guided, biases=biases)
    answers = case.answers(max_tokens=60, guided_decoding=guided, logit_bias=biases)
    for mode, output in zip(MODES, answers, strict=True):
        assert output.token_ids == expected, mode


DRAWS: tuple[dict[str, Any], ...] = ({"temperature": 1.0}, {"temperature": 0.8, "top_k": 3}, {"top_p": 0.9})


@pytest.mark.parametrize(("seed", "options"), list(enumerate(DRAWS)), ids=str)
def test_draws_are_those_of_ar_with_the_same_seed(case: Case, seed: int, options: dict[str, Any]) -> None:
    """Each alone, so that no other answer's passes change its bits."""
    guided = GuidedDecodingParams(json=drawn_schema(20 + seed))
    common: dict[str, Any] = {"max_tokens": 60, "seed": seed, "guided_decoding": guided} | options

    def answer(**changes: Any) -> list[int]:
        return case.llm.generate(case.prompt, SamplingParams(**common, **changes)).outputs[0].token_ids

    expected = answer(mode="ar")
    for mode in MODES[1:]:
        assert answer(**mode) == expected, mode
    assert answer(mode="ar", logprobs=2) == answer(mode="linear_spec", logprobs=2) == expected
    penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.5}
    assert answer(mode="linear_spec", **penalties) == answer(mode="ar", **penalties)


def test_log_probabilities_are_over_the_whole_vocabulary(case: Case) -> None:
    """Of forced tokens, and of tokens outside the candidates, too."""
    guided = GuidedDecodingParams(json=drawn_schema(5))
    params = SamplingParams(max_tokens=30, guided_decoding=guided, logprobs=2, mode="linear_spec", block_length=8)
    output = case.llm.generate(case.prompt, params).outputs[0]
    assert output.token_ids == case.expected(30, guided)
    import torch

    with torch.no_grad():
        logits, _ = case.reference._causal_pass(torch.tensor([*case.prompt, *output.token_ids[:-1]]), [])
    rows = logits[len(case.prompt) - 1 :].float()
    rows[:, case.llm.manifest.model.mask_token_id] = -np.inf
    expected = torch.log_softmax(rows, dim=-1).numpy()
    assert output.logprobs is not None
    for row, found in enumerate(output.logprobs):
        token = output.token_ids[row]
        assert next(iter(found)) == token
        assert found[token].logprob == pytest.approx(expected[row, token], abs=2e-4)
        assert len(found) in (2, 3)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_bad_words_never_appear_however_they_are_spelled(tiny: LLM, mode: dict[str, Any]) -> None:
    chat = [{"role": "user", "content": "What is 60% of 440?"}]
    free = tiny.generate(chat, SamplingParams(max_tokens=60, **mode)).outputs[0].text
    words = [free[at : at + 3] for at in (2, 9, 15)]
    text = tiny.generate(chat, SamplingParams(max_tokens=60, bad=words, **mode)).outputs[0].text
    assert text
    assert not any(word in text for word in words)
    alone = tiny.generate(chat, SamplingParams(max_tokens=60, bad=words, mode="ar")).outputs[0].text
    assert text == alone


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_grammar_begins_after_the_thought(tiny: LLM, mode: dict[str, Any]) -> None:
    schema = {"type": "object", "properties": {"answer": {"type": "integer"}}, "required": ["answer"]}
    params = SamplingParams(
        max_tokens=120, max_thinking_tokens=20, guided_decoding=GuidedDecodingParams(json=schema), **mode
    )
    output = tiny.generate([{"role": "user", "content": "What is 60% of 440?"}], params, enable_thinking=True).outputs[
        0
    ]
    end = tiny.tokenizer.token_id("</think>")
    at = output.token_ids.index(end)
    assert 0 < at <= 20
    matcher = tiny._grammars.compile(GuidedDecodingParams(json=schema)).matcher()
    assert all(matcher.take(token) for token in output.token_ids[at + 1 :])
    ar = tiny.generate(
        [{"role": "user", "content": "What is 60% of 440?"}],
        SamplingParams(
            max_tokens=120, max_thinking_tokens=20, guided_decoding=GuidedDecodingParams(json=schema), mode="ar"
        ),
        enable_thinking=True,
    ).outputs[0]
    assert output.token_ids == ar.token_ids


def test_no_end_token_is_legal_in_the_thought_or_before_min_tokens(tiny: LLM) -> None:
    """Undone tokens do not count."""
    end, close = 11, 13
    grammar = tiny._grammars.compile(GuidedDecodingParams(regex="a*")).matcher()
    rules = TokenRules(768, {end}, grammar=grammar, thought_end=close)
    for token in (200, close):
        assert not rules.allows(end)
        assert not are_legal(rules.mask(), np.array([end]))[0]
        rules.take(token)
    assert rules.allows(end)
    assert are_legal(rules.mask(), np.array([end]))[0]
    rules.undo(1)
    assert rules.allows(200)
    assert not rules.allows(end)
    rules.take(close)
    rules.take(tiny.tokenizer.encode("a")[0])
    rules.undo(3)  # the first two tokens of them are in the thought
    assert rules.allows(200)
    assert not rules.allows(end)
    short = TokenRules(768, {end}, min_tokens=2)
    for token in (200, 201):
        assert not short.allows(end)
        assert not are_legal(short.mask(), np.array([end]))[0]
        short.take(token)
    assert short.allows(end)
    short.undo(1)
    assert not short.allows(end)


@pytest.mark.parametrize("other", ["none", "allowed", "banned", "bad_words", "min_tokens", "thought_end"])
def test_tokens_taken_at_once_are_those_that_the_masks_allow(tiny: LLM, other: str) -> None:
    """With a grammar that forces "12", then allows digits, and each of the other rules alone."""
    end, close = 11, 13
    one, two, three = (tiny.tokenizer.encode(digit)[0] for digit in "123")
    given: dict[str, Any] = {
        "allowed": [one, two, end],
        "banned": [three],
        "bad_words": BadWords(["23", "11"], tiny._grammars.token_texts),
        "min_tokens": 4,
        "thought_end": close,
    }
    compiled = tiny._grammars.compile(GuidedDecodingParams(regex="12[1-3]{0,4}"))
    runs = ([one, two, one, end], [one, two, three, end], [one, two, one, one, end], [one, two, one, three, two, end])
    for tokens in [[*begin, *run] for run in runs for begin in ([], [close], [three, close])]:
        single, together = (
            TokenRules(
                768, {end}, grammar=compiled.matcher(), **{name: rule for name, rule in given.items() if name == other}
            )
            for _ in range(2)
        )
        legal = list[int]()
        for token in tokens:
            if single.ended or not are_legal(single.mask(), np.array([token]))[0]:
                break
            assert single.allows(token)
            single.take(token)
            legal.append(token)
        assert together.take_all(tokens) == len(legal)
        if not together.ended and len(legal) < len(tokens):
            assert not together.allows(tokens[len(legal)])
            assert not together.take_if_legal(tokens[len(legal)])
        together.undo(len(legal))
        run = together.take_forced(2)
        assert run == ([] if other == "thought_end" else [one, two])


@pytest.mark.parametrize("size", [31, 32, 33, 768])
def test_without_rules_all_tokens_of_the_model_are_legal_and_no_others(size: int) -> None:
    bits = np.unpackbits(TokenRules(size, set()).mask().view(np.uint8), bitorder="little")
    np.testing.assert_array_equal(np.flatnonzero(bits), np.arange(size))


def test_several_draws_stop_strings_and_reused_prefixes(tiny: LLM) -> None:
    schema = drawn_schema(5)
    common: dict[str, Any] = {
        "max_tokens": 60,
        "temperature": 1.0,
        "seed": 3,
        "guided_decoding": GuidedDecodingParams(json=schema),
    }
    spec = tiny.generate(CHAT, SamplingParams(n=4, mode="linear_spec", **common))
    ar = tiny.generate(CHAT, SamplingParams(n=4, mode="ar", **common))
    assert [each.token_ids for each in spec.outputs] == [each.token_ids for each in ar.outputs]
    assert len({each.text for each in ar.outputs}) > 1
    assert spec.outputs[1].counts.cached_tokens > 0
    stopped = tiny.generate(CHAT, SamplingParams(stop='"', mode="linear_spec", **common)).outputs[0]
    assert stopped.stop_reason == '"'
    assert ar.outputs[0].text.startswith(stopped.text)


def test_forced_text_costs_no_drafts(tiny: LLM) -> None:
    """A constant of many tokens comes in one cycle behind its first token, and its end in no pass at all."""
    guided = GuidedDecodingParams(regex="the quick brown fox jumps over the lazy dog (again|twice)[.]")
    output = tiny.generate(CHAT, SamplingParams(max_tokens=80, guided_decoding=guided, mode="auto")).outputs[0]
    assert output.finish_reason == "stop"
    assert output.counts.commit <= 4
    assert output.origins.count("forced") > 15
    assert output.counts.drafted < 60


def candidates(*best: int) -> Candidates:
    """One row for each token, which is by far the best."""
    tokens = np.array([[token, 400, 401] for token in best])
    return Candidates(
        np.tile(np.array([9, 1, 0], np.float32), (len(best), 1)), tokens, np.full(len(best), 9.1, np.float32)
    )


def under_regex(llm: LLM, regex: str, **options: Any) -> Sequence:
    params = SamplingParams(max_tokens=40, mode="linear_spec", block_length=4)
    return Sequence(
        [300],
        params,
        Ending(params, frozenset([11])),
        Acceptance(SharedAcceptance()),
        context=100,
        mask_id=100,
        prefill_step=10,
        seed=0,
        rules=TokenRules(768, {11}, grammar=llm._grammars.compile(GuidedDecodingParams(regex=regex)).matcher()),
        **options,
    )


def test_forced_text_behind_a_draft_joins_its_block_and_is_no_draft(tiny: LLM) -> None:
    """The draft proposes c; what the grammar forces behind it is verified in the same pass."""
    a, c = (tiny.tokenizer.encode(letter)[0] for letter in "ac")
    sequence = under_regex(tiny, "a(cdefgh[0-9]|xyz)")
    sequence.absorb(sequence.next_pass(), candidates(a))
    sequence.open_block(2)
    draft = sequence.next_pass()
    assert draft.kind == "draft"
    sequence.absorb(draft, candidates(c))
    commit = sequence.next_pass()
    assert tiny.tokenizer.decode(commit.tokens.tolist()) == "acdefgh"
    assert commit.masks is not None  # of the last row, for which there is no draft
    assert (commit.masks != ~np.uint32(0)).any(axis=1).tolist() == [False] * (len(commit.tokens) - 1) + [True]
    digit = tiny.tokenizer.encode("7")[0]
    sequence.absorb(commit, candidates(*commit.tokens[1:].tolist(), digit))
    assert sequence.counts.drafted == sequence.counts.accepted == 1
    forced = len(commit.tokens) - 2
    # The end needs no pass.
    assert sequence.origins == ["prefill", "accepted", *["forced"] * forced, "bonus", "forced"]


def test_a_block_whose_forced_text_yields_more_than_a_draft_has_none(tiny: LLM) -> None:
    sequence = under_regex(tiny, "a(bcdefghijklmnopqrstuvwxyz[0-9])")
    sequence.absorb(sequence.next_pass(), candidates(tiny.tokenizer.encode("a")[0]))
    sequence.open_block(4)
    commit = sequence.next_pass()
    assert commit.kind == "commit"
    assert tiny.tokenizer.decode(commit.tokens.tolist()) == "abcdefghijklmnopqrstuvwxyz"


def after_a_rejected_draft(llm: LLM, kept_guess: float) -> Sequence:
    """Behind 17, with the next block open: 234 was drafted, the rows say 7, 8, x and 5. Digits are legal, but no x."""
    sequence = under_regex(llm, "[0-9]{5}", kept_acceptance=Acceptance(SharedAcceptance(first_guess=kept_guess)))
    sequence.absorb(sequence.next_pass(), digits(llm, "1"))
    sequence.open_block(4)
    sequence.absorb(sequence.next_pass(), digits(llm, "234"))
    sequence.absorb(sequence.next_pass(), digits(llm, "78x5"))
    assert llm.tokenizer.decode(sequence.emitted) == "17"
    sequence.open_block(4)
    return sequence


def digits(llm: LLM, text: str) -> Candidates:
    """One row for each letter, which is by far the best, and 0 is the second."""
    zero = llm.tokenizer.encode("0")[0]
    found = candidates(*(llm.tokenizer.encode(letter)[0] for letter in text))
    return found._replace(tokens=np.stack([found.tokens[:, 0], np.full(len(text), zero), found.tokens[:, 2]], axis=1))


def test_rows_behind_a_rejected_draft_are_the_next_drafts_where_they_are_legal(tiny: LLM) -> None:
    sequence = after_a_rejected_draft(tiny, kept_guess=0.5)
    commit = sequence.next_pass()
    assert commit.kind == "commit"
    assert tiny.tokenizer.decode(commit.tokens.tolist()) == "7805"
    sequence.absorb(commit, digits(tiny, "80355"))  # the last row is behind the end
    assert tiny.tokenizer.decode(sequence.emitted) == "17803"
    assert [cycle.drafting for cycle in sequence.cycles] == ["draft", "kept"]
    assert sequence.counts.draft == 1
    assert (sequence.counts.drafted, sequence.counts.accepted) == (6, 2)


def test_a_draft_pass_replaces_rows_behind_a_rejected_draft_where_it_yields_more(tiny: LLM) -> None:
    assert after_a_rejected_draft(tiny, kept_guess=0.2).next_pass().kind == "draft"


def test_no_draft_is_made_where_forced_text_yields_more(tiny: LLM) -> None:
    properties = {f"property_number_{number}": {"type": "boolean"} for number in range(6)}
    schema = {"properties": properties, "required": list(properties), "additionalProperties": False}
    guided = GuidedDecodingParams(json={"type": "object", **schema})
    params = SamplingParams(max_tokens=200, guided_decoding=guided, mode="linear_spec", block_length=4)
    output = tiny.generate(CHAT, params).outputs[0]
    assert output.finish_reason == "stop"
    assert output.counts.draft < output.counts.commit


@pytest.mark.parametrize("needed", [1, None])
def test_a_dead_end_behind_a_draft_is_an_error_only_if_the_text_comes_to_it(tiny: LLM, needed: int | None) -> None:
    """Behind b, the grammar needs c, which is not allowed. The verifier prefers a, or b."""
    a, b, c = (tiny.tokenizer.encode(letter)[0] for letter in "abc")
    grammar = tiny._grammars.compile(GuidedDecodingParams(regex="a|b(c|c?d)")).matcher()
    rules = TokenRules(768, {11}, grammar=grammar, allowed=[a, b, 11])
    rows = RuledRows(rules, None, rules.walk([a, b]), needed, logprobs=False)
    masks = rows.inputs([0, 1]).masks
    assert masks is not None
    assert are_legal(masks[0], np.array([a, b, c])).tolist() == [True, True, False]
    logits, tokens = np.array([[3, 2, 1]] * 2, np.float32), np.array([[a, b, c]] * 2)
    assert rows.absorb(Candidates(logits, tokens, np.zeros(2, np.float32))) is None
    assert rows.choice(0).tokens[0] == a
    if needed == 1:
        return  # the text does not come to the second row
    with pytest.raises(GrammarError, match="no token is legal after 1 tokens"):
        rows.choice(1)
    params = SamplingParams(max_tokens=9, allowed_token_ids=[b, 11], guided_decoding=GuidedDecodingParams(regex="bc"))
    for mode in MODES:
        with pytest.raises(GrammarError, match=r"no token is legal after [01] tokens"):
            tiny.generate(CHAT, dataclasses.replace(params, **mode))


def test_a_bias_below_the_reported_tokens_does_not_stand_for_a_token_that_was_not_reported() -> None:
    """Two candidates are needed; 201 is banned, and 300 with its bias is worse than tokens that were not reported."""
    rules = TokenRules(768, {11}, banned=[201])
    rows = RuledRows(rules, Biases({300: 0.5}, 768), rules.walk([0]), 2, logprobs=False)
    assert rows.inputs([]).asked is not None
    none = np.zeros(1, np.float32)
    first = Candidates(np.array([[5, 4]], np.float32), np.array([[200, 201]]), none, np.array([[0.5]], np.float32))
    again = rows.absorb(first)
    assert again is not None
    assert again[0].tolist() == [0]
    assert are_legal(again[1][0], np.array([200, 201, 202, 300])).tolist() == [True, False, True, False]
    rows.absorb_again(again[0], Candidates(np.array([[5, 3]], np.float32), np.array([[200, 202]]), none))
    assert rows.choice(0).tokens.tolist() == [200, 202]


def test_a_logits_processor_sees_the_candidates_and_decides(tiny: LLM) -> None:
    seen: list[int] = []

    def prefer_even(tokens: Any, candidates: np.ndarray, logits: np.ndarray) -> np.ndarray:
        seen.append(len(tokens))
        return np.where(candidates % 2 == 0, logits + 50, logits)

    for mode in MODES:
        seen.clear()
        params = SamplingParams(max_tokens=20, logits_processor=prefer_even, **mode)
        output = tiny.generate(CHAT, params).outputs[0]
        assert all(token % 2 == 0 for token in output.token_ids)
        assert seen == list(range(output.length))
    with pytest.raises(TriModeError, match="must return 64 numbers"):
        tiny.generate(CHAT, SamplingParams(logits_processor=lambda *_: np.zeros(3), mode="ar"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mode": "diffusion", "guided_decoding": GuidedDecodingParams(json_object=True)}, "use mode linear_spec"),
        ({"mode": "diffusion", "logit_bias": {200: 1.0}}, "use mode linear_spec"),
        ({"mode": "diffusion", "min_tokens": 3}, "use mode linear_spec"),
        ({"ignore_eos": True, "guided_decoding": GuidedDecodingParams(json_object=True)}, "ignore_eos"),
        ({"guided_decoding": {"json_object": True}}, "GuidedDecodingParams"),
        ({"logit_bias": {"200": 1.0}}, "numbers by token id"),
        ({"logit_bias": {200: float("inf")}}, "numbers by token id"),
        ({"logit_bias": {768: 1.0}}, "outside the model's vocabulary"),
        ({"logit_bias": dict.fromkeys(range(301), 1.0)}, "at most 300"),
        ({"allowed_token_ids": []}, "not empty"),
        ({"bad": [""]}, "without empty strings"),
        ({"bad_token_ids": ["a"]}, "a list of token ids"),
        ({"min_tokens": 50, "max_tokens": 40}, "more than max_tokens"),
        ({"logits_processor": 3}, "a function"),
        ({"guided_decoding": GuidedDecodingParams(regex="a{")}, "regex cannot be compiled"),
    ],
)
def test_what_cannot_be_honoured_is_refused(tiny: LLM, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(TriModeError, match=reason):
        tiny.generate(CHAT, SamplingParams(**options))


def test_rules_that_contradict_each_other_end_one_answer_and_harm_no_other(tiny: LLM) -> None:
    impossible = SamplingParams(
        guided_decoding=GuidedDecodingParams(regex="[0-9]{3}"), allowed_token_ids=[200], mode="linear_spec"
    )
    free = SamplingParams(max_tokens=40, mode="linear_spec")
    alone = tiny.generate(CHAT, free).outputs[0]
    beside = tiny.generate_async(CHAT, free)
    with pytest.raises(GrammarError, match="no token is legal after 0 tokens"):
        tiny.generate_async(CHAT, impossible).result()
    assert beside.result().outputs[0].token_ids == alone.token_ids


def test_a_diffusion_default_is_refused_with_a_grammar(tiny_engine: Path) -> None:
    with (
        LLM(tiny_engine, mode="diffusion", measure_passes=False) as llm,
        pytest.raises(TriModeError, match="linear_spec"),
    ):
        llm.generate(CHAT, SamplingParams(guided_decoding=GuidedDecodingParams(json_object=True)))
