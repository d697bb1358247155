"""Options of other libraries' constructors: the values that change nothing pass, all others are refused."""

from __future__ import annotations

from typing import Any

import pytest

from trimode.common.errors import TriModeError
from trimode.runtime.api.foreign_options import refuse_foreign_options


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tensor_parallel_size": 1, "max_beam_width": 1},
        {"dtype": None, "enable_lora": False, "tokenizer": None, "trust_remote_code": False},
    ],
)
def test_values_that_change_nothing(options: dict[str, Any]) -> None:
    refuse_foreign_options(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is 2, but"),
        ({"max_beam_width": 4}, "max_beam_width is 4, but TriMode does not take it: beam search"),
        ({"enable_lora": True}, "enable_lora is True, but"),
        ({"max_loras": 1}, "max_loras is 1, but"),  # one is something here
        ({"tokenizer": ""}, "tokenizer is '', but"),
        ({"dtype": None, "unknown": None}, "LLM has no option unknown"),
        ({"tensor_parallel_size": 1, "revision": "main"}, "revision is 'main'"),
    ],
)
def test_values_that_would(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TriModeError, match=message):
        refuse_foreign_options(options)
