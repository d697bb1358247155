"""Docstring sentences that describe parameters become lists in the site."""

from __future__ import annotations

import pytest

from scripts.docs.parameter_lists import as_list

NAMES = {"threads", "batch", "top_k"}


@pytest.mark.parametrize(
    ("paragraph", "shown"),
    [
        ("Run it.", "Run it."),
        ("threads: of a pass.", "- `threads`: of a pass."),
        (
            "threads: of a\npass. batch, top_k: sizes; 0: none.",
            "- `threads`: of a pass.\n- `batch`, `top_k`: sizes; 0: none.",
        ),
        ("Limits. threads: of a pass.", "Limits.\n\n- `threads`: of a pass."),
        ("unknown: not a parameter.", "unknown: not a parameter."),
        ("Its modes: ar, diffusion. threads: of a pass.", "Its modes: ar, diffusion.\n\n- `threads`: of a pass."),
    ],
)
def test_sentences_that_name_parameters_become_items(paragraph: str, shown: str) -> None:
    assert as_list(paragraph, NAMES) == shown
