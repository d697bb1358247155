"""Calls that are JSON objects, ``{"name": ..., "arguments": {...}}``, alone or in an array."""

from __future__ import annotations

import json
import re

from trimode.runtime.openai_server.tools.call_reader import CallPiece, CallReader

_OUTSIDE = re.compile(r'[{}\[\]"]')
_IN_STRING = re.compile(r'["\\]')
# The usual order of the keys; the arguments can be reported as they arrive.
_HEADER = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')


class JsonEnd:
    """Finds the end of a JSON object whose text arrives in pieces. depth: objects and arrays open before it."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False
        self._escaped = False

    def feed(self, text: str) -> int | None:
        """Where the object ends in ``text``; None if it goes on."""
        at = 0
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            found = (_IN_STRING if self._in_string else _OUTSIDE).search(text, at)
            if found is None:
                return None
            at, mark = found.end(), found[0]
            if mark == "\\":
                self._escaped = True
            elif mark == '"':
                self._in_string = not self._in_string
            elif mark in "{[":
                self._depth += 1
            else:
                self._depth -= 1
                if self._depth == 0:
                    return at
        return None


class JsonCall:
    """Reads one call. rest: the text behind it; None while it goes on. failed: it is not a call, nothing of it was
    reported, and rest is all of it.
    """

    def __init__(self) -> None:
        self.rest: str | None = None
        self.failed = False
        self._whole = JsonEnd()
        self._text = ""  # until the name is known
        self._arguments: JsonEnd | None = None  # while they are reported
        self._tail: JsonEnd | None = None  # behind them

    def feed(self, text: str) -> list[CallPiece]:
        if self._tail is not None:
            return self._end(self._tail, text)
        if self._arguments is not None:
            return self._continue(self._arguments, None, text)
        self._text += text
        if not self._text.startswith("{"):
            return self._fail()
        if header := _HEADER.match(self._text):
            return self._named(header[1], self._text[header.end() :])
        end = self._whole.feed(text)
        return [] if end is None else self._in_any_order(end + len(self._text) - len(text))

    def _fail(self) -> list[CallPiece]:
        self.failed, self.rest = True, self._text
        return []

    def _named(self, name: str, arguments: str) -> list[CallPiece]:
        try:
            decoded = json.loads(name)
        except ValueError:
            return self._fail()
        self._arguments = JsonEnd()
        return self._continue(self._arguments, decoded, arguments)

    def _continue(self, arguments: JsonEnd, name: str | None, text: str) -> list[CallPiece]:
        end = arguments.feed(text)
        pieces = [CallPiece(name, text[:end], complete=False)] if name is not None or text else []
        if end is not None:
            self._tail = JsonEnd(depth=1)
            pieces += self._end(self._tail, text[end:])
        return pieces

    def _end(self, tail: JsonEnd, text: str) -> list[CallPiece]:
        end = tail.feed(text)
        if end is None:
            return []
        self.rest = text[end:]
        return [CallPiece(None, "", complete=True)]

    def _in_any_order(self, end: int) -> list[CallPiece]:
        """The object is ``self._text[:end]``."""
        try:
            call = json.loads(self._text[:end])
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, KeyError, RecursionError):
            return self._fail()
        if not isinstance(name, str):
            return self._fail()
        self.rest = self._text[end:]
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return [CallPiece(name, written, complete=True)]


class JsonCallsReader(CallReader):
    """One call, or in_array several, and the closing mark."""

    def __init__(self, close: str, *, in_array: bool) -> None:
        super().__init__(close)
        self._in_array = in_array
        self._opened = not in_array
        self._call_comes = not in_array
        self._call: JsonCall | None = None
        self._calls = 0  # reported ones

    def _advance(self, pieces: list[CallPiece]) -> bool:
        if self._call is not None:
            return self._read(self._call, pieces)
        self._held.skip_space()
        if not self._held.text:
            return False
        if not self._opened:
            self._opened = self._call_comes = self._held.take("[") is True
            self.failed = not self._opened
            return True
        if self._call_comes:
            self._call, self._call_comes = JsonCall(), False
            return True
        if self._in_array and self._held.take(","):
            self._call_comes = True
            return True
        if self._in_array and self._held.take("]"):
            self._in_array = False
            return True
        return self._end_block()

    def _read(self, call: JsonCall, pieces: list[CallPiece]) -> bool:
        if not self._held.text:
            return False
        found = call.feed(self._held.take_all())
        pieces += found
        if found:
            self._calls += found[0].name is not None
        if call.failed:
            if self._calls == 0:
                self.failed = True
            else:
                self.rest = call.rest
        elif call.rest is not None:
            self._held.text, self._call = call.rest, None
        return True
