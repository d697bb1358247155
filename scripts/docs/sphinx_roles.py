"""MkDocs hook: show the Sphinx roles of docstrings, such as ``:mod:`trimode.model.step```, as plain code."""

from __future__ import annotations

import re
from typing import Any

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):(?=<code>)")


def on_page_content(html: str, **_: Any) -> str:
    return ROLE.sub("", html)
