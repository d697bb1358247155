"""Choices of causal rows under token rules and logit biases.

The engine reports the k best tokens of a row over the whole vocabulary, without the rules. Each row is completed to its
*legal candidates*, best first: the k best legal tokens by logit and bias, as autoregression over the whole vocabulary
would report them. Greedy decoding needs the best one only.

- Where the grammar forces a token, it is the only candidate.
- Tokens with a bias are asked for, so their logits are known wherever they rank.
- Where enough of the reported tokens are legal, they are the candidates. A token that was not reported cannot be among
  them: its logit is at most the last reported one, and it has no bias.
- Otherwise the row is run again with a mask of the legal tokens without a bias.

Rows that would probably be run again get their masks at once.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import closing, suppress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimode.runtime.decoding.token_rules import DeadEndError, TokenRules, are_legal, count_legal, token_bits
from trimode.runtime.executor import Candidates, Ints, Words

_ABSENT = -1e29  # logits below it mark places behind the last legal token

Reals = NDArray[np.float32]


class Biases:
    """ids, values: [M], added to the logits of these tokens."""

    def __init__(self, by_token: Mapping[int, float], vocab_size: int) -> None:
        self.ids = np.array(sorted(by_token), np.int64)
        self.values = np.array([by_token[token] for token in sorted(by_token)], np.float32)
        self.others = ~token_bits(vocab_size, by_token)  # a mask


class Choice(NamedTuple):
    """A row's legal candidates, best first, [k]. forced: the grammar allows one token only."""

    logits: Reals
    tokens: Ints
    forced: bool = False


class RowInputs(NamedTuple):
    """What the rows of a pass have beside their tokens: masks [R, ceil(V / 32)] and asked ids [R, M]."""

    masks: Words | None = None
    asked: Ints | None = None


