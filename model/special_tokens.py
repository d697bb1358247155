"""The special tokens of a checkpoint's tokenizer, merged from its JSON files as transformers merges them.

``tokenizer_config.json`` names them. ``special_tokens_map.json`` and ``added_tokens.json``, which older versions of
transformers wrote, count only where ``tokenizer_config.json`` has no ``added_tokens_decoder``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from trimode.common.errors import TriModeError
from trimode.common.records import read_json_object

CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
# The names that every tokenizer may have, in the order in which transformers adds their tokens.
_STANDARD = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_UNNAMED, _FORMER_UNNAMED = "extra_special_tokens", "additional_special_tokens"
_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
_DESCRIBED = "added_tokens_decoder"


class SpecialTokens:
    """named: by attribute, such as ``bos_token``. unnamed: without one. described: added tokens with their flags."""

    def __init__(self, folder: Path, config: dict[str, Any], backend: Tokenizer) -> None:
        """config: the content of ``tokenizer_config.json``. Raises TriModeError if a value is not a token."""
        where = folder / CONFIG_FILE
        self.named = {name: _token(value, where) for name, value in config.items() if _names_token(name, value)}
        self.unnamed: list[AddedToken] = []
        self._take_unnamed(config.get(_UNNAMED) or config.get(_FORMER_UNNAMED) or [], where)
        if _DESCRIBED in config:
            entries = config[_DESCRIBED]
            if not isinstance(entries, dict):
                raise TriModeError(f"{where}: {_DESCRIBED} must be an object of tokens by id")
            by_id = {_id(key, where): _token(value, where, special=False) for key, value in entries.items()}
        else:
            self._take_names(folder / SPECIAL_TOKENS_FILE, takes_former=not {_UNNAMED, _FORMER_UNNAMED} & config.keys())
            by_id = self._added_tokens(folder / ADDED_TOKENS_FILE) | backend.get_added_tokens_decoder()
        self.described = [by_id[index] for index in sorted(by_id)]
        if backend.padding and "pad_token" not in config:
            self.named.setdefault("pad_token", AddedToken(backend.padding["pad_token"], special=True))
        with_flags = {token.content: token for token in self.described}
        ordered = [name for name in _STANDARD if name in self.named]
        ordered += [name for name in self.named if name not in _STANDARD]
        self.named = {name: with_flags.get(self.named[name].content, self.named[name]) for name in ordered}

    def add_to(self, backend: Tokenizer) -> None:
        """Add the tokens that the backend lacks, and set the flags of those that it has. Named tokens are special.

        A token outside the backend's vocabulary gets the next free id.
        """
        tokens = list(self.described)
        known = {token.content for token in (*backend.get_added_tokens_decoder().values(), *tokens)}
        for token in (*self.named.values(), *self.unnamed):
            if token.content not in known:
                known.add(token.content)
                tokens.append(token)
        names = {token.content for token in self.named.values()}
        for token in tokens:
            token.special = token.special or token.content in names
        backend.add_tokens(tokens)

    def template_variables(self) -> dict[str, Any]:
        """What chat templates read: each token's text by its name, and the list ``additional_special_tokens``."""
        variables: dict[str, Any] = {name: token.content for name, token in self.named.items()}
        if self.unnamed:
            variables[_FORMER_UNNAMED] = [token.content for token in self.unnamed]
        return variables

    def _take_unnamed(self, tokens: Any, where: Path) -> None:
        if isinstance(tokens, dict):
            self.named |= {name: _token(token, where) for name, token in tokens.items()}
            return
        if not isinstance(tokens, list):
            raise TriModeError(f"{where}: {_UNNAMED} must be a list of tokens (got {tokens!r})")
        known = {token.content for token in self.unnamed}
        self.unnamed += [token for token in (_token(each, where) for each in tokens) if token.content not in known]

    def _take_names(self, where: Path, takes_former: bool) -> None:
        for name, value in read_json_object(where).items() if where.is_file() else ():
            if name == _UNNAMED or (name == _FORMER_UNNAMED and takes_former):
                self._take_unnamed(value, where)
            elif value is None:
                self.named.pop(name, None)
            elif _names_token(name, value):
                self.named[name] = _token(value, where)

    def _added_tokens(self, where: Path) -> dict[int, AddedToken]:
        special = {token.content for token in (*self.named.values(), *self.unnamed)}
        return {
            _id(index, where): AddedToken(content, normalized=content not in special, special=content in special)
            for content, index in (read_json_object(where).items() if where.is_file() else ())
        }


def _names_token(name: str, value: Any) -> bool:
    return name.endswith("_token") and (isinstance(value, str) or (isinstance(value, dict) and "content" in value))


def _token(value: Any, where: Path, special: bool = True) -> AddedToken:
    """A token from its text, or from a description; ``special``: unless the description says so."""
    if isinstance(value, str):
        return AddedToken(value, special=special)
    try:
        return AddedToken(**{"special": special} | {name: value[name] for name in _FLAGS if name in value})
    except (TypeError, AttributeError):
        raise TriModeError(f"{where}: {value!r} is not a token; give its text, or an object with content") from None


def _id(value: Any, where: Path) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise TriModeError(f"{where}: {value!r} is not a token id") from None
