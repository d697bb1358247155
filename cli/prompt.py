"""The prompt that a command line gives: an argument, or standard input."""

from __future__ import annotations

import sys

from trimode.common.errors import TriModeError

STDIN = "-"


def read_prompt(prompt: str) -> str:
    """``prompt`` itself, or for ``-`` the text on stdin. Raises TriModeError if it is empty or not UTF-8.

    stdin is read like a text file: a byte order mark and one line break at the end are removed, and CRLF is a line
    break.
    """
    if prompt == STDIN:
        prompt = _read_stdin()
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise TriModeError("the prompt is not UTF-8; encode it as UTF-8") from None
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
