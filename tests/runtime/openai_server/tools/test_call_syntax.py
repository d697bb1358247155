"""Calls in each family's form: found wherever the text is cut, and forced by the grammar."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimode.model.tokenizer import Tokenizer
from trimode.runtime.grammar.compiler import GrammarCompiler
from trimode.runtime.openai_server.tools.call_splitter import CallSplitter
from trimode.runtime.openai_server.tools.call_syntax import CallSyntax
from trimode.runtime.openai_server.tools.syntaxes import SYNTAXES, syntax_of_template
from trimode.runtime.openai_server.tools.tool import Tool, ToolChoice
from trimode.runtime.request.errors import GrammarError
from trimode.runtime.request.guided_decoding import GuidedDecodingParams

VOCABULARY, END = 768, 11
WEATHER = Tool(
    "weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 1},
            "unit": {"$ref": "#/$defs/Unit"},
            "at": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
        "$defs": {"Unit": {"enum": ["C", "F"]}},
    },
)
NOW = Tool("now", {"type": "object", "properties": {}, "additionalProperties": False})
TOOLS = (WEATHER, NOW)

# Text, what is content of it, and its calls, by family.
Case = tuple[str, str, list[tuple[str, Any]]]
PARIS = {"city": 'Paris "} </x>', "days": 2}
CASES: dict[str, list[Case]] = {
    "hermes": [
        ("only text < </tool_call> ", "only text < </tool_call> ", []),
        ("", "", []),
        (
            f'Let me see.\n<tool_call>\n{{"name": "weather", "arguments": {json.dumps(PARIS)}}}\n</tool_call>',
            "Let me see.",
            [("weather", PARIS)],
        ),
        (
            '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n'
            '<tool_call>{"arguments": {"city": "Ö", "days": 1}, "name": "weather"}</tool_call> later text',
            "",
            [("now", {}), ("weather", {"city": "Ö", "days": 1})],
        ),
        ('<tool_call>{"name": "now"}', "", [("now", {})]),
        ('a <tool_call> is not {"one": 1}', 'a <tool_call> is not {"one": 1}', []),
        ('a <tool_call>{"one": 1}</tool_call>\n', 'a <tool_call>{"one": 1}</tool_call>\n', []),
        ("a <tool_call>{no JSON}", "a <tool_call>{no JSON}", []),
        ('a <tool_call>{"na', 'a <tool_call>{"na', []),
    ],
    "nemotron": [
        (
            '<TOOLCALL>[{"name": "now", "arguments": {}}, '
            f'{{"name": "weather", "arguments": {json.dumps(PARIS)}}}]</TOOLCALL>',
            "",
            [("now", {}), ("weather", PARIS)],
        ),
        ("Hm.\n\n<TOOLCALL>[]</TOOLCALL>", "Hm.\n\n<TOOLCALL>[]</TOOLCALL>", []),
        ('<TOOLCALL>{"name": "now"}</TOOLCALL>', '<TOOLCALL>{"name": "now"}</TOOLCALL>', []),
        ('<TOOLCALL>[{"name": "now"}, 3]</TOOLCALL>', "", [("now", {})]),
    ],
    "xml": [
        (
            'Yes:\n<tool_call>\n<function=weather>\n<parameter=city>\nParis "} <\n</parameter>\n<parameter=days>\n2\n'
            "</parameter>\n<parameter=at>\n12\n</parameter>\n<parameter=unit>\nC\n</parameter>\n"
            "</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
            "Yes:",
            [("weather", {"city": 'Paris "} <', "days": 2, "at": 12, "unit": "C"}), ("now", {})],
        ),
        (
            "<tool_call><function=weather><parameter=city>7</parameter><parameter=at>null</parameter>"
            "<parameter=days>many</parameter></function></tool_call>",
            "",
            [("weather", {"city": "7", "at": None, "days": "many"})],
        ),
        ("no <tool_call>\nfunction", "no <tool_call>\nfunction", []),
    ],
}
# A call that is cut off: its name and the beginning of its arguments.
CUT: dict[str, tuple[str, str, str]] = {
    "hermes": ('<tool_call>\n{"name": "weather", "arguments": {"city": "Pa', "weather", '{"city": "Pa'),
    "nemotron": ('<TOOLCALL>[{"name": "weather", "arguments": {"city": "Pa', "weather", '{"city": "Pa'),
    "xml": (
        "<tool_call>\n<function=weather>\n<parameter=days>\n2\n</parameter>\n<parameter=city>\nPa",
        "weather",
        '{"days": 2',
    ),
}
FLAT = [(family, case) for family, cases in CASES.items() for case in cases]


def syntax(family: str) -> CallSyntax:
    return SYNTAXES[family]({})


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    return [text[start:end] for start, end in itertools.pairwise(places)]


def read(splitter: CallSplitter, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """Joined content, and each call's name and arguments as text. Content never comes behind a call."""
    content, calls = "", []
    for split in [*map(splitter.feed, pieces), splitter.finish()]:
        assert not (split.content and calls)
        content += split.content
        for delta in split.calls:
            if delta.name is not None:
                assert delta.number == len(calls)
                calls.append((delta.name, ""))
            name, arguments = calls[delta.number]
            calls[delta.number] = name, arguments + delta.arguments
    return content, calls


