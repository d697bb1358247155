"""Streaming: the pieces join to the whole text, hold whole characters, and never a part of a stop string."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimode.model.tokenizer import Tokenizer
from trimode.runtime.decoding.text_stream import TextStream


@pytest.fixture(scope="module")
def tokenizer(random_checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_folder(random_checkpoint)


def stream_of(tokenizer: Tokenizer, *stops: str, include: bool = False, skip: bool = True) -> TextStream:
    return TextStream(tokenizer, stops, include_stop=include, skip_special_tokens=skip)


def pieces_of(stream: TextStream, tokens: list[int], cuts: list[int]) -> list[str]:
    """Feed tokens in portions and collect the new text after each, until the stream stops."""
    pieces, left, cuts = [], list(tokens), list(cuts)
    while left and stream.stop is None:
        size = cuts.pop() if cuts else 3
        stream.feed(left[:size])
        pieces.append(stream.new_text())
        left = left[size:]
    return pieces


portions = st.lists(st.integers(1, 5), max_size=40)


@settings(deadline=None)
@given(text=st.text(max_size=30), cuts=portions)
def test_pieces_join_to_the_text(tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    tokens = [12, *tokenizer.encode(text), 11]
    stream = stream_of(tokenizer)
    pieces = pieces_of(stream, tokens, cuts)
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    assert "".join(pieces) + stream.finish() == tokenizer.decode(tokens)  # special tokens are silent, in the text too


@settings(deadline=None)
@given(tokens=st.lists(st.integers(0, 767), max_size=40), cuts=portions, skip=st.booleans())
def test_any_tokens_whatever(tokenizer: Tokenizer, tokens: list[int], cuts: list[int], skip: bool) -> None:
    """A model may emit bytes that are not UTF-8."""
    stream = stream_of(tokenizer, skip=skip)
    assert "".join(pieces_of(stream, tokens, cuts)) + stream.finish() == tokenizer.decode(tokens, skip)


@settings(deadline=None, max_examples=300)
@given(
    text=st.text("ab c", max_size=40),
    stops=st.lists(st.text("ab c", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
)
def test_the_text_ends_at_the_stop_string_that_is_complete_first(
    tokenizer: Tokenizer, text: str, stops: list[str], include: bool
) -> None:
    stream = stream_of(tokenizer, *stops, include=include)
    told = "".join(pieces_of(stream, tokenizer.encode(text), [1] * 40)) + stream.finish()
    ends = [(text.find(stop) + len(stop), stop) for stop in stops if stop in text]
    if not ends:
        assert stream.stop is None
        assert told == text
        return
    end, stop = min(ends)
    assert stream.stop is not None
    assert told == text[: end if include else end - len(stop)]


def test_a_stop_string_that_straddles_portions_is_never_returned_in_part(tokenizer: Tokenizer) -> None:
    stream = stream_of(tokenizer, "###")
    told = []
    for text in ("ab", "c#", "d##", "e", "#", "##f"):
        stream.feed(tokenizer.encode(text))
        told.append(stream.new_text())
    assert told == ["ab", "c", "#d", "##e", "", ""]
    assert stream.stop == "###"
    assert stream.finish() == ""


def test_an_unfinished_character_comes_at_the_end_only(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("é🙂")[:-1]
    stream = stream_of(tokenizer)
    stream.feed(tokens)
    assert stream.new_text() == "é"
    assert stream.finish() == tokenizer.decode(tokens).removeprefix("é")
