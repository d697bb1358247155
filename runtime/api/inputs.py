"""Inputs of ``LLM.generate``: which forms there are, and what token ids each becomes."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Many
from typing import Any, NamedTuple

from trimode.common.errors import TriModeError
from trimode.model.chat_template import Message
from trimode.model.tokenizer import Tokenizer

Input = str | Many[int] | Many[Message] | Mapping[str, Any]
_EXPECTED = "give text, token ids, messages, or a list of these"
# The options that a dict may have beside each kind of input.
_OPTIONS: dict[str, frozenset[str]] = {
    "prompt": frozenset(),
    "prompt_token_ids": frozenset({"thinking", "answer_token_ids"}),
    "messages": frozenset(inspect.signature(Tokenizer.chat_prompt).parameters) - {"self", "messages"},
}


class Prompt(NamedTuple):
    """An encoded input. text: None for token ids. thinking: whether it ends inside a thought, None if unknown. answer:
    first tokens of the answer, which another process has emitted.
    """

    text: str | None
    token_ids: list[int]
    thinking: bool | None
    answer: Many[int] = ()


def is_one_input(inputs: Any) -> bool:
    """Whether this is one input, not a list of inputs. Raises TriModeError if it can be neither."""
    if isinstance(inputs, (str, bytes, bytearray, Mapping)):
        return True
    try:
        if len(inputs) == 0:
            return False
        first = inputs[0]
    except (TypeError, LookupError):
        raise TriModeError(f"an input is of type {type(inputs).__name__}; {_EXPECTED}") from None
    return _as_index(first) is not None or (isinstance(first, Mapping) and "role" in first)


class InputEncoder:
    """Turns an input into token ids that the model has.

    vocabulary: the model's vocabulary size, which the tokenizer's may exceed.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary

    def encode(self, inputs: Any, enable_thinking: bool | None) -> Prompt:
        """Raises TriModeError for what is no input, and for tokens that the model does not have.

        enable_thinking: for chats, whether the template opens a thought; None leaves it to the template.
        """
        options: dict[str, Any] = {}
        if isinstance(inputs, Mapping):
            inputs, options = _input_and_options(inputs)
        if isinstance(inputs, str):
            return Prompt(inputs, self._encode_text(inputs, add_special_tokens=True), None)
        items = _items_of(inputs)
        if items and all(isinstance(item, dict) for item in items):
            chat = self._tokenizer.chat_prompt(items, **{"enable_thinking": enable_thinking} | options)
            return Prompt(chat.text, self._encode_text(chat.text, add_special_tokens=False), chat.thinking)
        answer = [self.require_token("answer token", token) for token in _items_of(options.get("answer_token_ids", ()))]
        prompt = [self.require_token("prompt token", token) for token in items]
        return Prompt(None, prompt, options.get("thinking"), answer)

    def require_token(self, what: str, token: Any) -> int:
        """``token`` as an int; raises TriModeError if the model has no such token."""
        index = _as_index(token)
        if index is None or not 0 <= index < self._vocabulary:
            raise TriModeError(f"{what} {token!r} is outside the model's vocabulary of {self._vocabulary}")
        return index

    def _encode_text(self, text: str, add_special_tokens: bool) -> list[int]:
        tokens = self._tokenizer.encode(text, add_special_tokens)
        self._require_known(tokens)
        return tokens

    def _require_known(self, tokens: Iterable[int]) -> None:
        beyond = next((token for token in tokens if token >= self._vocabulary), None)
        if beyond is not None:
            text = self._tokenizer.decode([beyond], skip_special_tokens=False)
            raise TriModeError(
                f"the prompt contains {text!r}, token {beyond} of the tokenizer, which is outside the model's "
                f"vocabulary of {self._vocabulary}; remove it from the prompt"
            )


def _input_and_options(record: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    kind = next((name for name in _OPTIONS if name in record), None)
    if kind is None or record.keys() - _OPTIONS[kind] != {kind}:
        found = ", ".join(map(repr, record))
        raise TriModeError(f"an input has {found}; give 'prompt', 'prompt_token_ids' or 'messages', and its options")
    return record[kind], {name: value for name, value in record.items() if name != kind}


def _items_of(one: Any) -> list[Any]:
    """The token ids or messages of one input. Raises TriModeError for bytes, and for what has no items."""
    if isinstance(one, bytes | bytearray | memoryview):
        raise TriModeError("an input is bytes; decode it to text, or give its token ids as a list")
    try:
        return list(one)
    except TypeError:
        raise TriModeError(f"an input is of type {type(one).__name__}; {_EXPECTED}") from None


def _as_index(value: Any) -> int | None:
    """``value`` as an int if it is an integer of Python, numpy or torch (a scalar), else None."""
    if isinstance(value, bool) or getattr(value, "ndim", 0) != 0 or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