@pytest.mark.parametrize(("family", "case"), FLAT)
def test_texts_and_calls(family: str, case: Case) -> None:
    text, content, calls = case
    splitter = syntax(family).splitter(TOOLS)
    found = read(splitter, [text])
    assert found == (content, [(name, written) for name, written in found[1]])
    assert [(name, json.loads(written)) for name, written in found[1]] == calls
    assert splitter.unfinished == ""


@pytest.mark.parametrize(("family", "case"), FLAT)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_it_does_not_matter_where_the_text_is_cut(family: str, case: Case, data: st.DataObject) -> None:
    text = case[0]
    cuts = data.draw(st.lists(st.integers(0, len(text))))
    parts = pieces_of(text, cuts)
    assert read(syntax(family).splitter(TOOLS), parts) == read(syntax(family).splitter(TOOLS), [text])
    assert read(syntax(family).splitter(TOOLS), list(text)) == read(syntax(family).splitter(TOOLS), [text])


MARKS = [
    *("<tool_call>", "</tool_call>", "<TOOLCALL>", "</TOOLCALL>", "<function=now>", "</function>", "<parameter=a>"),
    *(
        "</parameter>",
        '"name"',
        ":",
        ",",
        '"arguments"',
        '"now"',
        "{",
        "}",
        "[",
        "]",
        "\\",
        '"',
        "<",
        "\n",
        " ",
        "é",
        "1",
    ),
]


def test_a_block_that_ends_within_a_call_has_the_same_text_wherever_it_is_cut() -> None:
    """The text behind its end is not part of it, nor are later blocks without a call."""
    for text in ("<tool_call><function=now></tool_call>", "<tool_call><function=now><tool_call></tool_call>"):
        for cut in range(len(text)):
            splitter = syntax("xml").splitter(TOOLS)
            read(splitter, pieces_of(text, [cut]))
            assert splitter.unfinished == "<tool_call><function=now>"


@pytest.mark.parametrize("family", SYNTAXES)
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_text_at_all(family: str, data: st.DataObject) -> None:
    """Also what no model writes: nothing depends on the cuts, and text without a call is returned as it is."""
    text = "".join(data.draw(st.lists(st.sampled_from(MARKS), max_size=30)))
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    whole, cut = syntax(family).splitter(TOOLS), syntax(family).splitter(TOOLS)
    found = read(whole, [text])
    assert read(cut, pieces_of(text, cuts)) == found
    assert cut.unfinished == whole.unfinished
    if not found[1]:
        assert found[0] == text


@pytest.mark.parametrize("family", SYNTAXES)
def test_a_call_that_is_cut_off_is_reported_as_unfinished(family: str) -> None:
    text, name, arguments = CUT[family]
    splitter = syntax(family).splitter(TOOLS)
    assert read(splitter, ["Well. ", *text]) == ("Well.", [(name, arguments)])
    assert splitter.unfinished == " " + text


def test_arguments_arrive_as_they_are_written() -> None:
    splitter = syntax("hermes").splitter(TOOLS)
    splitter.feed('<tool_call>\n{"name": "weather", "arguments": {"ci')
    assert splitter.feed('ty": "Pa').calls[0].arguments == 'ty": "Pa'


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_checkpoint)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, VOCABULARY, [END])


def accepts(compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: str, text: str) -> bool:
    matcher = compiler.compile(GuidedDecodingParams(grammar=grammar)).matcher()
    return all(matcher.take(token) for token in [*tokenizer.encode(text), END])


ONE: dict[str, str] = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>',
    "nemotron": '<TOOLCALL>[{"name": "weather", "arguments": {"city": "Paris", "days": 2}}]</TOOLCALL>',
    "xml": "<tool_call>\n<function=weather>\n<parameter=city>\nPa<r>is\n</parameter>\n<parameter=days>\n2\n"
    "</parameter>\n<parameter=unit>\nF\n</parameter>\n</function>\n</tool_call>",
}
TWO: dict[str, str] = {
    "hermes": f'{ONE["hermes"]}\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>',
    "nemotron": ONE["nemotron"].replace("]</", ', {"name": "now", "arguments": {}}]</'),
    "xml": f"{ONE['xml']}\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
}


