"""Chat templates: render a conversation to the same prompt text as transformers' ``apply_chat_template``.

Templates come with the checkpoint and are not trusted. They are rendered in jinja's immutable sandbox and get only
plain JSON values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
import jinja2.nodes
import jinja2.parser
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from trimode.common.errors import TriModeError

THINK, END_THINK = "<think>", "</think>"
Message = Mapping[str, Any]
"""One turn: ``role``, ``content`` (text, a list of parts, or None), and whatever else the template reads."""

# Names of a message's reasoning, the standard one first.
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
# Marks the end of the message that is to be continued. The trailing space shows whether the template strips content.
_CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class ChatPrompt(NamedTuple):
    """A rendered conversation. thinking: the prompt ends inside a ``<think>`` that the template or the message to be
    continued opened. A ``<think>`` in any other message does not count.
    """

    text: str
    thinking: bool


class ChatTemplate:
    """A compiled template. Raises TriModeError if it does not compile."""

    def __init__(self, source: str) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise TriModeError(f"the chat template does not compile: {error}") from None
        self._source = source

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any],
    ) -> ChatPrompt:
        """Render a conversation.

        variables: the template's other variables, special tokens among them. continue_final_message: end the prompt
        inside the last message, which the model then continues. Raises TriModeError if the conversation is malformed,
        or if the template refuses it.
        """
        if continue_final_message and add_generation_prompt:
            raise TriModeError("continue_final_message needs add_generation_prompt=False; give one of them")
        if clash := sorted(_RESERVED & variables.keys()):
            raise TriModeError(f"{clash[0]} is reserved and cannot be a template variable; give it as an argument")
        chat = _conversation(messages)
        given = {
            "tools": None if tools is None else _records("tools", tools),
            "documents": None if documents is None else _records("documents", documents),
            "add_generation_prompt": add_generation_prompt,
            **{name: _plain(value) for name, value in variables.items()},
        }
        text = self._text(chat, given, continue_final_message)
        if text.rfind(THINK) <= text.rfind(END_THINK):
            return ChatPrompt(text, thinking=False)
        # The last <think> may come from a message: render once more without those.
        kept = chat[-1:] if continue_final_message else []
        chat = [_without_marks(message) for message in chat[: len(chat) - len(kept)]] + kept
        given |= {name: _without_marks(given[name]) for name in ("tools", "documents")}
        unmarked = self._text(chat, given, continue_final_message)
        return ChatPrompt(text, thinking=unmarked.rfind(THINK) > unmarked.rfind(END_THINK))

    def _text(self, chat: list[dict[str, Any]], given: dict[str, Any], continue_final_message: bool) -> str:
        continued = _mark_end(chat, self._source) if continue_final_message else None
        try:
            text = self._template.render(messages=continued.chat if continued else chat, **given)
        except Exception as error:  # a template may divide by zero, index out of range, or raise on purpose
            reason = " ".join(str(error).split()) or type(error).__name__
            raise TriModeError(f"the chat template refuses the conversation: {reason}") from None
        return text if continued is None else _cut_at_mark(text, continued.content)


class _Continued(NamedTuple):
    """A conversation whose last message ends with the mark. ``content``: the message's text without the mark."""

    chat: list[dict[str, Any]]
    content: str


def _mark_end(chat: list[dict[str, Any]], source: str) -> _Continued:
    """Raises TriModeError if the last message has no text, or the template does not read any."""
    content = chat[-1].get("content", "")
    if "content" not in source:
        raise TriModeError("continue_final_message: the chat template does not read content")
    if isinstance(content, str):
        return _Continued([*chat[:-1], chat[-1] | {"content": content + _CONTINUED}], content)
    if isinstance(content, list):
        for index in reversed(range(len(content))):
            part = content[index]
            if isinstance(part, dict) and isinstance(text := part.get("text"), str):
                parts = [*content[:index], part | {"text": text + _CONTINUED}, *content[index + 1 :]]
                return _Continued([*chat[:-1], chat[-1] | {"content": parts}], text)
    raise TriModeError("continue_final_message: the last message has no text")


def _cut_at_mark(text: str, content: str) -> str:
    mark = _CONTINUED.strip()
    if mark not in text or content.strip() not in text:
        raise TriModeError("continue_final_message: the chat template does not repeat the last message's text")
    at = text.rindex(mark)
    before = text[:at]
    return before if text.startswith(_CONTINUED, at) else before.rstrip()


def _conversation(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages for the template: without fields that are None, and with reasoning under each of its names."""
    if not messages:
        raise TriModeError("the conversation is empty; give at least one message")
    chat = []
    for message in _records("messages", messages):
        present = {name: value for name, value in message.items() if value is not None}
        reasoning = next((present[name] for name in _REASONING_FIELDS if name in present), None)
        if reasoning is not None:
            present = {"thinking": reasoning} | present | {"reasoning_content": reasoning}
        chat.append(present)
    return chat


def _records(what: str, values: Sequence[Any]) -> list[dict[str, Any]]:
    plain = _plain(values)
    if not isinstance(plain, list) or not all(isinstance(value, dict) for value in plain):
        raise TriModeError(f"{what} must be a list of objects")
    return plain


def _plain(value: Any) -> Any:
    """A copy made of JSON's own types: an object with methods could be a way out of the sandbox."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {_plain(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if callable(dump := getattr(value, "model_dump", None)):  # a pydantic record, as OpenAI's client returns
        return _plain(dump())
    raise TriModeError(f"a {type(value).__name__} cannot be given to a chat template; give text, numbers or objects")


def _without_marks(value: Any) -> Any:
    """The value with a space inside each thinking mark, so that it contains no mark, also after concatenation."""
    if isinstance(value, str):
        return value.replace(THINK, "< think>").replace(END_THINK, "< /think>")
    if isinstance(value, dict):
        return {name: _without_marks(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_marks(item) for item in value]
    return value


class _Generation(Extension):
    """``{% generation %}`` ... ``{% endgeneration %}``: marks the model's own text for training. It adds no text."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Undefined(jinja2.Undefined):
    """A missing value. Where it would be an error, missing content counts as empty text."""

    def _empty_text(self) -> str:
        if self._undefined_name != "content":
            self._fail_with_undefined_error()
        return ""

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name.startswith("__") else getattr(self._empty_text(), name)

    def __getitem__(self, key: Any) -> Any:
        return self._empty_text()[key]

    def __add__(self, other: Any) -> Any:
        return self._empty_text() + other

    def __radd__(self, other: Any) -> Any:
        return other + self._empty_text()


class _PublicNamespace(Namespace):
    """``namespace()`` without names that begin with an underscore, which lead to the interpreter's internals."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *given = args
        content = dict(*given, **values)
        for name in content:
            _require_public(name)
        Namespace.__init__(self, content)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)


def _require_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a template's namespace has no name {name!r}: names begin with a letter")


def _environment() -> ImmutableSandboxedEnvironment:
    """A jinja environment with the names, filters and tags that transformers provides."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=_Undefined,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    environment.globals["namespace"] = _PublicNamespace
    return environment
