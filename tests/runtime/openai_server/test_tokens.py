"""The likelihoods of an answer's tokens beside its content, as both come."""

from __future__ import annotations

from pathlib import Path

from trimode.model.tokenizer import Tokenizer
from trimode.runtime.openai_server.tokens import LikelihoodsTeller
from trimode.runtime.request.outputs import Logprob


def test_a_character_of_several_tokens_is_told_when_it_is_whole(tiny_checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_folder(tiny_checkpoint)
    rows = [{token: Logprob(-0.5, 1)} for token in tokenizer.encode("a\N{EURO SIGN}b")]
    assert len(rows) > 3
    teller = LikelihoodsTeller(tokenizer, 0, thinking=False, skip_special_tokens=True)
    told = [len(teller.tell(rows[:2], "a").content), len(teller.tell(rows[2:-1], "\N{EURO SIGN}").content)]
    told += [len(teller.tell(rows[-1:], "b").content)]
    assert told == [1, len(rows) - 2, 1]
