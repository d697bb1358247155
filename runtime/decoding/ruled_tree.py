"""Draft trees under token rules: the likeliest paths that the rules allow.

A node's rules are those of its path. The search takes the nodes with the highest products of probabilities first, as
:func:`trimode.runtime.decoding.draft_tree.likeliest_nodes` does, and moves the rules along: mostly from a node to its
child, since a sure draft is a chain. Of a node's candidates, the best legal one is found at once, and the others are
checked when they are the next best. The probability of illegal ones is redistributed over the next ones. A token
that the grammar forces is the only child of its node and has probability 1.
"""

from __future__ import annotations

import math
from heapq import heappop, heappush
from itertools import count
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimode.runtime.decoding.draft_tree import NO_PARENT, DraftTree
from trimode.runtime.decoding.token_rules import TokenRules, Walk
from trimode.runtime.executor import Ints

DOUBTFUL_RANK = 8  # of a position's best legal candidate, from which on the verifier may report no legal one at all


class Drafted(NamedTuple):
    """A draft's candidates of the positions ``first``, ``first`` + 1, ... of a block, best first.

    tokens, log_probs: [D, k].
    """

    first: int
    tokens: Ints
    log_probs: NDArray[np.floating]


class RuledTree(NamedTuple):
    """walk: along the tree. doubtful: rows whose best candidates are probably illegal. forced: nodes whose tokens the
    grammar forces.
    """

    walk: Walk
    doubtful: set[int]
    forced: set[int]


class _Waiting(NamedTuple):
    """A candidate that may become a node. cost: negative logarithm of its path's product. rank: None if forced."""

    cost: float
    order: int  # of equal costs, the one added first comes first
    parent: int
    rank: int | None
    token: int


def legal_tree(rules: TokenRules, pending_token: int, drafted: Drafted, most: int, deepest: int) -> RuledTree:
    """The tree of the pending token and the likeliest legal drafts after it; ``most`` nodes, fewer if there are fewer.

    Tokens that the grammar forces may come before and after the drafted positions. deepest: most drafts of a path.
    """
    return _Search(rules, pending_token, drafted, deepest).found(most)


class _Search:
    """Lists are by node, in the order in which nodes are found."""

    def __init__(self, rules: TokenRules, pending_token: int, drafted: Drafted, deepest: int) -> None:
        self._rules = rules
        self._drafted = drafted
        self._deepest = deepest
        self._ids, self._parents, self._depths, self._costs = [pending_token], [NO_PARENT], [0], [0.0]
        self._legal_shares = [1.0]  # probability of the candidates after a node that are not known to be illegal
        self._forced: dict[int, int | None] = {}  # as of Walk
        self._doubtful: set[int] = set()
        self._waiting: list[_Waiting] = []
        self._pushed = count()
        self._at = 0  # the node that the rules have taken last

    def found(self, most: int) -> RuledTree:
        self._expand()
        while self._waiting and len(self._ids) < most:
            candidate = heappop(self._waiting)
            self._move(candidate.parent)
            if self._rules.take_if_legal(candidate.token):
                self._add(candidate)
            elif candidate.rank is None:
                self._doubtful.add(candidate.parent)
            else:
                self._pass_over(candidate.parent, candidate.rank)
        self._move(0)
        tree, places = DraftTree.depth_first(self._ids, self._parents)
        forced = dict(sorted((places[node], token) for node, token in self._forced.items()))
        return RuledTree(
            Walk(tree, forced),
            {places[node] for node in self._doubtful},
            {place for place, parent in enumerate(tree.parents) if forced.get(parent) is not None},
        )

    def _add(self, candidate: _Waiting) -> None:
        """Make a candidate a node; the rules have taken it."""
        parent, rank = candidate.parent, candidate.rank
        if rank is not None and rank + 1 < self._drafted.tokens.shape[1]:
            self._wait(parent, rank + 1)
        self._at = len(self._ids)
        self._ids.append(candidate.token)
        self._parents.append(parent)
        self._depths.append(self._depths[parent] + 1)
        self._costs.append(candidate.cost)
        self._legal_shares.append(1.0)
        self._expand()

    def _expand(self) -> None:
        """Add the first candidate after the newest node to the queue; the rules are at this node."""
        node = self._at
        if self._rules.ended:
            return
        token = self._forced[node] = self._rules.forced_token
        place = self._depths[node] + 1
        beyond = place - self._drafted.first - len(self._drafted.tokens)
        if place <= self._deepest and token is not None:
            self._push(self._costs[node], node, None, token)
        elif place <= self._deepest and beyond < 0:
            # The rules remember a token that was undone, so the check saves the time of taking it later.
            if self._rules.take_if_legal(int(self._drafted.tokens[self._place(node), 0])):
                self._rules.undo(1)
                self._wait(node, 0)
            else:
                self._pass_over(node, 0)
        elif beyond > 0:
            self._doubtful.add(node)  # after forced tokens that the draft pass did not have

    def _pass_over(self, node: int, rank: int) -> None:
        """Add the next legal candidate after a node to the queue, not an illegal one; the rules are at the node."""
        place = self._place(node)
        skipped = self._rules.first_legal(self._drafted.tokens[place, rank + 1 :])
        next_rank = None if skipped is None else rank + 1 + skipped
        if (next_rank is None or next_rank >= DOUBTFUL_RANK) and node not in self._parents:
            self._doubtful.add(node)
        if next_rank is not None:
            self._legal_shares[node] -= float(np.exp(self._drafted.log_probs[place, rank:next_rank]).sum())
            self._wait(node, next_rank)

    def _wait(self, node: int, rank: int) -> None:
        place = self._place(node)
        # Candidates after illegal ones have at most the remaining probability, up to rounding.
        share = max(self._legal_shares[node], 1e-9)
        cost = max(0.0, math.log(share) - float(self._drafted.log_probs[place, rank]))
        self._push(self._costs[node] + cost, node, rank, int(self._drafted.tokens[place, rank]))

    def _place(self, node: int) -> int:
        """The row of the drafts that has the candidates after a node."""
        return self._depths[node] + 1 - self._drafted.first

    def _push(self, cost: float, node: int, rank: int | None, token: int) -> None:
        heappush(self._waiting, _Waiting(cost, next(self._pushed), node, rank, token))

    def _move(self, node: int) -> None:
        self._rules.move(self._ids, self._parents, self._at, node)
        self._at = node
