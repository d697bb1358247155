"""The bytes of every token, and which tokens contain or begin with some text."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator

from llguidance import LLTokenizer


class TokenTexts:
    """size: of the model's vocabulary. hidden: special tokens, not part of the text; their bytes are empty."""

    def __init__(self, tokenizer: LLTokenizer, size: int, hidden: Collection[int]) -> None:
        known = min(size, tokenizer.vocab_size)
        self.of = [b"" if token in hidden else tokenizer.decode_bytes([token]) for token in range(known)]
        self.of += [b""] * (size - known)
        self._sorted = sorted((text, token) for token, text in enumerate(self.of))

    def beginning_with(self, text: bytes) -> Iterator[int]:
        """The tokens that begin with ``text``, which is not empty."""
        at = bisect_left(self._sorted, (text, -1))
        while at < len(self._sorted) and self._sorted[at][0].startswith(text):
            yield self._sorted[at][1]
            at += 1

    def containing(self, text: bytes) -> list[int]:
        return [token for token, of_token in enumerate(self.of) if text in of_token]
