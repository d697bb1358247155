"""The checkpoint's own tokenizer and chat templates, without transformers: the same text gives the same ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from trimode.common.errors import TriModeError
from trimode.common.records import read_json_object, read_text
from trimode.model.chat_template import ChatPrompt, ChatTemplate, Message
from trimode.model.config import CONFIG
from trimode.model.llama_tokenizer import DEFAULT_TOKENS, build_llama_tokenizer, is_llama_tokenizer
from trimode.model.special_tokens import ADDED_TOKENS_FILE, CONFIG_FILE, SPECIAL_TOKENS_FILE, SpecialTokens

TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
# Written by older versions of transformers' processors. Read if there is no other template.
PROCESSOR_TEMPLATE_FILE = "chat_template.json"
TEMPLATE_FOLDER = "additional_chat_templates"
FILES = (
    TOKENIZER_FILE,
    CONFIG_FILE,
    CONFIG,
    SPECIAL_TOKENS_FILE,
    ADDED_TOKENS_FILE,
    TEMPLATE_FILE,
    PROCESSOR_TEMPLATE_FILE,
)
_DEFAULT, _TOOL_USE = "default", "tool_use"


def is_tokenizer_file(path: PurePath) -> bool:
    """Whether :class:`Tokenizer` reads a file of this path, which is relative to the tokenizer's folder."""
    if len(path.parts) == 1:
        return path.name in FILES
    return path.parts[:-1] == (TEMPLATE_FOLDER,) and path.suffix == ".jinja" and not path.name.startswith(".")


def tokenizer_files(folder: Path) -> list[PurePath]:
    """The files of the folder that :class:`Tokenizer` reads, relative to the folder."""
    candidates = [*folder.iterdir(), *(folder / TEMPLATE_FOLDER).glob("*")]
    paths = [path.relative_to(folder) for path in candidates if path.is_file()]
    return sorted(filter(is_tokenizer_file, paths), key=lambda path: (len(path.parts), path))


