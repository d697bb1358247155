"""Compilation: each kind of grammar accepts its texts and no others; bad and malicious grammars are refused."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import numpy as np
import pytest

from trimode.model.tokenizer import Tokenizer
from trimode.runtime.grammar import compiler as compiler_module
from trimode.runtime.grammar.compiler import GrammarCompiler
from trimode.runtime.grammar.definition import _literal, definition
from trimode.runtime.grammar.matcher import GrammarMatcher
from trimode.runtime.request.errors import GrammarError
from trimode.runtime.request.guided_decoding import GrammarSource, GuidedDecodingParams

VOCABULARY, END = 768, 11
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "unit": {"enum": ["m", "µm"]}},
    "required": ["x", "unit"],
    "additionalProperties": False,
}
TAG = {"triggers": ["<call>"], "structures": [{"begin": "<call>\n", "schema": POINT, "end": "\n</call>"}]}


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_checkpoint)


@pytest.fixture
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, VOCABULARY, [END])


def taken(matcher: GrammarMatcher, tokens: list[int]) -> int:
    """How many of the tokens the grammar accepts, in order."""
    for count, token in enumerate(tokens):
        if not matcher.take(token):
            return count
    return len(tokens)


def legal(matcher: GrammarMatcher) -> set[int]:
    bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def test_one_end_token_ends_a_complete_text(tokenizer: Tokenizer) -> None:
    matcher = GrammarCompiler(tokenizer, VOCABULARY, [END, END + 1]).compile(GuidedDecodingParams(regex="ab")).matcher()
    tokens = tokenizer.encode("ab")
    assert taken(matcher, tokens) == len(tokens)
    assert (matcher.complete, matcher.forced_token, legal(matcher)) == (True, END, {END})
    assert matcher.take_forced(9) == [END]
    assert (matcher.complete, matcher.ended, legal(matcher)) == (False, True, set())


@pytest.mark.parametrize(
    ("fields", "right", "wrong"),
    [
        ({"json": POINT}, ['{"x": 3, "unit": "m"}', '{"x": -3, "unit": "µm"}'], ["{}", '{"x":3,"unit":"m"}', "[1]"]),
        ({"json": POINT}, [], ['{"x": 3.5, "unit": "m"}', '{"x": 3, "unit": "cm"}', '{ "x": 3, "unit": "m"}']),
        (
            {"json": POINT | {"x-guidance": {"whitespace_pattern": r"( |\n *)?"}}},
            ['{"x":3,"unit":"m"}', '{"x": -3, "unit": "µm"}', '{\n  "x": 3,\n  "unit": "m"\n}'],
            ["{}", '{  "x":3,"unit":"m"}'],
        ),
        ({"json_object": True}, ["{}", '{"a": [1, {"b": null}]}'], ["[1]", "3"]),
        ({"regex": r"[a-c]{2}-\d+"}, ["ab-12"], ["abc", "ab-"]),
        ({"choice": ["yes", 'naïve "x"\n', "😀"]}, ["yes", 'naïve "x"\n', "😀"], ["no", "ye"]),
        ({"grammar": 'start: "a" /[0-9]+/'}, ["a12"], ["b"]),
        ({"grammar": 'root ::= "a" digits\ndigits ::= [0-9]+'}, ["a12"], ["b"]),
        ({"structural_tag": TAG}, ["free", 'so <call>\n{"x": 1, "unit": "m"}\n</call> end'], ["<call>x", "<call>\n{}"]),
    ],
)
def test_each_kind_accepts_its_texts_only(
    compiler: GrammarCompiler, tokenizer: Tokenizer, fields: dict, right: list[str], wrong: list[str]
) -> None:
    compiled = compiler.compile(GuidedDecodingParams(**fields))
    for text in right:
        matcher, tokens = compiled.matcher(), [*tokenizer.encode(text), END]
        assert taken(matcher, tokens) == len(tokens), text
        assert not legal(matcher)
    for text in wrong:
        tokens = [*tokenizer.encode(text), END]
        assert taken(compiled.matcher(), tokens) < len(tokens), text


def test_special_tokens_of_a_structural_tag_are_tokens_and_not_their_letters(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    structure = {"begin": "<SPECIAL_5>x<SPECIAL_6>", "schema": POINT, "end": "<SPECIAL_7>"}
    compiled = compiler.compile(
        GuidedDecodingParams(structural_tag={"triggers": ["<SPECIAL_5>"], "structures": [structure]})
    )
    begin, end = tokenizer.token_id("<SPECIAL_5>"), tokenizer.token_id("<SPECIAL_7>")
    matcher = compiled.matcher()
    assert begin in legal(matcher)
    assert end not in legal(matcher)
    tokens = [*tokenizer.encode('a <SPECIAL_5>x<SPECIAL_6>{"x": 1, "unit": "m"}<SPECIAL_7>'), END]
    assert tokens.count(end) == 1
    assert taken(matcher, tokens) == len(tokens)


def test_the_mask_is_the_tokens_that_are_allowed_one_by_one(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(GuidedDecodingParams(json=POINT)).matcher()
    for token in [*tokenizer.encode('{"x": 12, "unit": "µm"}'), END]:
        assert legal(matcher) == {each for each in range(VOCABULARY) if matcher.allows(each)}
        assert not matcher.allows(VOCABULARY)
        assert not matcher.take(VOCABULARY)
        assert matcher.take(token)


def test_undone_tokens_leave_no_trace(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(GuidedDecodingParams(regex="(ab)+")).matcher()
    tokens = [*tokenizer.encode("abab"), END]
    states = []
    for token in tokens:
        states.append(legal(matcher))
        assert matcher.take(token)
    for count in range(1, len(tokens) + 1):
        matcher.undo(count)
        assert legal(matcher) == states[-count]
        assert taken(matcher, tokens[-count:]) == count


def test_an_end_token_is_legal_exactly_where_the_grammar_may_end(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    matcher = compiler.compile(GuidedDecodingParams(regex="ab+c?")).matcher()
    for text, may_end, complete in (("a", False, False), ("b", True, False), ("c", True, True)):
        assert taken(matcher, tokenizer.encode(text)) == 1
        assert (END in legal(matcher), matcher.allows(END), matcher.complete) == (may_end, may_end, complete)
    assert matcher.forced_token == END
    assert legal(matcher) == {END}


def test_forced_text_is_spelled_as_the_tokenizer_does(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(GuidedDecodingParams(regex="xthe name is (Anna|Bob)")).matcher()
    assert taken(matcher, tokenizer.encode("x")) == 1
    forced = matcher.take_forced(99)
    assert tokenizer.decode(forced).strip() in "the name is "
    assert len(forced) > 1
    matcher.undo(len(forced))
    assert matcher.take_forced(1) == forced[:1]
    assert matcher.take_forced(99) == forced[1:]


def test_a_tokenizer_may_have_more_or_fewer_tokens_than_the_model(tokenizer: Tokenizer) -> None:
    params = GuidedDecodingParams(regex="[a-z0-9]+")
    whole = legal(GrammarCompiler(tokenizer, VOCABULARY, [END]).compile(params).matcher())
    for size in (590, 800):
        mask = GrammarCompiler(tokenizer, size, [END]).compile(params).matcher().mask()
        assert len(mask) == -(-size // 32)
        assert set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))) == {
            token for token in whole if token < size
        }
    assert max(whole) >= 590


def test_equal_grammars_are_compiled_once_and_the_cache_is_bounded(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler_module, "MAX_KEPT", 2)
    first = compiler.compile(GuidedDecodingParams(json={"type": "integer"}))
    assert compiler.compile(GuidedDecodingParams(json='{"type":  "integer"}')) is first
    compiler.compile(GuidedDecodingParams(regex="a"))
    assert compiler.compile(GuidedDecodingParams(json={"type": "integer"})) is first  # now the newest
    compiler.compile(GuidedDecodingParams(regex="b"))
    assert compiler.compile(GuidedDecodingParams(json={"type": "integer"})) is first
    monkeypatch.setattr(compiler_module, "MAX_KEPT_CHARACTERS", 3)
    compiler.compile(GuidedDecodingParams(regex="c"))
    assert compiler.compile(GuidedDecodingParams(json={"type": "integer"})) is not first


def test_the_limits_of_a_source_and_of_what_is_kept(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """131,072 characters each, and 128 grammars of 1,048,576 characters together. Two are compiled at once."""
    compiled: list[str] = []
    monkeypatch.setattr(compiler, "_compile", lambda source: compiled.append(source.text))

    def compilations(text: str) -> int:
        before = len(compiled)
        compiler.compile(GuidedDecodingParams(regex=text))
        return len(compiled) - before

    short = [f"{number:03}" for number in range(129)]
    assert [compilations(text) for text in short[:128]] == [1] * 128
    assert [compilations(text) for text in (short[0], short[127])] == [0, 0]
    assert compilations(short[128]) == 1
    assert [compilations(text) for text in (short[0], short[1])] == [0, 1]
    long = [str(number) * 131_072 for number in range(9)]
    assert [compilations(text) for text in long[:8]] == [1] * 8
    assert [compilations(text) for text in long[:8]] == [0] * 8
    assert compilations(long[8]) == 1
    assert compilations(long[1]) == 0
    assert compilations(long[0]) == 1
    with pytest.raises(GrammarError, match="regex has 131073 characters; the limit is 131072"):
        compilations("a" * 131_073)
    assert [compiler._compiling.acquire(blocking=False) for _ in range(3)] == [True, True, False]


def test_the_masks_of_the_latest_64_places_are_kept(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(GuidedDecodingParams(regex="[a-z]*")).matcher()
    letter = tokenizer.encode("a")[0]
    masks = []
    for _ in range(64):
        masks.append(matcher.mask())
        assert matcher.take(letter)
    matcher.undo(64)
    assert matcher.mask() is masks[0]
    for _ in range(64):
        assert matcher.take(letter)
    matcher.mask()
    matcher.undo(63)
    assert matcher.mask() is masks[1]
    matcher.undo(1)
    assert matcher.mask() is not masks[0]
    np.testing.assert_array_equal(matcher.mask(), masks[0])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ""),
        ("ab", '"ab"'),
        ("<x>", "<[5]>"),
        ("a<x>b", '"a" <[5]> "b"'),
        ("a<x>b<y><x>", '"a" <[5]> "b" <[6]> <[5]>'),
        ("<x>>", "<[7]>"),  # the longest of those that begin there
        ('"<y', '"\\"<y"'),
    ],
)
def test_special_tokens_in_a_literal(text: str, parts: str) -> None:
    assert _literal(text, {"": 4, "<x>": 5, "<y>": 6, "<x>>": 7}) == parts


@pytest.mark.parametrize(
    ("tag", "reason"),
    [
        ([], "must be an object"),
        ({"type": "other"}, "must be an object of type structural_tag"),
        ({"triggers": [], "structures": TAG["structures"]}, "needs triggers"),
        ({"triggers": ["<call>", 3], "structures": TAG["structures"]}, "needs triggers"),
        ({"triggers": ["<call>"], "structures": []}, "needs triggers"),
        ({"triggers": ["<call>"], "structures": ["<call>"]}, "needs triggers"),
        ({"triggers": "<call>", "structures": TAG["structures"]}, "needs triggers"),
        ({"triggers": [""], "structures": TAG["structures"]}, "begins with none of the triggers"),
        ({"triggers": ["<call>"], "structures": [{"begin": 3, "schema": {}, "end": ""}]}, "each structure needs"),
        ({"triggers": ["<"], "structures": [{"begin": "<", "schema": {}, "end": None}]}, "each structure needs"),
        ({"triggers": ["<"], "structures": [{"begin": "<", "schema": "a", "end": ""}]}, "each structure needs"),
    ],
)
def test_what_is_no_structural_tag(tag: object, reason: str) -> None:
    source = GrammarSource("structural_tag", json.dumps(tag))
    with pytest.raises(GrammarError, match=reason):
        definition(source, {})


def test_a_reason_is_cut_past_its_longest_length() -> None:
    source, longest = GuidedDecodingParams(regex="a{").source, 300
    assert str(compiler_module._refusal(source, "x" * longest)).endswith(": " + "x" * longest)
    assert str(compiler_module._refusal(source, "x" * (longest + 1))).endswith(": " + "x" * longest + "...")


def test_undone_tokens_are_taken_again_without_the_library(
    compiler: GrammarCompiler, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts are taken, undone, and taken again when they are emitted."""
    matcher = compiler.compile(GuidedDecodingParams(regex="a(b[c-e]|de)f")).matcher()
    a, b, d = (tokenizer.encode(letter)[0] for letter in "abd")
    for token in (a, b):
        assert matcher.take(token)
    known = matcher.mask()
    matcher.undo(2)
    with monkeypatch.context() as patch:
        patch.setattr(matcher, "_matcher", None)
        for token in (a, b):
            assert matcher.take(token)
        assert matcher.mask() is known
    matcher.undo(1)
    assert matcher.take(d)
    assert "ef".startswith(tokenizer.decode(sorted(legal(matcher))))


