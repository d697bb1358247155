"""Griffe extension: show the sentences ``name: meaning.`` of a docstring as a list of parameters.

The project's docstrings describe parameters and fields in running text: ``threads: of a pass. max_batch_size: answers
that run at once.`` Where the names are parameters or fields of the object, the site shows one list item for each.
"""

from __future__ import annotations

import re
from typing import Any

import griffe


class ParameterLists(griffe.Extension):
    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        _rewrite(func, {parameter.name for parameter in func.parameters})

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        names = set(cls.members)
        if "__init__" in cls.members and cls.members["__init__"].is_function:
            names |= {parameter.name for parameter in cls.members["__init__"].parameters}
        _rewrite(cls, names)


def _rewrite(documented: griffe.Object, names: set[str]) -> None:
    if documented.docstring is not None:
        paragraphs = re.split(r"\n\s*\n", documented.docstring.value)
        documented.docstring.value = "\n\n".join(as_list(paragraph, names) for paragraph in paragraphs)


def as_list(paragraph: str, names: set[str]) -> str:
    """The paragraph; from its first ``name: `` on, a list item for each sentence that begins so."""
    starts = [
        found.start(1)
        for found in re.finditer(r"(?:^|(?<=[.;]\s))(\w+(?:, \w+)*): ", paragraph)
        if all(name in names for name in found[1].split(", "))
    ]
    if not starts or paragraph.lstrip().startswith(("-", "|", "`", ">")):
        return paragraph
    ends = [*starts[1:], len(paragraph)]
    items = [" ".join(paragraph[start:end].split()) for start, end in zip(starts, ends, strict=True)]
    items = [re.sub(r"^([\w, ]+): ", lambda found: f"- `{found[1].replace(', ', '`, `')}`: ", item) for item in items]
    return "\n\n".join(part for part in (paragraph[: starts[0]].strip(), "\n".join(items)) if part)
