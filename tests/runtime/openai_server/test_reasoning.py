"""The split into reasoning and content does not depend on how the text is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimode.runtime.openai_server.reasoning import ReasoningSplitter, Split

TEXTS = st.lists(st.sampled_from(["<think>", "</think>", "<", "</", "think>", "a", "ü", " "]), max_size=12).map("".join)


def split(pieces: list[str], thinking: bool) -> Split:
    splitter = ReasoningSplitter(thinking)
    parts = [*(splitter.feed(piece) for piece in pieces), splitter.finish()]
    return Split("".join(part.reasoning for part in parts), "".join(part.content for part in parts))


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        ("44 x 6</think>264", True, Split("44 x 6", "264")),
        ("264", False, Split("", "264")),
        ("<think>44 x 6</think>264", False, Split("44 x 6", "264")),
        ("never closed </thin", True, Split("never closed </thin", "")),
        ("</think>264", True, Split("", "264")),
        ("a<think>b</think>c", False, Split("", "a<think>b</think>c")),
        ("a</think>b</think>c", True, Split("a", "b</think>c")),
        ("<thin", False, Split("", "<thin")),
    ],
)
def test_split(text: str, thinking: bool, expected: Split) -> None:
    assert split([text], thinking) == expected


@given(text=TEXTS, thinking=st.booleans(), data=st.data())
def test_pieces_do_not_matter(text: str, thinking: bool, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert split(pieces, thinking) == split([text], thinking)
