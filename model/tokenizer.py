"""The checkpoint's own tokenizer and chat template, without transformers.

The template comes with the checkpoint and is not trusted: it is rendered in jinja's immutable sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TypedDict

import tokenizers
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel
from tokenizers.decoders import DecodeStream

from trimode.common.errors import TriModeError
from trimode.common.records import read_json_record

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class _NamedTemplate(BaseModel):
    name: str
    template: str


class _SpecialToken(BaseModel):
    content: str


class _TokenizerConfig(BaseModel):
    """The part of ``tokenizer_config.json`` that templates need."""

    chat_template: str | list[_NamedTemplate] | None = None
    bos_token: str | _SpecialToken | None = None
    eos_token: str | _SpecialToken | None = None
    unk_token: str | _SpecialToken | None = None
    pad_token: str | _SpecialToken | None = None

    def default_template(self) -> str | None:
        if isinstance(self.chat_template, list):
            return next((entry.template for entry in self.chat_template if entry.name == "default"), None)
        return self.chat_template

    def special_tokens(self) -> dict[str, str]:
        tokens = {name: getattr(self, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        return {name: token if isinstance(token, str) else token.content for name, token in tokens.items() if token}


class Message(TypedDict):
    role: str
    content: str


class Tokenizer:
    """Text to ids and back, and conversations to prompts."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, chat_template: str | None, special_tokens: dict[str, str]
    ) -> None:
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens
        self._template = None if chat_template is None else _environment().from_string(chat_template)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read ``tokenizer.json`` and, if there is one, the chat template of a checkpoint or engine folder."""
        path = folder / "tokenizer.json"
        if not path.exists():
            raise TriModeError(f"{path} is missing; copy the checkpoint's tokenizer files there")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception on a bad file
            raise TriModeError(f"{path} is not a tokenizer: {error}") from None
        config_path = folder / "tokenizer_config.json"
        config = read_json_record(_TokenizerConfig, config_path) if config_path.exists() else _TokenizerConfig()
        template_path = folder / "chat_template.jinja"
        try:
            template = (
                template_path.read_text(encoding="utf-8") if template_path.exists() else config.default_template()
            )
            return cls(tokenizer, template, config.special_tokens())
        except (OSError, UnicodeDecodeError) as error:
            raise TriModeError(f"{template_path} cannot be read: {error}") from None
        except TemplateError as error:
            raise TriModeError(f"{folder}: the chat template does not compile: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Text to ids; special tokens spelled out in the text become their ids, as the model card does it."""
        return self._tokenizer.encode(text).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def step(self, stream: DecodeStream, token: int) -> str | None:
        """The text that ``token`` completes in an incremental decoding, if it completes any."""
        return stream.step(self._tokenizer, token)

    @cached_property
    def longest_token(self) -> int:
        """Bytes of text that one token stands for at most."""
        return max(len(token.encode()) for token in self._tokenizer.get_vocab())

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Every special token's id, by its text."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items() if token.special}

    def token_id(self, token: str) -> int | None:
        """The id of a special token by its text, None if the vocabulary has none."""
        return self._tokenizer.token_to_id(token)

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, enable_thinking: bool = False
    ) -> str:
        """A conversation as the prompt text that the model was trained on."""
        if self._template is None:
            raise TriModeError("this checkpoint has no chat template; give the prompt as it is (--no-chat-template)")
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                enable_thinking=enable_thinking,
                **self._special_tokens,
            )
        except Exception as error:  # a template may divide by zero, index out of range, or raise on purpose
            raise TriModeError(f"the chat template refuses the conversation: {error}") from None


def _environment() -> ImmutableSandboxedEnvironment:
    """The names that Hugging Face templates may use."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