@pytest.mark.parametrize("family", SYNTAXES)
def test_the_grammar_of_each_choice(family: str, compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    def allows(choice: ToolChoice, text: str, schema: dict[str, Any] | None = None) -> bool:
        return accepts(compiler, tokenizer, syntax(family).grammar(choice, schema), text)

    one, two = ONE[family], TWO[family]
    required = ToolChoice(TOOLS, required=True)
    assert allows(required, one)
    assert allows(required, two)
    for wrong in ("", "text", f"text {one}", f"{one} text", one.replace("weather", "whether"), one.replace("2", "two")):
        assert not allows(required, wrong), wrong
    # JSON is one line, so what lies between two values is forced, as everywhere else.
    wide = one.replace('"city": ', '"city":  ').replace("\n2\n", "\n 2\n")
    assert wide != one
    assert not allows(required, wide)
    alone = ToolChoice(TOOLS, required=True, parallel=False)
    assert allows(alone, one)
    assert not allows(alone, two)
    assert not allows(ToolChoice([NOW], required=True), one)
    auto = ToolChoice(TOOLS)
    for right in ("", "text < <tool", one, f"Let me see.\n{one}", two):
        assert allows(auto, right), right
    mark = syntax(family).open_mark
    for wrong in (mark, f"text {mark} text", f"{one} text", one.replace("weather", "whether")):
        assert not allows(auto, wrong), wrong
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert allows(auto, '{"a": 1}', schema)
    assert allows(auto, one, schema)
    assert not allows(auto, "text", schema)
    assert not allows(auto, '{"a": "1"}', schema)


@pytest.mark.parametrize("family", SYNTAXES)
def test_what_the_grammar_allows_is_read_as_a_call(family: str) -> None:
    for text, count in ((ONE[family], 1), (TWO[family], 2)):
        content, calls = read(syntax(family).splitter(TOOLS), list(text))
        assert content == ""
        assert [name for name, _ in calls] == ["weather", "now"][:count]
        assert json.loads(calls[0][1])["days"] == 2


def test_marks_that_are_special_tokens_are_those_tokens(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    class Special(SYNTAXES["hermes"]):  # type: ignore[misc]  # the class is chosen by name
        open_mark, close_mark = "<SPECIAL_5>", "<SPECIAL_6>"

    special = Special(tokenizer.special_tokens)
    assert special.has_special_marks
    assert not syntax("hermes").has_special_marks
    text = ONE["hermes"].replace("<tool_call>", "<SPECIAL_5>").replace("</tool_call>", "<SPECIAL_6>")
    for choice, before in ((ToolChoice(TOOLS, required=True), ""), (ToolChoice(TOOLS), "Well. ")):
        matcher = compiler.compile(GuidedDecodingParams(grammar=special.grammar(choice))).matcher()
        tokens = [*tokenizer.encode(before + text), END]
        assert tokenizer.token_id("<SPECIAL_5>") in tokens
        assert all(matcher.take(token) for token in tokens)
    matcher = compiler.compile(GuidedDecodingParams(grammar=special.grammar(ToolChoice(TOOLS)))).matcher()
    tokens = [*tokenizer.encode("Well. <SPECIAL_5>x"), END]
    assert not all(matcher.take(token) for token in tokens)


def test_a_schema_that_cannot_be_enforced_is_an_error_only_for_a_strict_tool(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}, "required": ["a"]}
    text = '<tool_call>\n{"name": "f", "arguments": {"a": [1]}}\n</tool_call>'
    grammar = syntax("hermes").grammar(ToolChoice([Tool("f", parameters)], required=True))
    assert accepts(compiler, tokenizer, grammar, text)
    strict = syntax("hermes").grammar(ToolChoice([Tool("f", parameters, strict=True)], required=True))
    with pytest.raises(Exception, match="uniqueItems"):
        accepts(compiler, tokenizer, strict, text)


@pytest.mark.parametrize("family", SYNTAXES)
def test_a_property_of_any_shape_makes_a_grammar_and_is_read(family: str) -> None:
    """Whether its keywords make sense is found by the compiler."""
    written = "<tool_call><function=f><parameter=a>1</parameter></function></tool_call>"
    shapes = (None, True, 5, "a", "#/$defs/a", [], [5], [[1]], [{"type": 5}], {"a": 1}, {"type": [[]]})
    for keyword in ("type", "enum", "const", "anyOf", "oneOf", "$ref", "items", "required"):
        for shape in shapes:
            parameters = {"type": "object", "properties": {"a": {keyword: shape}}, "$defs": shape}
            tool = Tool("f", parameters)
            assert "call_0" in syntax(family).grammar(ToolChoice([tool], required=True))
            read(syntax(family).splitter([tool]), [written])


@pytest.mark.parametrize("name", ["a>b", "a\nb"])
def test_names_that_cannot_be_written_between_marks_are_refused(name: str) -> None:
    tool = Tool("f", {"type": "object", "properties": {name: {"type": "string"}}})
    assert syntax("hermes").grammar(ToolChoice([tool]))
    with pytest.raises(GrammarError, match="f: the name of a parameter contains"):
        syntax("xml").grammar(ToolChoice([tool]))


@pytest.mark.parametrize(
    ("template", "family"),
    [
        (None, "hermes"),
        ("{{ messages }}", "hermes"),
        ('<tool_call>\n{"name": <function-name>', "hermes"),
        ("<tool_call>\n<function=example_function_name>", "xml"),
        ("<TOOLCALL>[{...}]</TOOLCALL>", "nemotron"),
    ],
)
def test_the_template_shows_the_form(template: str | None, family: str) -> None:
    assert syntax_of_template(template) == family