class RuledRows:
    """The rows of one causal pass.

    drafts: the tokens of the pass behind the one of its first logit row. needed: candidates that a choice needs; None
    for as many as the engine reports. logprobs: the rows' log-probabilities are wanted; they are over the whole
    vocabulary, so the first run has no masks.
    """

    def __init__(
        self, rules: TokenRules, biases: Biases | None, drafts: Sequence[int], needed: int | None, logprobs: bool
    ) -> None:
        self._choices: list[Choice] = []  # of the rows that may be emitted, once the pass is complete
        self._dead_end: DeadEndError | None = None  # of the row behind them
        self._rules = rules
        self._biases = biases
        self._drafts = drafts
        self._needed = needed
        self._logprobs = logprobs
        self._masked: set[int] = set()  # rows that have their mask in the first run
        self._asked: Ints | None = None
        self._reported: Candidates | None = None  # by the first run
        self._second: dict[int, tuple[Reals, Ints]] = {}  # candidates of the rows that were run again

    @property
    def reported(self) -> Candidates:
        """The candidates of the first run, over the whole vocabulary unless it had masks."""
        if self._reported is None:
            raise ValueError("the pass has not run")
        return self._reported

    def inputs(self, masked: Collection[int]) -> RowInputs:
        """Of the first run. masked: rows that get their masks at once, if log-probabilities allow it."""
        if self._logprobs:
            masked = ()
        rows = len(self._drafts) + 1
        masks = np.full((rows, self._rules.words), ~np.uint32(0)) if masked else None
        biased = [] if self._biases is None else self._biases.ids.tolist()
        self._asked = np.zeros((rows, len(biased) + self._logprobs), np.int64) if biased or self._logprobs else None
        if masked or self._logprobs:
            with closing(self._along_drafts()) as along, suppress(DeadEndError):
                for row in along:
                    forced = self._rules.forced
                    if forced and self._logprobs and self._asked is not None:
                        self._asked[row, -1] = forced[0]
                    elif masks is not None and row in masked and not forced:
                        masks[row] = self._mask_of_unbiased()
                        self._masked.add(row)
                    if row == max(masked, default=rows):
                        break
        if self._asked is not None and biased:
            self._asked[:, : len(biased)] = biased
        return RowInputs(masks, self._asked)

    def absorb(self, found: Candidates) -> tuple[Ints, Words] | None:
        """Take the candidates of the first run. Returns the rows that must be run again, and their masks [R, words]."""
        self._reported = found
        again = self._choose()
        return (np.array(list(again)), np.stack(list(again.values()))) if again else None

    def absorb_again(self, rows: Ints, found: Candidates) -> None:
        """Take the candidates of the rows that were run again with their masks."""
        for index, row in enumerate(rows.tolist()):
            self._second[row] = found.logits[index], found.tokens[index]
        self._choose()

    def choice(self, row: int) -> Choice:
        """Of a row that the text comes to. Raises DeadEndError if no token is legal there."""
        if row == len(self._choices) and self._dead_end is not None:
            raise self._dead_end
        return self._choices[row]

    def logit(self, row: int, token: int) -> float:
        """The model's logit of a token of the row's choice."""
        reported = self.reported
        sources = [(reported.logits[row], reported.tokens[row])]
        if self._asked is not None and reported.asked_logits is not None:
            sources.append((reported.asked_logits[row][: self._asked.shape[1]], self._asked[row]))
        if row in self._second:
            sources.append(self._second[row])
        return next(float(logits[tokens == token][0]) for logits, tokens in sources if (tokens == token).any())

    def _choose(self) -> dict[int, Words]:
        """Set the choices of the rows that may be emitted. Returns the masks of those that must be run again.

        The first row without a legal token ends them: it is an error only if the text comes to it.
        """
        self._choices, again = [], dict[int, Words]()
        with closing(self._along_drafts()) as along:
            for row in along:
                try:
                    choice = self._choice(row)
                    if choice is None:
                        again[row] = self._mask_of_unbiased()
                        continue
                except DeadEndError as error:
                    self._dead_end = error
                    break
                self._choices.append(choice)
                if self._needed == 1 and row < len(self._drafts) and choice.tokens[0] != self._drafts[row]:
                    break  # greedy: the run ends here
        return again

    def _along_drafts(self) -> Generator[int]:
        """The rows in order, each with the drafts before it taken. Stops at an illegal draft or a grammar's end."""
        taken = 0
        try:
            for row in range(len(self._drafts) + 1):
                yield row
                if row == len(self._drafts) or not self._rules.allows(self._drafts[row]):
                    return
                self._rules.take(self._drafts[row])
                taken += 1
                if self._rules.ended:
                    return
        finally:
            self._rules.undo(taken)

    def _choice(self, row: int) -> Choice | None:
        """The row's legal candidates; None if there are too few of them and the row has not been run again."""
        if forced := self._rules.forced:
            if not self._rules.allows(forced[0]):
                raise self._rules.dead_end()
            return Choice(np.zeros(1, np.float32), np.array(forced[:1]), forced=True)
        reported = self.reported
        logits, tokens = self._second.get(row, (reported.logits[row], reported.tokens[row]))
        needed = self._needed or reported.logits.shape[-1]
        asked = None if self._asked is None or reported.asked_logits is None else reported.asked_logits[row]
        if row in self._second or row in self._masked:
            legal = logits > _ABSENT
            return self._best(logits[legal], tokens[legal], asked, needed)
        if self._biases is None and needed == 1:
            best = self._rules.first_legal(tokens[logits > _ABSENT])
            return None if best is None else Choice(logits[best : best + 1], tokens[best : best + 1])
        mask = self._rules.mask()
        legal = are_legal(mask, tokens) & (logits > _ABSENT)
        if self._biases is None:
            enough = legal.sum() >= min(needed, count_legal(mask))
        else:
            legal &= are_legal(self._biases.others, tokens)
            biased = asked[: len(self._biases.ids)] + self._biases.values if asked is not None else self._biases.values
            above = are_legal(mask, self._biases.ids) & (biased > logits[-1])
            of_unbiased = count_legal(mask & self._biases.others)
            enough = legal.sum() >= of_unbiased or legal.sum() + above.sum() >= needed
        return self._best(logits[legal], tokens[legal], asked, needed) if enough else None

    def _best(self, logits: Reals, tokens: Ints, asked: Reals | None, needed: int) -> Choice:
        """These candidates, and the legal tokens with a bias: the ``needed`` best of them."""
        if self._biases is not None and asked is not None:
            mask = self._rules.mask()
            ids = self._biases.ids
            legal = are_legal(mask, ids)
            logits = np.concatenate([logits, (asked[: len(ids)] + self._biases.values)[legal]])
            tokens = np.concatenate([tokens, ids[legal]])
            order = np.lexsort((tokens, -logits))
            logits, tokens = logits[order], tokens[order]
        if not len(tokens):
            raise self._rules.dead_end()
        return Choice(logits[:needed], tokens[:needed])

    def _mask_of_unbiased(self) -> Words:
        """The legal tokens without a bias, for a run of the row. May be empty."""
        mask = self._rules.mask()
        return mask if self._biases is None else mask & self._biases.others