class Tokenizer:
    """Text to ids and back, and conversations to prompts."""

    def __init__(
        self, backend: Backend, templates: Mapping[str, str], template_variables: Mapping[str, Any] | None = None
    ) -> None:
        """templates: sources of chat templates by name. template_variables: variables other than the conversation.

        Raises TriModeError if the default template does not compile.
        """
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self._sources = dict(templates)
        self._variables = dict(template_variables or {})
        self._compiled: dict[str, ChatTemplate] = {}
        if _DEFAULT in self._sources:
            self._template(_DEFAULT, with_tools=False)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read the tokenizer and the chat templates of a checkpoint, or of an engine's ``tokenizer`` folder.

        Raises TriModeError if a file is missing or cannot be used.
        """
        path = folder / TOKENIZER_FILE
        if not path.exists():
            raise TriModeError(f"{path} is missing; copy the checkpoint's tokenizer files there")
        content = read_text(path)
        try:
            backend = Backend.from_str(content)
        except Exception as error:  # the library raises bare Exception on a bad file
            raise TriModeError(f"{path} is not a tokenizer: {error}") from None
        config = read_json_object(folder / CONFIG_FILE) if (folder / CONFIG_FILE).exists() else {}
        class_name = config.get("tokenizer_class") or _class_name(folder / CONFIG)
        rebuilt = is_llama_tokenizer(class_name, backend)
        special_tokens = SpecialTokens(folder, (DEFAULT_TOKENS if rebuilt else {}) | config, backend)
        if rebuilt:
            backend = build_llama_tokenizer(backend, config)
        special_tokens.add_to(backend)
        backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
        templates = _read_templates(folder, config.get("chat_template"))
        try:
            return cls(backend, templates, special_tokens.template_variables())
        except TriModeError as error:
            raise TriModeError(f"{folder}: {error}") from None

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Text to ids; special tokens spelled out in the text become their ids.

        add_special_tokens: add what the tokenizer adds around plain text, such as BOS. A rendered chat has it already.
        """
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def step(self, stream: DecodeStream, token: int) -> str | None:
        """The text that ``token`` completes in an incremental decoding, if it completes any."""
        return stream.step(self._backend, token)

    @property
    def size(self) -> int:
        """Tokens of the vocabulary, added ones included."""
        return self._backend.get_vocab_size()

    def serialized(self) -> str:
        """The content of an equivalent ``tokenizer.json``, special tokens included."""
        return self._backend.to_str()

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest text of a token."""
        return max(len(token.encode()) for token in self._backend.get_vocab())

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Every special token's id, by its text."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items() if token.special}

    def token_id(self, token: str) -> int | None:
        """The id of a token by its text; None if the vocabulary does not have it."""
        return self._backend.token_to_id(token)

    def token(self, token_id: int) -> str:
        """The vocabulary's text of a token; empty if the vocabulary has no such id."""
        return self._backend.id_to_token(token_id) or ""

    def apply_chat_template(self, messages: Sequence[Message], **options: Any) -> str:
        """The text of :meth:`chat_prompt`, with the same options."""
        return self.chat_prompt(messages, **options).text

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        enable_thinking: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> ChatPrompt:
        """A conversation as the prompt that the model was trained on; :meth:`encode` makes its ids.

        tools: JSON schemas of functions. documents: records with title and text. chat_template: the name of one of the
        checkpoint's templates, or a template; by default the checkpoint's ``tool_use`` template if there are tools,
        else its ``default`` one. enable_thinking: passed to the template; None leaves it to the template's own default.
        continue_final_message: end the prompt inside the last message; needs ``add_generation_prompt=False``.
        chat_template_kwargs: further variables of the template; they take precedence over special tokens.

        Raises TriModeError if there is no such template, or the template refuses the conversation.
        """
        variables = self._variables | dict(chat_template_kwargs or {})
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        return self._template(chat_template, with_tools=tools is not None).render(
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )

    @property
    def tool_template(self) -> str | None:
        """The source of the chat template for conversations with tools; None without a default template."""
        return self._sources.get(_TOOL_USE, self._sources.get(_DEFAULT))

    def _template(self, name: str | None, with_tools: bool) -> ChatTemplate:
        """The template of that name, or that source. None: the default for a conversation with or without tools."""
        if name is None:
            name = _TOOL_USE if with_tools and _TOOL_USE in self._sources else _DEFAULT
            if name not in self._sources:
                raise TriModeError(
                    f"this checkpoint has no default chat template; name one of {', '.join(sorted(self._sources))}"
                    if self._sources
                    else "this checkpoint has no chat template; give the prompt as it is (--no-chat-template)"
                )
        if name not in self._sources:
            return ChatTemplate(name)
        if name not in self._compiled:
            self._compiled[name] = ChatTemplate(self._sources[name])
        return self._compiled[name]


def _class_name(path: Path) -> Any:
    """The tokenizer's class in ``config.json``, used if ``tokenizer_config.json`` has none."""
    return read_json_object(path).get("tokenizer_class") if path.exists() else None


def _read_templates(folder: Path, configured: Any) -> dict[str, str]:
    """Chat templates by name. Template files take the place of those in ``tokenizer_config.json``."""
    templates = {
        _DEFAULT if path.parent == PurePath() else path.stem: _read_template(folder / path)
        for path in tokenizer_files(folder)
        if path.suffix == ".jinja"
    }
    if templates:
        return templates
    if configured is None and (path := folder / PROCESSOR_TEMPLATE_FILE).is_file():
        configured = read_json_object(path).get("chat_template")
    if configured is None:
        return {}
    if isinstance(configured, str):
        return {_DEFAULT: configured}
    try:
        named = configured if isinstance(configured, dict) else {each["name"]: each["template"] for each in configured}
        if all(isinstance(text, str) for text in (*named, *named.values())):
            return dict(named)
    except (TypeError, KeyError):
        pass
    raise TriModeError(f"{folder / CONFIG_FILE}: chat_template must be a template, or a list of name and template")


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TriModeError(f"{path} cannot be read: {error}") from None
