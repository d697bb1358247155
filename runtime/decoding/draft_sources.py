"""The sources of a block's drafts, under one protocol: a draft pass, kept candidates, prompt lookup, or none.

Drafts of all sources are verified alike. Tokens that are known, such as those that a grammar forces, come before the
drafts of the source. A tree is not a source: it is a wider choice among the candidates of a draft pass.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from trimode.runtime.decoding.acceptance_rates import LONGEST_BLOCK, Acceptance
from trimode.runtime.executor import Ints
from trimode.runtime.request.outputs import Drafting

_NONE = np.empty((0, 1), np.int64)
LEAST_KEPT = 0.1  # least probability that a kept draft and all before it are accepted


class DraftSource(Protocol):
    """kind: as cycles report it."""

    @property
    def kind(self) -> Drafting: ...

    def propose(self, count: int) -> list[int]:
        """At most ``count`` tokens that follow the known tokens of the block."""
        ...

    def yields(self, longest: int = LONGEST_BLOCK) -> list[float]:
        """Expected tokens of a cycle without its known tokens, by length of its block up to ``longest``."""
        ...

    def learn(self, accepted: int, tested: int, ended: bool) -> None:
        """A commit verified the proposed tokens; as :meth:`Acceptance.observe`."""
        ...


class MaskedDrafts:
    """Masked positions, which a draft pass fills."""

    kind: Drafting = "draft"

    def __init__(self, mask_id: int, acceptance: Acceptance) -> None:
        self._mask_id = mask_id
        self._acceptance = acceptance

    def propose(self, count: int) -> list[int]:
        return [self._mask_id] * count

    def yields(self, longest: int = LONGEST_BLOCK) -> list[float]:
        return self._acceptance.yields(longest)

    def learn(self, accepted: int, tested: int, ended: bool) -> None:
        self._acceptance.observe(accepted, tested, ended)


class KeptDrafts:
    """Candidates of the positions after the draft that the last commit rejected, best first.

    With rules, a rejected draft is often one wrong value in the right structure, so that the tokens after it are often
    right. candidates: those of the next block, [n, k] of the positions after its known tokens; n is 0 if it has none.
    """

    kind: Drafting = "kept"

    def __init__(self, acceptance: Acceptance) -> None:
        self.candidates: Ints = _NONE
        self._kept: Ints = _NONE
        self._acceptance = acceptance

    def keep(self, candidates: Ints) -> None:
        """Replace all candidates by those of the last commit: [n, k] of the positions from 1 on."""
        self._kept = candidates

    def select(self, known: int, room: int) -> None:
        """Set ``candidates``: those after ``known`` known tokens in a block of at most ``room`` tokens, as far as they
        are likely to be accepted.
        """
        likely, count = 1.0, 0
        most = min(len(self._kept), room - 1) - known
        for rate in self._acceptance.rates[:most] if most > 0 else ():
            likely *= rate
            if likely < LEAST_KEPT:
                break
            count += 1
        self.candidates = self._kept[known : known + count]

    def propose(self, count: int) -> list[int]:
        drafts: list[int] = self.candidates[:count, 0].tolist()
        return drafts

    def yields(self, longest: int = LONGEST_BLOCK) -> list[float]:
        return self._acceptance.yields(longest)

    def learn(self, accepted: int, tested: int, ended: bool) -> None:
        self._acceptance.observe(accepted, tested, ended)

    def forget(self) -> None:
        """Decay: the candidates were not used."""
        self._acceptance.forget()


class NoDrafts:
    """The known tokens alone."""

    def __init__(self, kind: Drafting) -> None:
        self.kind = kind

    def propose(self, _count: int) -> list[int]:
        return []

    def yields(self, _longest: int = LONGEST_BLOCK) -> list[float]:
        return [1.0]

    def learn(self, accepted: int, tested: int, ended: bool) -> None:
        """Known tokens say nothing about drafts."""


NO_DRAFTS, FORCED_ONLY = NoDrafts("none"), NoDrafts("forced")


def expected_tokens(source: DraftSource, count: int) -> float:
    """Tokens that a cycle is expected to generate, without its known tokens. count: of proposed tokens."""
    return source.yields(1 + count)[-1]
