"""Bad words against a plain search of the text, over all ways to cut it into tokens."""

from __future__ import annotations

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trimode.runtime.decoding.bad_words import BadWords
from trimode.runtime.grammar.token_texts import TokenTexts

TEXTS = [b"", b"a", b"b", b"c", b"ab", b"bc", b"aa", b"abc", b"cab", b"bbbb"]


class Tokenizer:
    """As much of llguidance's as token texts need."""

    vocab_size = len(TEXTS)

    def decode_bytes(self, tokens: list[int]) -> bytes:
        return b"".join(TEXTS[token] for token in tokens)


def texts(size: int = len(TEXTS), hidden: tuple[int, ...] = ()) -> TokenTexts:
    return TokenTexts(Tokenizer(), size, hidden)  # type: ignore[arg-type]


words = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3)
tokens = st.lists(st.integers(0, len(TEXTS) - 1), max_size=6)


@settings(deadline=None)
@given(words=words, taken=tokens)
def test_a_token_completes_a_word_where_the_text_then_has_one(words: list[str], taken: list[int]) -> None:
    before = b"".join(TEXTS[token] for token in taken)
    wanted = [word.encode() for word in words]
    assume(not any(word in before for word in wanted))
    expected = {token for token, text in enumerate(TEXTS) if any(word in before + text for word in wanted)}
    bad = BadWords(words, texts())
    assert bad.completing(taken) == expected
    assert {token for token in range(len(TEXTS)) if bad.completed_by(taken, token)} == expected


def test_a_word_that_came_before_bans_nothing_more() -> None:
    """A continued answer may hold one. The word is searched for at the end of the text only."""
    bad = BadWords(["ab"], texts())
    taken = [TEXTS.index(b"ab"), TEXTS.index(b"c"), TEXTS.index(b"c")]
    assert not bad.completed_by(taken, TEXTS.index(b"c"))
    assert not bad.completed_by([TEXTS.index(b"ab")], TEXTS.index(b"c"))


def test_special_tokens_and_tokens_without_a_text_have_none() -> None:
    assert texts().of == TEXTS
    assert texts(hidden=(1, 9)).of == [b"", b"", *TEXTS[2:9], b""]
    assert texts(size=4).of == TEXTS[:4]
    assert texts(size=12).of == [*TEXTS, b"", b""]


def test_the_tokens_that_begin_with_or_contain_a_text() -> None:
    found = texts(size=12)
    for text in (b"a", b"ab", b"b", b"bbbb", b"bbbbb", b"c", b"d"):
        assert set(found.beginning_with(text)) == {token for token, of in enumerate(TEXTS) if of.startswith(text)}
        assert set(found.containing(text)) == {token for token, of in enumerate(TEXTS) if text in of}
