"""The sum of ranks: bits, and the words by which ranks wait for each other. The other ranks have begun already."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.support.triton_interpreter import interpret
from trimode.plugins.compilation import kernel_of
from trimode.plugins.operators import AllReduce
from trimode.plugins.operators.all_reduce import BEGUN, ENDED, EPOCH, EXCHANGE_HEADER
from trimode.plugins.reference.all_reduce import all_reduce

ROWS, WIDTH, OFFSET = 6, 320, EXCHANGE_HEADER


class Ranks(NamedTuple):
    """The exchange memory of all ranks, seen by rank ``rank``. x, weighted, squares: what it computes."""

    memory: list[Tensor]
    rank: int
    partials: list[Tensor]
    residual: Tensor
    x: Tensor
    weighted: Tensor
    squares: Tensor

    def words(self, rank: int) -> Tensor:
        return self.memory[rank].view(torch.int32)

    def begin(self, number: int) -> None:
        """All other ranks have begun this sum; this rank has completed the one before it."""
        words = self.words(self.rank)
        words[: len(self.memory)] = number
        words[self.rank] = words[EPOCH] = number - 1

    def sum(self) -> None:
        operator = AllReduce(for_norm=True)
        node = operator.node(batch=2, step=ROWS // 2, width=WIDTH, ranks=len(self.memory))
        tactic = operator.tactics(node)[1]
        arguments = {
            "partial": self.memory[self.rank][OFFSET:].view(self.residual.dtype),
            "ranks": torch.tensor([*(memory.data_ptr() for memory in self.memory), self.rank]),
            "residual": self.residual,
            "next_weight": torch.full((WIDTH,), 0.5, dtype=self.residual.dtype),
            "rows": ROWS,
            "x": self.x,
            "weighted": self.weighted,
            "next_squares": self.squares,
            "CAPABILITY": None,
        }
        constants = {**operator.constants(node), **tactic.constants}
        interpret(kernel_of(operator), operator.grid(node, tactic), arguments, constants, self.memory)


def of_ranks(ranks: int, rank: int, dtype: torch.dtype) -> Ranks:
    """Partial sums are of very different sizes, so that another order gives other bits."""
    random = torch.Generator().manual_seed(ranks)
    sizes = 10.0 ** torch.randint(-2, 3, (ranks, ROWS, WIDTH), generator=random)
    partials = [(torch.randn(ROWS, WIDTH, generator=random) * size).to(dtype) for size in sizes]
    memory = [torch.zeros(OFFSET + ROWS * WIDTH * dtype.itemsize, dtype=torch.uint8) for _ in range(ranks)]
    for its, partial in zip(memory, partials, strict=True):
        its[OFFSET:].view(dtype)[:] = partial.flatten()
    empty = [torch.empty(ROWS, WIDTH, dtype=dtype) for _ in range(2)]
    squares = torch.empty(-(-WIDTH // 64), ROWS)
    return Ranks(memory, rank, partials, torch.randn(ROWS, WIDTH, generator=random).to(dtype), *empty, squares)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("ranks", "rank"), [(2, 1), (3, 0), (8, 5)])
def test_every_rank_has_the_bits_of_the_sum_in_the_order_of_ranks(ranks: int, rank: int, dtype: torch.dtype) -> None:
    group = of_ranks(ranks, rank, dtype)
    group.begin(1)
    group.sum()
    expected = all_reduce(group.partials, group.residual)
    assert torch.equal(group.x, expected)
    assert torch.equal(group.weighted, (expected.float() * 0.5).to(dtype))
    tiles = expected.float().square().reshape(ROWS, -1, 64).sum(-1).T
    torch.testing.assert_close(group.squares, tiles, rtol=1e-5, atol=0)
    if ranks == 8 and dtype == torch.float32:
        assert not torch.equal(all_reduce(group.partials[::-1], group.residual), expected)


@pytest.mark.parametrize("number", [1, 7, (1 << 31) - 1, -(1 << 31), 0])
def test_a_sum_is_announced_once_and_its_words_are_left_for_the_next(number: int) -> None:
    """Numbers wrap around. A rank that has begun the next sum already does not hold this one up."""
    group = of_ranks(3, 1, torch.float32)
    words = group.words(1)
    words[EPOCH] = torch.tensor(number - 1).to(torch.int32) if number > -(1 << 31) else (1 << 31) - 1
    words[0], words[2] = number, number if number == (1 << 31) - 1 else number + 1
    group.sum()
    assert [int(group.words(rank)[1]) for rank in range(3)] == [number] * 3
    assert [int(words[at]) for at in (EPOCH, BEGUN, ENDED)] == [number, 0, 0]
    assert all(int(group.words(rank)[EPOCH]) == 0 for rank in (0, 2))
