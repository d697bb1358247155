"""Draft trees: several continuations of one text, verified in one causal pass.

A draft pass gives each position of the block its own distribution, independent of the other positions. The probability
of a path is estimated by the product of its tokens' probabilities, and the nodes with the highest products form the
tree (DDTree, arXiv 2604.12989). A chain is a tree in which every node has one child.

Verification samples a token at the root and follows the child that has this token, and so on; the first sampled token
that no child has ends the path. Each token is sampled from the logits of a node that attends only to itself and its
ancestors, so the tokens are AR's for any tree. For a given set of candidates, such as the k best tokens of a position,
no other acceptance rule accepts more tokens: at each node, the path continues with the total probability of the
children.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush, heapreplace

import numpy as np
from numpy.typing import NDArray

NO_PARENT = -1  # the parent of a tree's node 0

# cost: negative logarithm of the product of its path's probabilities. order: of equal costs, the lower one comes first.
# parent: index among the nodes, -1 for the pending token. place: position after the pending token, from 0. rank:
# of its token among the candidates.
Node = tuple[float, int, int, int, int]


def likeliest_nodes(log_probs: NDArray[np.floating], most: int) -> list[Node]:
    """The ``most`` nodes with the highest products, by decreasing product; each comes after its parent.

    log_probs: [D, k] of the D positions after the pending token, decreasing in each row.
    """
    places, ranks = log_probs.shape
    if not places or most < 1:
        return []
    costs: list[list[float]] = (-log_probs).tolist()
    found: list[Node] = []
    # The product of a node bounds those of its first child and of its next sibling, which are pushed when it is found.
    # Of equal products, the one that was pushed first comes first.
    waiting = [(costs[0][0], 0, -1, 0, 0)]
    for index in range(most):
        if not waiting:
            break
        node = waiting[0]
        found.append(node)
        cost, _, parent, place, rank = node
        row = costs[place]
        if rank + 1 < ranks:
            heapreplace(waiting, (cost + row[rank + 1] - row[rank], 2 * index + 1, parent, place, rank + 1))
        else:
            heappop(waiting)
        if place + 1 < places:
            heappush(waiting, (cost + costs[place + 1][0], 2 * index + 2, index, place + 1, 0))
    return found


class DraftTree:
    """Nodes in depth-first order, the likelier child first: node 0 is the pending token, and the likeliest path is a
    prefix of the nodes.

    Of each node, ids: its token. parents: NO_PARENT for node 0; every parent comes before its children. depths: its
    number of ancestors; node 0 has the pending token's position, its children the next one, ... ends: the node after
    its last descendant.
    """

    def __init__(self, ids: list[int], parents: list[int], depths: list[int], ends: list[int]) -> None:
        self.ids = ids
        self.parents = parents
        self.depths = depths
        self.ends = ends

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def chain(cls, ids: list[int]) -> DraftTree:
        nodes = len(ids)
        return cls(ids, list(range(-1, nodes - 1)), list(range(nodes)), [nodes] * nodes)

    @classmethod
    def of(cls, pending_token: int, tokens: Sequence[Sequence[int]], nodes: Sequence[Node]) -> DraftTree:
        """The tree of the pending token and these nodes, in the order of :func:`likeliest_nodes`. tokens: [D, k]."""
        ids = [pending_token, *[tokens[place][rank] for _, _, _, place, rank in nodes]]
        return cls.depth_first(ids, [NO_PARENT, *[node[2] + 1 for node in nodes]])[0]

    @classmethod
    def depth_first(cls, ids: list[int], parents: list[int]) -> tuple[DraftTree, list[int]]:
        """The tree of nodes that come after their parents, the likelier child first, and the index of each in it.

        ids, parents: as of the tree, but for the order.
        """
        nodes = len(ids)
        sizes = [1] * nodes  # of each node and its descendants
        for index in range(nodes - 1, 0, -1):
            sizes[parents[index]] += sizes[index]
        places, free = [0], [1]  # free: the index of the next child of each node
        new_ids, new_parents, depths, ends = ids[:1] * nodes, [NO_PARENT] * nodes, [0] * nodes, [nodes] * nodes
        for index in range(1, nodes):
            parent = parents[index]
            place, above = free[parent], places[parent]
            ends[place] = free[parent] = place + sizes[index]
            places.append(place)
            free.append(place + 1)
            new_ids[place] = ids[index]
            new_parents[place] = above
            depths[place] = depths[above] + 1
        return cls(new_ids, new_parents, depths, ends), places

    def child(self, node: int, token: int) -> int | None:
        """The child of ``node`` that has this token; None if none has."""
        child, end = node + 1, self.ends[node]
        while child < end:
            if self.ids[child] == token:
                return child
            child = self.ends[child]
        return None

    def likeliest_path(self, node: int) -> list[int]:
        """The tokens of the likeliest path below ``node``."""
        last = node
        while self.ends[last] > last + 1:
            last += 1
        return self.ids[node + 1 : last + 1]
