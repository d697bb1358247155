"""The families of models whose calls are read, by name; a new one adds its class here."""

from __future__ import annotations

from collections.abc import Mapping

from trimode.runtime.openai_server.tools.call_syntax import CallSyntax
from trimode.runtime.openai_server.tools.hermes_syntax import HermesSyntax
from trimode.runtime.openai_server.tools.nemotron_syntax import NemotronSyntax
from trimode.runtime.openai_server.tools.xml_syntax import XmlSyntax

SYNTAXES: Mapping[str, type[CallSyntax]] = {"hermes": HermesSyntax, "nemotron": NemotronSyntax, "xml": XmlSyntax}
_DEFAULT = "hermes"


def syntax_of_template(template: str | None) -> str:
    """The name of the syntax that a chat template shows the model; ``hermes`` if it shows none."""
    text = template or ""
    marks = {name: syntax.template_mark for name, syntax in SYNTAXES.items()}
    return next((name for name, mark in marks.items() if mark is not None and mark in text), _DEFAULT)
