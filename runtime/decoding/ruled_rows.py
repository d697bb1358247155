"""Choices of causal rows under token rules and logit biases.

The engine reports the k best tokens of a row over the whole vocabulary, without the rules. Each row is completed to its
*legal candidates*, best first: the k best legal tokens by logit and bias, as autoregression over the whole vocabulary
would report them. Greedy decoding needs the best one only.

- Where the grammar forces a token, it is the only candidate.
- Logits of tokens with a bias are always requested, so they are known at any rank.
- Where enough of the reported tokens are legal, they are the candidates. A token that was not reported cannot be among
  them: its logit is at most the last reported one, and it has no bias.
- Otherwise the row is run again with a mask of the legal tokens without a bias.

Rows that would probably be run again get their masks in the first run. A walk along the drafts has determined which
tokens the grammar forces and which drafts are legal, so the rules move to a row only if more is needed. The drafts form
a tree (a chain is a tree); the legal tokens of a row depend only on the path of its node.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimode.runtime.decoding.token_rules import DeadEndError, TokenRules, Walk, are_legal, count_legal, token_bits
from trimode.runtime.executor import Candidates, Ints, Words

_ABSENT = -1e29  # lower logits mark entries after the last legal token
_OF_ONE = np.zeros(1, np.float32)  # logits of a choice of one token

_FIRST_RATE = 0.1
_LEAST_RATE = 0.03  # a pass takes many times as long as a mask
_RATE_WEIGHT = 0.1

Reals = NDArray[np.float32]


class Biases:
    """ids, values: [M], added to the logits of these tokens."""

    def __init__(self, by_token: Mapping[int, float], vocab_size: int) -> None:
        self.ids = np.array(sorted(by_token), np.int64)
        self.values = np.array([by_token[token] for token in sorted(by_token)], np.float32)
        self.others = ~token_bits(vocab_size, by_token)  # a mask


class AgainRate:
    """Running estimate, over all answers, of how many doubtful rows are run again: rows whose best candidates may well
    be illegal. If the rate is high, they get their masks in the first run. With a mask, it is not known whether the row
    would have been run again, so the rate decreases with each mask, until rows are tried without masks again.
    """

    def __init__(self) -> None:
        self._rate = _FIRST_RATE

    @property
    def pays(self) -> bool:
        """Whether doubtful rows should get their masks at once."""
        return self._rate > _LEAST_RATE

    def observe(self, masked: int, again: int, enough: int) -> None:
        """Doubtful rows of one pass: those with masks, those run again, and those with enough legal candidates."""
        self._rate *= (1 - _RATE_WEIGHT) ** (masked + enough)
        for _ in range(again):
            self._rate += _RATE_WEIGHT * (1 - self._rate)


class Choice(NamedTuple):
    """A row's legal candidates, best first, [k]."""

    logits: Reals
    tokens: Ints


class RowInputs(NamedTuple):
    """Inputs of the rows of a pass besides their tokens: masks [R, ceil(V / 32)] and asked ids [R, M]."""

    masks: Words | None = None
    asked: Ints | None = None


