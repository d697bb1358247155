"""Draft trees: the best nodes by product, in an order in which every path is a chain of ancestors."""

from __future__ import annotations

from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from trimode.runtime.decoding.draft_tree import DraftTree, likeliest_nodes

PENDING = 99


@st.composite
def places(draw: st.DrawFn) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Tokens and log-probabilities of up to 4 places with up to 3 candidates each, best first."""
    depth, ranks = draw(st.integers(0, 4)), draw(st.integers(1, 3))
    falls = draw(st.lists(st.floats(0, 5), min_size=depth * ranks, max_size=depth * ranks))
    log_probs = -np.array(falls, np.float64).reshape(depth, ranks).cumsum(axis=1)
    return 10 * np.arange(1, depth + 1)[:, None] + np.arange(ranks), log_probs


def grown(tokens: NDArray[np.int64], log_probs: NDArray[np.float64], nodes: int) -> DraftTree:
    """A tree of at most ``nodes`` nodes, the pending token included."""
    return DraftTree.of(PENDING, tokens.tolist(), likeliest_nodes(log_probs, nodes - 1))


def path(tree: DraftTree, node: int) -> tuple[int, ...]:
    """The tokens from the root to a node, without the root's."""
    found: tuple[int, ...] = ()
    while node:
        found = (tree.ids[node], *found)
        node = tree.parents[node]
    return found


def products(tokens: NDArray[np.int64], log_probs: NDArray[np.float64]) -> dict[tuple[int, ...], float]:
    """The logarithm of every path's product."""
    depth, ranks = tokens.shape
    return {
        tuple(int(tokens[place, rank]) for place, rank in enumerate(chosen)): sum(
            float(log_probs[place, rank]) for place, rank in enumerate(chosen)
        )
        for length in range(1, depth + 1)
        for chosen in product(range(ranks), repeat=length)
    }


@given(places(), st.integers(1, 40))
def test_it_has_the_paths_with_the_highest_products(
    given_places: tuple[NDArray[np.int64], NDArray[np.float64]], nodes: int
) -> None:
    tree = grown(*given_places, nodes)
    every = products(*given_places)
    found = [every[path(tree, node)] for node in range(1, len(tree))]
    assert len(tree) == min(nodes, 1 + len(every))
    assert len({path(tree, node) for node in range(len(tree))}) == len(tree)
    np.testing.assert_allclose(sorted(found, reverse=True), sorted(every.values(), reverse=True)[: len(found)])


@given(places(), st.integers(1, 40))
def test_fewer_nodes_are_the_first_ones(
    given_places: tuple[NDArray[np.int64], NDArray[np.float64]], nodes: int
) -> None:
    """So one search serves trees of every width. Each node knows its product."""
    tokens, log_probs = given_places
    every = products(tokens, log_probs)
    nodes_found = likeliest_nodes(log_probs, 40)
    assert likeliest_nodes(log_probs, nodes) == nodes_found[:nodes]
    for index, (cost, *_) in enumerate(nodes_found):
        chosen = []
        while index >= 0:
            _, _, index, place, rank = nodes_found[index]
            chosen.append(int(tokens[place, rank]))
        np.testing.assert_allclose(-cost, every[tuple(chosen[::-1])], atol=1e-12)


@given(places(), st.integers(1, 40))
def test_nodes_are_in_depth_first_order_the_likelier_child_first(
    given_places: tuple[NDArray[np.int64], NDArray[np.float64]], nodes: int
) -> None:
    """So the likeliest path lies at the beginning, and its KV rows need no move."""
    tree = grown(*given_places, nodes)
    paths = [path(tree, node) for node in range(len(tree))]
    assert paths == sorted(paths)  # tokens ascend with the rank, and a prefix sorts before its continuations
    assert tree.ids[0] == PENDING
    assert all(parent < node for node, parent in enumerate(tree.parents))
    assert tree.likeliest_path(0) == list(paths[len(tree.likeliest_path(0))])


@given(places(), st.integers(1, 40))
def test_a_nodes_descendants_lie_between_it_and_its_end(
    given_places: tuple[NDArray[np.int64], NDArray[np.float64]], nodes: int
) -> None:
    tree = grown(*given_places, nodes)
    paths = [path(tree, node) for node in range(len(tree))]
    for node, own in enumerate(paths):
        below = [other for other, longer in enumerate(paths) if other != node and longer[: len(own)] == own]
        assert below == list(range(node + 1, tree.ends[node]))
        assert tree.depths[node] == len(own)


@given(places(), st.integers(1, 40))
def test_children_are_found_by_their_token(
    given_places: tuple[NDArray[np.int64], NDArray[np.float64]], nodes: int
) -> None:
    tree = grown(*given_places, nodes)
    for node in range(1, len(tree)):
        parent = tree.parents[node]
        assert tree.child(parent, tree.ids[node]) == node
        assert tree.child(node, tree.ids[node]) is None
    assert tree.child(0, PENDING) is None


def test_of_equal_products_the_node_that_was_found_first_comes_first() -> None:
    """So a tree does not depend on the order in which a heap holds equal costs."""
    found = likeliest_nodes(np.zeros((3, 2)), 12)
    assert [node[2:] for node in found] == [
        (-1, 0, 0), (-1, 0, 1), (0, 1, 0), (1, 1, 0), (0, 1, 1), (2, 2, 0),
        (1, 1, 1), (3, 2, 0), (4, 2, 0), (2, 2, 1), (6, 2, 0), (3, 2, 1),
    ]  # fmt: skip


def test_a_sure_draft_is_a_chain_and_an_unsure_one_is_wide() -> None:
    tokens = 10 * np.arange(1, 6)[:, None] + np.arange(4)
    sure, unsure = np.full((5, 4), np.log(0.001)), np.log(np.tile([0.3, 0.25, 0.24, 0.21], (5, 1)))
    sure[:, 0] = np.log(0.997)
    assert grown(tokens, sure, 6).parents == [-1, 0, 1, 2, 3, 4]
    assert grown(tokens, unsure, 5).parents == [-1, 0, 0, 0, 0]


def test_a_chain_is_a_tree() -> None:
    chain, tree = DraftTree.chain([7, 8, 9]), DraftTree.depth_first([7, 8, 9], [-1, 0, 1])[0]
    assert vars(chain) == vars(tree)
