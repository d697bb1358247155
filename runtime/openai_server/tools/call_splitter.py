"""Splits an answer into its text and its calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from trimode.runtime.openai_server.partial_marks import partial_mark
from trimode.runtime.openai_server.tools.call_reader import CallReader


class CallDelta(NamedTuple):
    """What an update adds to a call. number: of the call, from 0. name: with the call's first delta. arguments: JSON
    text that continues that of the earlier deltas.
    """

    number: int
    name: str | None
    arguments: str


@dataclass
class Split:
    """What an update adds. content: never behind a call."""

    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class CallSplitter:
    """Splits a text that arrives in pieces; the joined results do not depend on where it was cut.

    Content ends where the first call begins, without the white space before it. Later text that is not a call is left
    out. A block behind an opening mark that is not a call is content.

    open_mark: of a block of calls. reader: of what follows the mark. calls: begun so far. unfinished: while the latest
    call is not complete, the text of its block, from the white space before the opening mark on; else empty.
    """

    def __init__(self, open_mark: str, reader: Callable[[], CallReader]) -> None:
        self.calls = 0
        self.unfinished = ""
        self._open_mark = open_mark
        self._new_reader = reader
        self._reader: CallReader | None = None
        self._held = ""  # text that is neither content yet nor read by the reader
        self._head = ""  # the current block's opening mark, with the white space before it
        self._block = ""  # the text behind it
        self._called = False  # whether the current block has a call
        self._complete = True  # the latest call

    def feed(self, text: str) -> Split:
        split = Split()
        self._held += text
        while self._held:
            if self._reader is not None:
                self._read(self._reader, split)
            elif not self._open(split):
                break
        return split

    def finish(self) -> Split:
        """The rest of the content."""
        rest = self._held if self._reader is None else self._head + self._block
        self._held = ""
        return Split("" if self.calls else rest)

    def _open(self, split: Split) -> bool:
        """Begin a block if there is an opening mark; False if there is none."""
        at = self._held.find(self._open_mark)
        end = at if at >= 0 else len(self._held) - partial_mark(self._held, self._open_mark)
        content = self._held[:end].rstrip()
        self._add_content(split, content)
        if at < 0:
            self._held = self._held[len(content) :]
            return False
        end += len(self._open_mark)
        self._head, self._block, self._held = self._held[len(content) : end], "", self._held[end:]
        self._called = False
        self._reader = self._new_reader()
        return True

    def _read(self, reader: CallReader, split: Split) -> None:
        text, self._held = self._held, ""
        self._block += text
        for piece in reader.feed(text):
            self.calls += piece.name is not None
            self._called, self._complete = True, piece.complete
            if piece.name is not None or piece.arguments:
                split.calls.append(CallDelta(self.calls - 1, piece.name, piece.arguments))
        if reader.failed:
            self._add_content(split, self._head)
            self._reader, self._held = None, self._block
        elif reader.rest is not None:
            self._reader, self._held = None, reader.rest
            self._block = self._block.removesuffix(reader.rest)
        if self._called:
            self.unfinished = "" if self._complete else self._head + self._block

    def _add_content(self, split: Split, text: str) -> None:
        if not self.calls:
            split.content += text
