"""Log-probabilities of a choice's tokens, listed in step with its content."""

from __future__ import annotations

from pathlib import Path

from trimode.model.tokenizer import Tokenizer
from trimode.runtime.openai_server.token_details import ChatLogprobsBuilder
from trimode.runtime.request.outputs import Logprob


def test_a_character_of_several_tokens_is_listed_when_it_is_complete(tiny_checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_folder(tiny_checkpoint)
    rows = [{token: Logprob(-0.5, 1)} for token in tokenizer.encode("a\N{EURO SIGN}b")]
    assert len(rows) > 3
    builder = ChatLogprobsBuilder(tokenizer, 0, thinking=False, skip_special_tokens=True)
    listed = [len(builder.build(rows[:2], "a").content), len(builder.build(rows[2:-1], "\N{EURO SIGN}").content)]
    listed += [len(builder.build(rows[-1:], "b").content)]
    assert listed == [1, len(rows) - 2, 1]
