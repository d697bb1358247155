"""Streaming: the pieces join to the whole text, and no piece is ever half a character."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from trimode.model.tokenizer import Tokenizer
from trimode.runtime.text_stream import TextStream


@settings(deadline=None)
@given(text=st.text(max_size=30), cuts=st.lists(st.integers(1, 5), max_size=40))
def test_pieces_join_to_the_text(random_checkpoint: Path, text: str, cuts: list[int]) -> None:
    tokenizer = Tokenizer.from_folder(random_checkpoint)
    tokens = [12, *tokenizer.encode(text), 11]
    whole = tokenizer.decode(tokens)  # special tokens are silent, in the text too
    stream, pieces = TextStream(tokenizer), []
    while tokens:
        size = cuts.pop() if cuts else 3
        pieces.append(stream.feed(tokens[:size]))
        tokens = tokens[size:]
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    assert "".join(pieces) + stream.finish() == whole


@settings(deadline=None)
@given(tokens=st.lists(st.integers(0, 767), max_size=40))
def test_any_tokens_whatever(random_checkpoint: Path, tokens: list[int]) -> None:
    """A model may emit bytes that are no UTF-8 at all."""
    tokenizer = Tokenizer.from_folder(random_checkpoint)
    stream = TextStream(tokenizer)
    told = "".join(stream.feed([token]) for token in tokens) + stream.finish()
    assert told == tokenizer.decode(tokens)


def test_an_unfinished_character_comes_at_the_end_only(random_checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_folder(random_checkpoint)
    tokens = tokenizer.encode("é🙂")[:-1]
    stream = TextStream(tokenizer)
    assert stream.feed(tokens) == "é"
    assert stream.finish() == tokenizer.decode(tokens).removeprefix("é")
