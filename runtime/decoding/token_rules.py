"""Which tokens may come next in one answer: its grammar, and the tokens and words that the request allows or bans.

A grammar begins after the thought. In a thought, every token is legal except the end tokens, because the answer
has not begun.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Many
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimode.model.step import mask_words
from trimode.runtime.decoding.bad_words import BadWords
from trimode.runtime.decoding.draft_tree import DraftTree
from trimode.runtime.executor import Ints, Words
from trimode.runtime.grammar.matcher import GrammarMatcher
from trimode.runtime.request.errors import GrammarError

# Candidates of a row among which a legal one is usually found. They are checked one by one; for more, the mask is
# computed.
LIKELY_RANKS = 16


class DeadEndError(GrammarError):
    """No token is legal at some position of an answer."""


class Walk(NamedTuple):
    """Drafts of an answer, and which tokens the grammar forces in the rows of a pass that verifies them.

    tree: the newest token taken, and the drafts after it. Row i of the pass predicts the token after node i.
    forced: for each row that the text may reach, the token that the grammar forces there, None if it forces none. The
    text reaches no row after an illegal draft or after an end token.
    """

    tree: DraftTree
    forced: dict[int, int | None]

    def legal_child(self, row: int, token: int) -> int | None:
        """The row that follows if the token is drafted, legal, and does not end the text; otherwise None."""
        child = self.tree.child(row, token)
        return child if child in self.forced else None


class TokenRules:
    """The rules of one answer. Tokens are taken as they are emitted; drafts are taken and undone.

    vocab_size: of the model. ends: tokens that end the text. grammar: None for free text. thought_end: the token after
    which the grammar begins; None if it begins at once. allowed: the only legal tokens, None for all. banned: tokens
    that are never legal. min_tokens: tokens before which no token of ``ends`` is legal, unless the grammar is complete
    before. bad_words: None if there are none.
    """

    def __init__(
        self,
        vocab_size: int,
        ends: Collection[int],
        *,
        grammar: GrammarMatcher | None = None,
        thought_end: int | None = None,
        allowed: Collection[int] | None = None,
        banned: Collection[int] = (),
        min_tokens: int = 0,
        bad_words: BadWords | None = None,
    ) -> None:
        self._vocab_size = vocab_size
        self._grammar = grammar
        self._thought_end = thought_end
        self._min_tokens = min_tokens
        self._bad_words = bad_words
        self._taken: list[int] = []
        self._grammar_from: int | None = 0 if thought_end is None else None  # in taken tokens; None in the thought
        self._matcher = grammar if thought_end is None else None  # the grammar's, where it has begun
        always = _all_bits(vocab_size) if allowed is None else token_bits(vocab_size, allowed)
        always &= ~token_bits(vocab_size, banned)
        self._always = _Static.of(always)
        self._always_without_ends = _Static.of(always & ~token_bits(vocab_size, ends))
        self._changes = min_tokens > 0 or thought_end is not None  # whether the static mask depends on the tokens taken
        # Whether only the grammar decides. Tokens that the model does not have are never legal in a grammar.
        self._only_grammar = self._matcher is not None and not self._changes and bad_words is None and allowed is None
        self._only_grammar = self._only_grammar and not banned

    @property
    def complete(self) -> bool:
        """Whether the grammar is complete, so that only an end token may come next."""
        return self._matcher is not None and self._matcher.complete

    @property
    def forced_token(self) -> int | None:
        """The next token where the grammar forces it, so that no other one is legal; None elsewhere."""
        return None if self._matcher is None else self._matcher.forced_token

    @property
    def words(self) -> int:
        """Words of a mask."""
        return len(self._always.words)

    def dead_end(self) -> DeadEndError:
        return DeadEndError(
            f"no token is legal after {len(self._taken)} tokens of the answer: its grammar, allowed and banned tokens, "
            "bad words and min_tokens contradict each other there"
        )

    def allows(self, token: int) -> bool:
        if not self._only_grammar and not self._allows_beside_grammar(token):
            return False
        return self._matcher is None or self._matcher.allows(token)

    def mask(self) -> Words:
        """The legal tokens, [ceil(V / 32)], as :mod:`trimode.model.step` defines ``token_mask``. Read only.

        Raises DeadEndError if there is none.
        """
        words = self._static().words
        if self._matcher is not None:
            words = self._matcher.mask() if self._only_grammar else words & self._matcher.mask()
        if self._bad_words is not None:
            words = words & ~token_bits(self._vocab_size, self._bad_words.completing(self._taken))
        if not words.any():
            raise self.dead_end()
        return words

    def first_legal(self, tokens: Ints) -> int | None:
        """The index of the first legal one of some tokens; None if there is none."""
        checked = tokens[:LIKELY_RANKS].tolist()
        if self._only_grammar and self._grammar is not None:
            found = self._grammar.first_legal(checked)
        else:
            found = next((index for index, token in enumerate(checked) if self.allows(token)), None)
        if found is not None:
            return found
        if len(tokens) <= LIKELY_RANKS:
            return None
        try:
            legal = are_legal(self.mask(), tokens)
        except DeadEndError:
            return None
        return int(legal.argmax()) if legal.any() else None

    def take_first_legal(self, tokens: Ints) -> int | None:
        """Take the first legal one of some tokens; returns its index, None if there is none."""
        found = self.first_legal(tokens)
        if found is not None:
            self.take(int(tokens[found]))
        return found

    def take(self, token: int) -> None:
        """Take a token that was emitted or drafted. Raises ValueError if the grammar does not allow it."""
        if not self._take(token):
            raise ValueError(f"token {token} is not legal here")

    def take_emitted(self, tokens: list[int]) -> None:
        """Take tokens that were emitted. Raises ValueError if the grammar does not allow them."""
        if self._only_grammar:
            if self.take_all(tokens) < len(tokens):
                raise ValueError(f"tokens {tokens} are not legal here")
        else:
            for token in tokens:
                self.take(token)

    def take_if_legal(self, token: int) -> bool:
        """Take a token if it is legal; returns whether it was."""
        return (self._only_grammar or self._allows_beside_grammar(token)) and self._take(token)

    def take_all(self, tokens: list[int]) -> int:
        """Take these tokens up to the first illegal one; returns how many were taken."""
        if self._only_grammar and self._grammar is not None:
            taken = self._grammar.take_all(tokens)
            self._taken += tokens[:taken]
            return taken
        for taken, token in enumerate(tokens):
            if not self.take_if_legal(token):
                return taken
        return len(tokens)

    def take_free(self, tokens: list[int]) -> int:
        """Take these tokens up to the first illegal one, to a place where the grammar forces the token, or to the end;
        returns how many were taken.
        """
        if self._only_grammar and self._grammar is not None:
            taken = self._grammar.take_free(tokens)
            self._taken += tokens[:taken]
            return taken
        for taken, token in enumerate(tokens):
            if self.forced_token is not None or self.ended or not self.take_if_legal(token):
                return taken
        return len(tokens)

    def take_forced(self, most: int) -> list[int]:
        """Take the next tokens that have no alternative, at most ``most``; the end token too. Returns them."""
        if self._only_grammar and self._grammar is not None:
            run = self._grammar.take_forced(most)
            self._taken += run
            return run
        run = []
        while len(run) < most and (token := self.forced_token) is not None and self.take_if_legal(token):
            run.append(token)
        return run

    def undo(self, count: int) -> None:
        """Undo the latest tokens taken."""
        if not count:
            return
        kept = len(self._taken) - count
        if self._grammar is not None and self._grammar_from is not None:
            self._grammar.undo(len(self._taken) - max(kept, self._grammar_from))
            if self._thought_end is not None and kept < self._grammar_from:
                self._grammar_from = self._matcher = None
        del self._taken[kept:]

    def forced_run(self, most: int) -> list[int]:
        """The next tokens that have no alternative, at most ``most``; the end token too."""
        run = self.take_forced(most)
        self.undo(len(run))
        return run

    def walk(self, ids: list[int]) -> Walk:
        """Along the newest token taken and a chain of drafts after it."""
        forced = {0: self.forced_token}
        taken = 0
        for token in ids[1:]:
            if not self.take_if_legal(token):
                break
            taken += 1
            if self.ended:
                break
            forced[taken] = self.forced_token
        self.undo(taken)
        return Walk(DraftTree.chain(ids), forced)

    def move(self, ids: Many[int], parents: Many[int], at: int, to: int) -> None:
        """Move from one node of a tree of drafts to another. ids, parents: as of :class:`DraftTree`."""
        ahead: list[int] = []
        undone = 0
        while at != to:  # the common ancestor comes before both
            if to > at:
                ahead.append(ids[to])
                to = parents[to]
            else:
                undone += 1
                at = parents[at]
        self.undo(undone)
        ahead.reverse()
        if self.take_all(ahead) < len(ahead):
            raise ValueError("a node of the tree is not legal")

    @property
    def ended(self) -> bool:
        """Whether an end token of the grammar was taken, after which nothing is legal."""
        return self._matcher is not None and self._matcher.ended

    def _take(self, token: int) -> bool:
        if self._matcher is not None:
            if not self._matcher.take(token):
                return False
            self._taken.append(token)
        else:
            self._taken.append(token)
            if token == self._thought_end and self._grammar_from is None:
                self._grammar_from, self._matcher = len(self._taken), self._grammar
        return True

    def _allows_beside_grammar(self, token: int) -> bool:
        if not self._static().bits[token >> 3] >> (token & 7) & 1:
            return False
        return self._bad_words is None or not self._bad_words.completed_by(self._taken, token)

    def _static(self) -> _Static:
        """The tokens that neither the grammar nor the bad words decide."""
        if not self._changes:
            return self._always
        too_short = len(self._taken) < self._min_tokens and not self.complete
        thinking = self._grammar is not None and self._grammar_from is None
        return self._always_without_ends if too_short or thinking else self._always


class _Static(NamedTuple):
    """A mask: [ceil(V / 32)] uint32, and the same as bytes, of which a single bit is read faster."""

    words: Words
    bits: bytes

    @classmethod
    def of(cls, words: Words) -> _Static:
        words.setflags(write=False)
        return cls(words, words.astype("<u4").tobytes())


def token_bits(vocab_size: int, tokens: Collection[int]) -> Words:
    """A mask of these tokens: [ceil(V / 32)] uint32. Tokens that the model does not have are left out."""
    bits = np.zeros(32 * mask_words(vocab_size), np.bool_)
    bits[[token for token in tokens if token < vocab_size]] = True
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def _all_bits(vocab_size: int) -> Words:
    """A mask of all tokens of the model."""
    bits = ~np.zeros(mask_words(vocab_size), np.uint32)
    bits[-1] >>= -vocab_size % 32
    return bits


def are_legal(mask: Words, tokens: Ints) -> NDArray[np.bool_]:
    """Which of these tokens the mask has, as an array of their shape."""
    legal: NDArray[np.bool_] = (mask[tokens >> 5] >> (tokens & 31).astype(np.uint32) & 1).astype(np.bool_)
    return legal


def count_legal(mask: Words) -> int:
    return int(np.unpackbits(mask.view(np.uint8)).sum())
