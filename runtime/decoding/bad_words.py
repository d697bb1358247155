"""Words that must not appear in the text of an answer, whichever tokens spell them."""

from __future__ import annotations

from collections.abc import Sequence

from trimode.runtime.grammar.token_texts import TokenTexts


class BadWords:
    """words: none of them is empty. Immutable: the answers of a request share one."""

    def __init__(self, words: Sequence[str], texts: TokenTexts) -> None:
        self._words = [word.encode() for word in words]
        self._longest = max(map(len, self._words))
        self._texts = texts
        self._containing = {token for word in self._words for token in texts.containing(word)}

    def completed_by(self, taken: Sequence[int], token: int) -> bool:
        """Whether the text contains a word if ``token`` follows the tokens ``taken``."""
        if token in self._containing:
            return True
        text = self._tail(taken) + self._texts.of[token]
        return any(word in text for word in self._words)

    def completing(self, taken: Sequence[int]) -> set[int]:
        """The tokens that complete a word if they follow the tokens ``taken``."""
        tail, found = self._tail(taken), set(self._containing)
        for word in self._words:
            for length in range(1, len(word)):
                if tail.endswith(word[:length]):
                    found.update(self._texts.beginning_with(word[length:]))
        return found

    def _tail(self, taken: Sequence[int]) -> bytes:
        """The end of the text, shorter than the longest word."""
        tail, at = b"", len(taken)
        while at and len(tail) < self._longest - 1:
            at -= 1
            tail = self._texts.of[taken[at]] + tail
        return tail[len(tail) - self._longest + 1 :] if len(tail) >= self._longest else tail
