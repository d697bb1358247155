"""Streaming detokenisation: whole UTF-8 characters, cut at the first stop string. Emitted text is never retracted."""

from __future__ import annotations

from tokenizers.decoders import DecodeStream

from trimode.model.tokenizer import Tokenizer


class TextStream:
    """The text of the tokens fed, up to the first stop string: the joined results of :meth:`new_text` and
    :meth:`finish`.

    stops: strings that end the text. include_stop: keep the stop string found in the text. stop: the one found, or
    None.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: tuple[str, ...],
        *,
        include_stop: bool,
        skip_special_tokens: bool,
    ) -> None:
        self._stop: str | None = None
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._stops = stops
        self._include_stop = include_stop
        self._tokens: list[int] = []
        self._fed = 0  # tokens that were decoded incrementally
        self._decoded = ""
        self._returned = 0  # characters

    @property
    def stop(self) -> str | None:
        self._decode()
        return self._stop

    def feed(self, tokens: list[int]) -> None:
        self._tokens += tokens

    def new_text(self) -> str:
        """The text since the last call, up to what may still become a character or a stop string."""
        self._decode()
        return self._take_to(len(self._decoded) - self._possible_stop())

    def finish(self) -> str:
        """The rest of the text. An incomplete character becomes the replacement character."""
        if not self._stops or self.stop is None:
            whole = self._tokenizer.decode(self._tokens, self._skip_special_tokens)
            self._append(whole.removeprefix(self._decoded))
        return self._take_to(len(self._decoded))

    def _decode(self) -> None:
        pieces = [self._tokenizer.step(self._stream, token) or "" for token in self._tokens[self._fed :]]
        self._fed = len(self._tokens)
        self._append("".join(pieces))

    def _append(self, text: str) -> None:
        """Append decoded text, and find the stop string that is complete first."""
        if not self._stops:
            self._decoded += text
            return
        searched = max(0, len(self._decoded) - max(map(len, self._stops)) + 1)
        self._decoded += text
        found = [(at + len(stop), stop) for stop in self._stops if (at := self._decoded.find(stop, searched)) >= 0]
        if found:
            end, self._stop = min(found)
            self._decoded = self._decoded[: end if self._include_stop else end - len(self._stop)]

    def _possible_stop(self) -> int:
        """Length of the longest suffix of the text that may become a stop string; 0 once one was found."""
        if not self._stops or self._stop is not None:
            return 0
        longest = max(map(len, self._stops)) - 1
        for length in range(min(longest, len(self._decoded) - self._returned), 0, -1):
            if any(stop.startswith(self._decoded[-length:]) for stop in self._stops):
                return length
        return 0

    def _take_to(self, end: int) -> str:
        text = self._decoded[self._returned : end]
        self._returned = max(self._returned, end)
        return text
