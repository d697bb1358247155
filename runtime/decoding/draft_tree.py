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
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from trimode.runtime.executor import Ints


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
    def best_first(cls, pending_token: int, tokens: Ints, log_probs: NDArray[np.floating], nodes: int) -> DraftTree:
        """The tree of at most ``nodes`` nodes, node 0 included, whose nodes have the highest products.

        tokens, log_probs: [D, k] of the D places behind the pending token, each best first.
        """
        places, ranks = tokens.shape
        best = log_probs.tolist()
        # Nodes by falling product: parent, depth (0 for the place behind node 0) and rank in its place.
        found: list[tuple[int, int, int]] = []
        # The product of each node bounds those of its first child and of its next sibling, which follow it here.
        waiting = [(-best[0][0], 0, -1, 0, 0)] if places else []
        pushed = 1
        while waiting and len(found) < nodes - 1:
            cost, _, parent, depth, rank = heapq.heappop(waiting)
            found.append((parent, depth, rank))
            if rank + 1 < ranks:
                sibling = cost + best[depth][rank] - best[depth][rank + 1]
                heapq.heappush(waiting, (sibling, pushed, parent, depth, rank + 1))
            if depth + 1 < places:
                child = cost - best[depth + 1][0]
                heapq.heappush(waiting, (child, pushed + 1, len(found) - 1, depth + 1, 0))
            pushed += 2
        children: list[list[int]] = [[] for _ in range(len(found) + 1)]  # of each found node; of node 0 at the end
        for index, (parent, _, _) in enumerate(found):
            children[parent].append(index)
        ids, parents = [pending_token], [-1]
        unplaced = [(index, 0) for index in reversed(children[-1])]
        while unplaced:
            index, parent = unplaced.pop()
            _, depth, rank = found[index]
            unplaced += [(child, len(ids)) for child in reversed(children[index])]
            ids.append(int(tokens[depth, rank]))
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