def deep(levels: int) -> dict:
    schema: dict = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def alternatives(factors: int) -> dict:
    """4 ** factors combinations."""
    return {
        "allOf": [
            {"anyOf": [{"type": "object", "properties": {f"p{i}_{j}": {"type": "integer"}}} for j in range(4)]}
            for i in range(factors)
        ]
    }


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"json": {"type": "foo"}}, "json cannot be compiled"),
        ({"json": {"not": {"type": "integer"}}}, "not"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum"),
        ({"json": {"$ref": "#"}}, "no text matches"),
        ({"json": {"$ref": "#/missing"}}, "json cannot be compiled"),
        ({"regex": "a{"}, "regex cannot be compiled"),
        ({"regex": "[^\\x00-\\x{10FFFF}]"}, "no text matches"),
        ({"grammar": "garbage!!"}, "grammar cannot be read"),
        ({"grammar": "root ::= undefined"}, "grammar"),
        ({"structural_tag": {}}, "needs triggers"),
        ({"structural_tag": TAG | {"triggers": ["<other>"]}}, "begins with none"),
        ({"structural_tag": TAG | {"structures": [{"begin": "<call>"}]}}, "each structure needs"),
        # Malicious: deep, huge, exponential.
        ({"json": deep(300)}, "json cannot be compiled"),
        ({"json": deep(5000)}, "."),
        ({"json": alternatives(6)}, "too big"),
        ({"json": alternatives(30)}, "too large"),
        ({"json": {"enum": ["x" * 200_000]}}, "the limit is"),
        ({"regex": "(" * 5000 + "a" + ")" * 5000}, "regex cannot be compiled"),
        ({"grammar": "start: " + "(" * 3000 + '"x"' + ")" * 3000}, "too deeply nested"),
        ({"grammar": "root ::= " + "(" * 3000 + '"x"' + ")" * 3000}, "grammar"),
    ],
)
def test_bad_and_malicious_grammars_are_refused_in_bounded_time_and_memory(
    compiler: GrammarCompiler, fields: dict, reason: str
) -> None:
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(GrammarError, match=reason) as refusal:
        compiler.compile(GuidedDecodingParams(**fields))
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 500
    assert time.process_time() - begun < 20  # CPU time, of which the worst case takes under 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"regex": "((a{1,100}){1,100}){1,100}"}, "a" * 1000),
        ({"json": {"properties": {f"p{i}": {"pattern": "^[a-z]{1,50}$"} for i in range(1600)}}}, '{"p1":'),
    ],
)
def test_a_grammar_that_exceeds_the_limits_at_a_later_text_fails_there(
    compiler: GrammarCompiler, tokenizer: Tokenizer, fields: dict, text: str
) -> None:
    matcher = compiler.compile(GuidedDecodingParams(**fields)).matcher()

    def match() -> None:
        for token in tokenizer.encode(text):
            matcher.mask()
            assert matcher.take(token)

    with pytest.raises(GrammarError, match="limits of time and memory"):
        match()


