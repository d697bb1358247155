"""Prompt lookup: drafts that need no pass, copied from an earlier occurrence of the text's end in prompt and answer.

Copied drafts are verified like all others, so they affect speed, not the tokens.

The acceptance of copies is learnt in every cycle, also if they were not verified: the emitted tokens show how many
copied ones were right. Copies after a long match are accepted more often than those after a short one, so the two are
learnt separately.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from trimode.runtime.decoding.acceptance_rates import LONGEST_BLOCK, Acceptance, SharedAcceptance
from trimode.runtime.decoding.ngram_index import NgramIndex
from trimode.runtime.request.outputs import Drafting

LONG_MATCH = 8  # tokens


class LookupAcceptance(NamedTuple):
    """Acceptance of one answer's copies after a short match, and of those after a long one."""

    short: Acceptance
    long: Acceptance


class SharedLookupAcceptance:
    """The same over all answers."""

    def __init__(self) -> None:
        self.short = SharedAcceptance(first_guess=0.5)
        self.long = SharedAcceptance(first_guess=0.8)

    def of_new_answer(self) -> LookupAcceptance:
        """The acceptance of a new answer, which starts from the averages and updates them."""
        return LookupAcceptance(Acceptance(self.short), Acceptance(self.long))


class Lookup:
    """Copied drafts of one answer.

    A source of drafts (:mod:`trimode.runtime.decoding.draft_sources`). prompt: its tokens. proposal: the tokens of the
    latest :meth:`find` that are not compared yet; may be empty.
    """

    kind: Drafting = "copy"

    def __init__(self, prompt: Sequence[int], acceptance: LookupAcceptance) -> None:
        self.proposal: list[int] = []
        self._index = NgramIndex()
        self._unread = list(prompt)
        self._acceptance = acceptance
        self._of_proposal = acceptance.short

    def note(self, token: int) -> None:
        """A token was emitted."""
        self._unread.append(token)

    def find(self, known: Sequence[int], most: int) -> None:
        """Set ``proposal``: at most ``most`` tokens that may follow the text and the ``known`` tokens after it."""
        self._index.extend(self._unread)
        self._unread.clear()
        match = self._index.continuation(known, most)
        self.proposal = [] if match is None else match.tokens
        if match is not None:
            self._of_proposal = self._acceptance.long if match.length >= LONG_MATCH else self._acceptance.short

    def propose(self, count: int) -> list[int]:
        """At most ``count`` tokens of the proposal."""
        return self.proposal[:count]

    def yields(self, longest: int = LONGEST_BLOCK) -> list[float]:
        """Expected tokens of a cycle that verifies the proposal, by block length from 1 on."""
        return self._of_proposal.yields(min(longest, len(self.proposal) + 1))

    def learn(self, accepted: int, tested: int, ended: bool) -> None:
        """Nothing to learn: :meth:`observe` compares every proposal, verified or not."""

    def observe(self, emitted: Sequence[int], ended: bool) -> None:
        """Compare the proposal with the tokens that the cycle emitted. ended: whether they end the text."""
        proposal, self.proposal = self.proposal, []
        tested = min(len(proposal), len(emitted))
        if tested:
            agreed = next((at for at in range(tested) if proposal[at] != emitted[at]), tested)
            self._of_proposal.observe(agreed, min(agreed + 1, tested), ended)
