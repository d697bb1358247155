"""What the readers of all families have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from trimode.runtime.openai_server.partial_marks import partial_mark


class CallPiece(NamedTuple):
    """A piece of a call. name: of the function, in the call's first piece. arguments: JSON text that continues that of
    the earlier pieces. complete: whether it ends the call.
    """

    name: str | None
    arguments: str
    complete: bool


class CallReader(ABC):
    """Reads the calls behind one opening mark, from a text that arrives in pieces.

    rest: the text behind the block of calls; None while the block goes on. failed: what was read is not a block of
    calls, and no call of it was reported. close: the closing mark.
    """

    def __init__(self, close: str) -> None:
        self.rest: str | None = None
        self.failed = False
        self._close = close
        self._held = Held()

    def feed(self, text: str) -> list[CallPiece]:
        """The pieces that ``text`` adds. Not to be called once ``rest`` is set or ``failed`` is true."""
        self._held.text += text
        pieces: list[CallPiece] = []
        while self.rest is None and not self.failed and self._advance(pieces):
            pass
        return pieces

    @abstractmethod
    def _advance(self, pieces: list[CallPiece]) -> bool:
        """One step; False if it needs more text."""

    def _end_block(self) -> bool:
        """Take the closing mark, if it is there, and set ``rest``; False if it needs more text. A block without its
        closing mark ends at its last call.
        """
        found = self._held.take(self._close)
        if found is not None:
            self.rest = self._held.take_all()
        return found is not None


class Held:
    """Text that was received and not used yet."""

    def __init__(self) -> None:
        self.text = ""

    def skip_space(self) -> None:
        self.text = self.text.lstrip()

    def take(self, mark: str) -> bool | None:
        """Remove ``mark`` from the start and return True; False if the text does not begin with it, None if it is too
        short to tell.
        """
        if self.text.startswith(mark):
            self.text = self.text[len(mark) :]
            return True
        return None if partial_mark(self.text, mark) == len(self.text) else False

    def take_all(self) -> str:
        text, self.text = self.text, ""
        return text
