"""The prompt that a command line gives: an argument, or standard input."""

from __future__ import annotations

import sys

from trimode.common.errors import TriModeError

STDIN = "-"


def read_prompt(prompt: str) -> str:
    """``prompt`` itself, or for ``-`` the text on stdin; raises TriModeError if it is empty or not UTF-8.

    As text files are read on every system: a byte order mark is dropped, CRLF is a line break, and one line break at
    the end is not part of the text.
    """
    if prompt == STDIN:
        prompt = _read_stdin()
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise TriModeError("the prompt is not UTF-8; give it in that encoding") from None
    if not prompt.strip():
        raise TriModeError("the prompt is empty; give some text to --prompt")
    return prompt


def _read_stdin() -> str:
    if sys.stdin is None:
        raise TriModeError("stdin is closed; pipe the prompt in, or give it to --prompt")
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TriModeError(f"the prompt on stdin is not UTF-8 (byte {error.start})") from None
    return text.replace("\r\n", "\n").removesuffix("\n")
