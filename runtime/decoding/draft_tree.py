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
    if not places or most < 1:
        return []
    costs: list[list[float]] = (-log_probs).tolist()
    found: list[Node] = []
    # The product of a node bounds those of its first child and of its next sibling, which are pushed when it is found.
    # Of equal products, the one that was pushed first comes first.
    waiting = [(costs[0][0], 0, -1, 0, 0)]
    pushed = 1
    while waiting:
        cost, _, parent, place, rank = waiting[0]
        index = len(found)
        found.append(Node(parent, place, rank, -cost))
        if index + 1 == most:
            break
        row = costs[place]
        if rank + 1 < ranks:
            heapq.heapreplace(waiting, (cost + row[rank + 1] - row[rank], pushed, parent, place, rank + 1))
        else:
            heapq.heappop(waiting)
        if place + 1 < places:
            heapq.heappush(waiting, (cost + costs[place + 1][0], pushed + 1, index, place + 1, 0))
        pushed += 2
    return found


class DraftTree:
    """Nodes in depth-first order, the likelier child first: node 0 is the pending token, and the likeliest path is a
    prefix of the nodes. ids: the nodes' tokens. parents: of each node, -1 for node 0; every parent comes before its
    children.
    """

    def __init__(self, ids: list[int], parents: list[int]) -> None:
        self.ids = ids
        self.parents = parents

    def __len__(self) -> int:
        return len(self.parents)

    @classmethod
    def chain(cls, ids: list[int]) -> DraftTree:
        return cls(ids, list(range(-1, len(ids) - 1)))

    @classmethod
    def of(cls, pending_token: int, tokens: Ints, nodes: Sequence[Node]) -> DraftTree:
        """The tree of the pending token and these nodes, in the order of :func:`likeliest_nodes`. tokens: [D, k]."""
        by_place = tokens.tolist()
        ids = [pending_token, *(by_place[place][rank] for _, place, rank, _ in nodes)]
        return cls.depth_first(ids, [-1, *(parent + 1 for parent, _, _, _ in nodes)])[0]

    @classmethod
    def depth_first(cls, ids: list[int], parents: list[int]) -> tuple[DraftTree, list[int]]:
        """The tree of nodes that come behind their parents, the likelier child first, and their indices in its order.

        ids, parents: as of the tree, but for the order.
        """
        children: list[list[int]] = [[] for _ in ids]
        for index in range(1, len(ids)):
            children[parents[index]].append(index)
        order: list[int] = []
        places, placed_parents = [0] * len(ids), list[int]()
        unplaced = [0]
        while unplaced:
            index = unplaced.pop()
            places[index] = len(order)
            placed_parents.append(places[parents[index]] if index else -1)
            order.append(index)
            below = children[index]
            if len(below) == 1:
                unplaced.append(below[0])
            elif below:
                unplaced += reversed(below)
        return cls([ids[index] for index in order], placed_parents), order

    @cached_property
    def tokens(self) -> Ints:
        """[N]."""
        return np.array(self.ids)

    @cached_property
    def _children(self) -> dict[tuple[int, int], int]:
        return dict(zip(zip(self.parents, self.ids, strict=True), range(len(self)), strict=True))

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """[N, N]: which nodes each node sees, itself and its ancestors."""
        size = -(-len(self) // 8)
        seen: list[int] = []  # bit j of an element: whether the node sees node j
        for node, parent in enumerate(self.parents):
            seen.append(1 << node | (seen[parent] if parent >= 0 else 0))
        packed = np.frombuffer(b"".join([bits.to_bytes(size, "little") for bits in seen]), np.uint8)
        bits = np.unpackbits(packed.reshape(-1, size), axis=1, count=len(self), bitorder="little")
        return bits.view(np.bool_)

    @cached_property
    def depths(self) -> list[int]:
        """Ancestors of each node. Node 0 has the pending token's position, its children the next one, ..."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        return depths

    def child(self, node: int, token: int) -> int | None:
        """The child of ``node`` that has this token; None if none has."""
        return self._children.get((node, token))

    def has_children(self, node: int) -> bool:
        return node + 1 < len(self) and self.parents[node + 1] == node

    def likeliest_path(self, node: int) -> list[int]:
        """The tokens of the likeliest path below ``node``."""
        last = node
        while self.has_children(last):
            last += 1
        return self.ids[node + 1 : last + 1]