SCHEMAS = [POINT, {"type": "array", "items": {"anyOf": [{"type": "number"}, {"type": "null"}, POINT]}, "minItems": 2}]
DRAWN = [{"json": schema} for schema in SCHEMAS] + [
    {"json_object": True},
    {"structural_tag": TAG},
    {"regex": "(the name is (Anna|Bob)[.!] ?){1,3}"},
    {"choice": ["Paris", "London", "Łódź", "São Paulo"]},
]


@pytest.mark.parametrize("fields", DRAWN)
@pytest.mark.parametrize("seed", range(5))
def test_on_drawn_texts_masks_equal_single_checks_and_undoing_restores_them(
    compiler: GrammarCompiler, fields: dict, seed: int
) -> None:
    """The legal tokens depend on the tokens taken, and not on tokens that were tried and undone."""
    generator = np.random.default_rng(seed)
    compiled = compiler.compile(GuidedDecodingParams(**fields))
    matcher, tokens = compiled.matcher(), []
    while len(tokens) < 40:
        now = legal(matcher)
        assert now == {token for token in range(VOCABULARY) if matcher.allows(token)}
        fresh = compiled.matcher()
        assert taken(fresh, tokens) == len(tokens)
        assert legal(fresh) == now
        if not now:
            break
        tried: list[int] = []
        for _ in range(int(generator.integers(4))):
            ahead = sorted(legal(matcher))
            if ahead:
                tried.append(int(generator.choice(ahead)))
                assert matcher.take(tried[-1])
        matcher.undo(len(tried))
        tokens.append(int(generator.choice(sorted(now))))
        assert matcher.take(tokens[-1])
