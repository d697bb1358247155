"""Draft trees: several continuations of one text, verified in one causal pass.

A draft pass gives each place of the block its own distribution, whatever the other places hold. The probability of a
path is estimated by the product of its tokens' probabilities, and the nodes with the highest products form the tree
(DDTree, arXiv 2604.12989). A chain is a tree in which every node has one child.

Verification draws a token at the root and goes to the child that has this token, and so on; the first drawn token that
no child has ends the path. Each token is drawn from a causal row that sees its ancestors only, so the tokens are AR's,
whatever the tree. For candidates that are given, such as the k best tokens of a place, no other acceptance rule accepts
more often: a node goes on with the whole probability of its children.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimode.runtime.executor import Ints


class Node(NamedTuple):
    """parent: its index among the nodes, -1 for the pending token. place, rank: of its token. log_product: logarithm of
    the product of its path's probabilities.
    """

    parent: int
    place: int
    rank: int
    log_product: float


def likeliest_nodes(log_probs: NDArray[np.floating], most: int) -> list[Node]:
    """The ``most`` nodes with the highest products, by falling product; each comes behind its parent.

    log_probs: [D, k] of the D places behind the pending token, falling in each row.
    """
    places, ranks = log_probs.shape
    best = log_probs.tolist()
    found: list[Node] = []
    # The product of a node bounds those of its first child and of its next sibling, which are pushed when it is found.
    waiting = [(-best[0][0], 0, -1, 0, 0)] if places else []
    pushed = 1
    while waiting and len(found) < most:
        cost, _, parent, place, rank = heapq.heappop(waiting)
        found.append(Node(parent, place, rank, -cost))
        if rank + 1 < ranks:
            sibling = cost + best[place][rank] - best[place][rank + 1]
            heapq.heappush(waiting, (sibling, pushed, parent, place, rank + 1))
        if place + 1 < places:
            heapq.heappush(waiting, (cost - best[place + 1][0], pushed + 1, len(found) - 1, place + 1, 0))
        pushed += 2
    return found


class DraftTree:
    """Nodes in depth-first order, the likelier child first: node 0 is the pending token, and the likeliest path is a
    prefix of the nodes. tokens: [N]. parents: [N], -1 for node 0; every parent comes before its children.
    """

    def __init__(self, tokens: Ints, parents: Ints) -> None:
        self.tokens = tokens
        self.parents = parents
        self._children = {
            (parent, token): node
            for node, (parent, token) in enumerate(zip(parents.tolist(), tokens.tolist(), strict=True))
        }

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of(cls, pending_token: int, tokens: Ints, nodes: Sequence[Node]) -> DraftTree:
        """The tree of the pending token and these nodes, in the order of :func:`likeliest_nodes`. tokens: [D, k]."""
        children: list[list[int]] = [[] for _ in range(len(nodes) + 1)]  # of each node; of the pending token at the end
        for index, node in enumerate(nodes):
            children[node.parent].append(index)
        ids, parents = [pending_token], [-1]
        unplaced = [(index, 0) for index in reversed(children[-1])]
        while unplaced:
            index, parent = unplaced.pop()
            unplaced += [(child, len(ids)) for child in reversed(children[index])]
            ids.append(int(tokens[nodes[index].place, nodes[index].rank]))
            parents.append(parent)
        return cls(np.array(ids), np.array(parents))

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """[N, N]: which nodes each node sees, itself and its ancestors."""
        mask = np.eye(len(self), dtype=np.bool_)
        for node, parent in enumerate(self.parents.tolist()):
            if parent >= 0:
                mask[node] |= mask[parent]
        return mask

    @cached_property
    def depths(self) -> Ints:
        """[N]: ancestors of each node. Node 0 has the pending token's position, its children the next one, ..."""
        depths: Ints = self.mask.sum(axis=1) - 1
        return depths

    @property
    def is_chain(self) -> bool:
        return bool((self.parents == np.arange(-1, len(self) - 1)).all())

    def child(self, node: int, token: int) -> int | None:
        """The child of ``node`` that has this token; None if none has."""
        return self._children.get((node, token))

    def has_children(self, node: int) -> bool:
        return node + 1 < len(self) and int(self.parents[node + 1]) == node

    def likeliest_path(self, node: int) -> list[int]:
        """The tokens of the likeliest path below ``node``."""
        path: list[int] = []
        while self.has_children(node):
            node += 1
            path.append(int(self.tokens[node]))
        return path
