"""Calls of the form ``<function=NAME><parameter=KEY>VALUE</parameter>...</function>``."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from trimode.runtime.openai_server.tools.call_reader import CallPiece, CallReader

FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"


class XmlCallReader(CallReader):
    """One call and the closing mark. value_of: the value of a parameter, from the function, the parameter, and what is
    between its marks. The arguments are reported one by one, each when it is complete.
    """

    def __init__(self, close: str, value_of: Callable[[str, str, str], Any]) -> None:
        super().__init__(close)
        self._value_of = value_of
        self._function: str | None = None
        self._parameter: str | None = None
        self._searched = 0  # characters of the value in which its closing mark does not begin
        self._arguments = 0
        self._complete = False

    def _advance(self, pieces: list[CallPiece]) -> bool:
        if self._parameter is not None:
            return self._read_value(self._parameter, pieces)
        self._held.skip_space()
        if not self._held.text:
            return False
        if self._complete:
            return self._end_block()
        if self._function is None:
            return self._read_function(pieces)
        return self._read_parameter_or_end(pieces)

    def _read_function(self, pieces: list[CallPiece]) -> bool:
        name = self._name(FUNCTION)
        if name is None:
            return self.failed
        self._function = name
        pieces.append(CallPiece(name, "", complete=False))
        return True

    def _read_parameter_or_end(self, pieces: list[CallPiece]) -> bool:
        ended = self._held.take(END_FUNCTION)
        if ended:
            pieces.append(CallPiece(None, "}" if self._arguments else "{}", complete=True))
            self._complete = True
            return True
        if ended is None:
            return False
        key = self._name(PARAMETER)
        if key is None:
            return self.rest is not None
        self._parameter, self._searched = key, 0
        return True

    def _name(self, mark: str) -> str | None:
        """What is between ``mark`` and the next ``>``; None if it is not there yet, or cannot be."""
        text = self._held.text
        if text.startswith(mark):
            name, closed, rest = text[len(mark) :].partition(">")
            if closed:
                self._held.text = rest
                return name.strip()
        elif not mark.startswith(text):
            if self._function is None:
                self.failed = True
            else:
                self.rest = text
        return None

    def _read_value(self, parameter: str, pieces: list[CallPiece]) -> bool:
        text = self._held.text
        end = text.find(END_PARAMETER, self._searched)
        if end < 0:
            self._searched = max(0, len(text) - len(END_PARAMETER) + 1)
            return False
        written = text[:end].removeprefix("\n").removesuffix("\n")
        value = self._value_of(self._function or "", parameter, written)
        entry = f"{json.dumps(parameter, ensure_ascii=False)}: {json.dumps(value, ensure_ascii=False)}"
        pieces.append(CallPiece(None, (", " if self._arguments else "{") + entry, complete=False))
        self._arguments += 1
        self._parameter, self._held.text = None, text[end + len(END_PARAMETER) :]
        return True
