"""The cached tokenizer has the vocabulary of the one it is made of, and spells as that does."""

from __future__ import annotations

from pathlib import Path

import pytest
from llguidance import LLTokenizer, TokenizerWrapper

from trimode.model.tokenizer import Tokenizer
from trimode.runtime.grammar import cached_spelling
from trimode.runtime.grammar.cached_spelling import CachedSpelling

END, SPARE = 11, 5  # SPARE: tokens that the model has and the tokenizer does not


@pytest.fixture(scope="module")
def plain(tiny_checkpoint: Path) -> LLTokenizer:
    tokenizer = Tokenizer.from_folder(tiny_checkpoint)
    return LLTokenizer(tokenizer.serialized(), n_vocab=tokenizer.size + SPARE, eos_token=[END, END + 1])


@pytest.fixture(scope="module")
def cached(plain: LLTokenizer) -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(CachedSpelling(plain)), eos_token=[END, END + 1])


def test_the_vocabularies_are_equal(plain: LLTokenizer, cached: LLTokenizer) -> None:
    assert (cached.vocab_size, cached.eos_tokens) == (plain.vocab_size, plain.eos_tokens)
    assert cached.is_canonical
    for token in range(plain.vocab_size):
        assert cached.decode_bytes([token]) == plain.decode_bytes([token])
        assert cached.dbg_tokens([token]) == plain.dbg_tokens([token])
        assert cached.is_special_token(token) == plain.is_special_token(token)


@pytest.mark.parametrize(
    "text",
    [b"", b'{"name": ', "naïve 日本".encode(), b"a\xff\xfeb", b"\xe6\x97", b"<|im_end|>", b'"key": ' * 100],
)
def test_texts_are_spelled_alike_each_time(plain: LLTokenizer, cached: LLTokenizer, text: bytes) -> None:
    for _ in range(2):
        assert cached.tokenize_bytes(text) == plain.tokenize_bytes(text)


def test_few_short_texts_are_remembered(plain: LLTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached_spelling, "_MOST_TEXTS", 2)
    spelling = CachedSpelling(plain)
    for text in (b"a", b"b", b"c", b"c", b"long" * 100, b"long" * 100):
        spelling(text)
    assert spelling.remembered.cache_info()[:4] == (1, 3, 2, 2)
