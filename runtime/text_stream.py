"""Tokens to text as they come: whole UTF-8 characters only, and nothing that is later taken back."""

from __future__ import annotations

from tokenizers.decoders import DecodeStream

from trimode.model.tokenizer import Tokenizer


class TextStream:
    """What :meth:`feed` and :meth:`finish` return, joined, is the text of all tokens fed."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._told = ""

    def feed(self, tokens: list[int]) -> str:
        """The text that these tokens complete."""
        self._tokens += tokens
        pieces = [self._tokenizer.step(self._stream, token) for token in tokens]
        text = "".join(piece for piece in pieces if piece)
        self._told += text
        return text

    def finish(self) -> str:
        """What was held back: an unfinished character, as its replacement."""
        return self._tokenizer.decode(self._tokens).removeprefix(self._told)