class RuledRows:
    """The rows of one causal pass.

    walk: along the tokens of the pass after that of its first logit row. needed: candidates that a choice needs;
    None for as many as the engine reports. logprobs: whether the rows' log-probabilities are requested; they are over
    the whole vocabulary, so the first run has no masks.
    """

    def __init__(
        self, rules: TokenRules, biases: Biases | None, walk: Walk, needed: int | None, logprobs: bool
    ) -> None:
        # Greedy rows from the first one on whose best legal candidate is a draft, each with that token.
        self._agreed: dict[int, int] = {}
        self._choices: dict[int, Choice] = {}  # of the other rows that may be emitted, once the pass is complete
        self._dead_ends: dict[int, DeadEndError] = {}  # of the rows after them
        self._rules = rules
        self._biases = biases
        self._walk = walk
        self._needed = needed
        self._logprobs = logprobs
        self._at = 0  # the node that the rules have taken last
        self._masked: set[int] = set()  # rows that have their mask in the first run
        self._reached: set[int] = set()  # rows that the text may reach, by their candidates
        self._again: dict[int, Words] = {}  # masks of the rows that must be run again
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
        rows, forced = len(self._walk.tree), self._walk.forced
        masks = None
        if masked and not self._logprobs:
            masks = np.full((rows, self._rules.words), ~np.uint32(0))
            try:
                for row in sorted(masked):
                    if row in forced and forced[row] is None:
                        with suppress(DeadEndError):
                            masks[row] = self._mask_of_unbiased(row)
                            self._masked.add(row)
            finally:
                self._move(0)
        biased = [] if self._biases is None else self._biases.ids.tolist()
        if biased or self._logprobs:
            self._asked = np.zeros((rows, len(biased) + self._logprobs), np.int64)
            self._asked[:, : len(biased)] = biased
            if self._logprobs:
                self._asked[list(forced), -1] = [token or 0 for token in forced.values()]
        return RowInputs(masks, self._asked)

    def absorb(self, found: Candidates) -> tuple[Ints, Words] | None:
        """Take the candidates of the first run. Returns the rows that must be run again, and their masks [R, words]."""
        self._reported = found
        self._choose()
        return (np.array(list(self._again)), np.stack(list(self._again.values()))) if self._again else None

    def observe(self, doubtful: Collection[int], rate: AgainRate) -> None:
        """Update the rate, after the first run, by the doubtful rows that the text may reach."""
        if not doubtful:
            return
        reached = [row for row in doubtful if row in self._reached and self._walk.forced[row] is None]
        masked = len(self._masked.intersection(reached))
        again = len(self._again.keys() & reached)
        rate.observe(masked, again, len(reached) - masked - again)

    def absorb_again(self, rows: Ints, found: Candidates) -> None:
        """Take the candidates of the rows that were run again with their masks."""
        for index, row in enumerate(rows.tolist()):
            self._second[row] = found.logits[index], found.tokens[index]
        self._choose()

    def forced_among(self, rows: list[int]) -> list[int]:
        """Those of the rows that the text reaches whose token the grammar forces."""
        forced = self._walk.forced
        return [row for row in rows if forced[row] is not None]

    @property
    def agreed(self) -> Mapping[int, int]:
        """The first rows that the text reaches whose token is known to be the draft, each with it. Of the others, see
        :meth:`choice`.
        """
        return self._agreed

    def choice(self, row: int) -> Choice:
        """Of a row that the text reaches, without an agreed draft. Raises DeadEndError if no token is legal there."""
        if row in self._dead_ends:
            raise self._dead_ends[row]
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

    def _choose(self) -> None:
        """Set the choices of the rows that may be emitted, and the masks of those that must be run again.

        A row without a legal token ends its path. It is an error only if the text reaches it. Greedy decoding reaches
        no other row after a row whose token is not drafted.
        """
        self._choices, self._dead_ends, self._again = {}, {}, {}
        self._agreed = self._agreed_rows()
        self._reached = set(self._agreed)
        try:
            for row, forced in self._walk.forced.items():
                if row in self._reached or not self._leads_to(row):
                    continue
                try:
                    choice = self._choice(row) if forced is None else self._forced(row, forced)
                    if choice is None:
                        self._again[row] = self._mask_of_unbiased(row)
                    else:
                        self._choices[row] = choice
                    self._reached.add(row)
                    ends = choice is not None and self._walk.legal_child(row, int(choice.tokens[0])) is None
                except DeadEndError as error:
                    self._dead_ends[row] = error
                    ends = True
                if ends and self._needed == 1 and not self._again:
                    break
        finally:
            self._move(0)

    def _agreed_rows(self) -> dict[int, int]:
        """The first rows of greedy decoding whose token is drafted, forced or best. Each with its token."""
        agreed: dict[int, int] = {}
        if self._needed != 1 or self._biases is not None:
            return agreed
        best = self.reported.tokens[:, 0].tolist()
        for row, (_, tokens) in self._second.items():
            best[row] = int(tokens[0])
        following: int | None = 0
        while following is not None:
            row, forced = following, self._walk.forced[following]
            token = best[row] if forced is None else forced
            following = self._walk.legal_child(row, token)
            if following is not None:
                agreed[row] = token
        return agreed

    def _leads_to(self, row: int) -> bool:
        """Whether the text may reach a row, by what is known of the rows before it."""
        if not row:
            return True
        tree = self._walk.tree
        before, token = tree.parents[row], tree.ids[row]
        if before not in self._reached:
            return False
        if before in self._agreed:
            return self._agreed[before] == token
        if self._needed == 1 and before in self._choices:
            return bool(self._choices[before].tokens[0] == token)
        return True

    def _forced(self, row: int, token: int) -> Choice:
        """The choice of a row where the grammar forces a token."""
        if self._walk.legal_child(row, token) is None:
            self._move(row)
            if not self._rules.allows(token):
                raise self._rules.dead_end()
        return Choice(_OF_ONE, np.array([token]))

    def _choice(self, row: int) -> Choice | None:
        """The row's legal candidates; None if there are too few of them and the row has not been run again."""
        reported = self.reported
        logits, tokens = self._second.get(row, (reported.logits[row], reported.tokens[row]))
        unmasked = row not in self._second and row not in self._masked
        greedy = self._needed == 1 and self._biases is None
        if unmasked and greedy and self._walk.legal_child(row, int(tokens[0])) is not None:
            return Choice(logits[:1], tokens[:1])
        self._move(row)
        if unmasked and greedy:
            # The rules remember a token that was undone, so the check saves the time of taking it later.
            if self._rules.take_if_legal(int(tokens[0])):
                self._rules.undo(1)
                return Choice(logits[:1], tokens[:1])
            best = self._rules.first_legal(tokens[_are_reported(logits)])
            return None if best is None else Choice(logits[best : best + 1], tokens[best : best + 1])
        needed = self._needed or reported.logits.shape[-1]
        asked = None if self._asked is None or reported.asked_logits is None else reported.asked_logits[row]
        if not unmasked:
            legal = _are_reported(logits)
            return self._best(logits[legal], tokens[legal], asked, needed)
        mask = self._rules.mask()
        legal = are_legal(mask, tokens) & _are_reported(logits)
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

    def _mask_of_unbiased(self, row: int) -> Words:
        """The legal tokens of a row without those with a bias, for a run of it. May be empty."""
        self._move(row)
        mask = self._rules.mask()
        return mask if self._biases is None else mask & self._biases.others

    def _move(self, row: int) -> None:
        """Move the rules to the row's node, so that it is the last token taken."""
        self._rules.move(self._walk.tree.ids, self._walk.tree.parents, self._at, row)
        self._at = row


def _are_reported(logits: Reals) -> NDArray[np.bool_]:
    """Which entries are tokens; the others come after the last legal one."""
    reported: NDArray[np.bool_] = logits > _ABSENT
    return reported
