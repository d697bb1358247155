"""The interface between the decoding loop and a target: two engines, one KV pool, one pass at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from trimode.runtime.kv.slots import KvSlots

Ints = NDArray[np.int64]
Words = NDArray[np.uint32]


@dataclass  # not frozen, which would make creation several times slower
class Step:
    """The inputs of one pass over ``batch`` slots from ``first_slot`` on, as :mod:`trimode.model.step` defines them.

    top_k: candidates needed of each row; None for as many as the engine returns. An executor may return more.
    token_mask: the legal tokens of each row: token i is legal if bit i % 32 of word i // 32 is set; None if all are.
    asked_ids: tokens of each row whose logits are needed as well; None for none.
    """

    first_slot: int
    input_ids: Ints  # [B, S]
    position_ids: Ints  # [B, S]
    write_indices: Ints  # [B]
    logit_rows: Ints  # [B, R]
    top_k: int | None = field(default=None, kw_only=True)
    token_mask: Words | None = field(default=None, kw_only=True)  # [B, R, ceil(V / 32)]
    asked_ids: Ints | None = field(default=None, kw_only=True)  # [B, R, M]

    @property
    def asked(self) -> int:
        """M, the number of tokens of each row whose logits are needed."""
        return 0 if self.asked_ids is None else self.asked_ids.shape[2]

    @property
    def batch(self) -> int:
        return len(self.input_ids)

    @property
    def rows_written(self) -> int:
        """The number of KV rows of the longest sequence after the step."""
        return int(max(self.write_indices.tolist()) + self.input_ids.shape[1])


@dataclass
class CausalStep(Step):
    """A pass of the AR engine."""

    block_mask: NDArray[np.bool_]  # [B, S, S]

    @classmethod
    def chain(
        cls, first_slot: int, input_ids: Ints, write_indices: Ints, logit_rows: Ints, top_k: int | None = None
    ) -> CausalStep:
        """Causal attention within the step, at the positions after the committed rows."""
        positions = write_indices[:, None] + places(input_ids.shape[1])
        mask = causal_mask(*input_ids.shape)
        return cls(first_slot, input_ids, positions, write_indices, logit_rows, mask, top_k=top_k)


@cache
def places(size: int) -> Ints:
    """0 .. ``size`` - 1, read-only."""
    numbers = np.arange(size)
    numbers.flags.writeable = False
    return numbers


@cache
def causal_mask(batch: int, size: int) -> NDArray[np.bool_]:
    """The ``block_mask`` of chains, read-only."""
    return np.broadcast_to(_triangle((size - 1).bit_length())[:size, :size], (batch, size, size))


@cache
def _triangle(exponent: int) -> NDArray[np.bool_]:
    """Masks of all sizes up to 2^exponent are parts of one array: prompts end in chunks of many sizes."""
    return np.tri(1 << exponent, dtype=np.bool_)


@dataclass
class BidirectionalStep(Step):
    """A pass of the diffusion engine."""

    step_lengths: Ints  # [B]
    adapter: NDArray[np.bool_]  # [B], whether to use the draft adapter

    @classmethod
    def block(
        cls,
        first_slot: int,
        input_ids: Ints,
        write_indices: Ints,
        logit_rows: Ints,
        step_lengths: Ints,
        adapter: NDArray[np.bool_],
        top_k: int | None = None,
    ) -> BidirectionalStep:
        """A block of each sequence, at the positions after its committed rows."""
        positions = write_indices[:, None] + places(input_ids.shape[1])
        return cls(first_slot, input_ids, positions, write_indices, logit_rows, step_lengths, adapter, top_k=top_k)

    def verification(self, drafted: Ints | None = None, top_k: int | None = None) -> CausalStep:
        """The causal pass over the same rows. ``drafted`` [B, S] replaces the tokens behind the pending token. top_k:
        candidates needed of each of its rows; a draft's tokens may be greedy where the text's are drawn.
        """
        ids = self.input_ids if drafted is None else np.concatenate([self.input_ids[:, :1], drafted[:, 1:]], axis=1)
        return CausalStep.chain(self.first_slot, ids, self.write_indices, self.logit_rows, top_k)


class Candidates(NamedTuple):
    """The k most likely legal tokens of each logit row, best first, the log-sum-exp over all its legal tokens, and the
    logits of the tokens that were asked for, legal or not.

    Of equal logits, the lowest token id comes first. Behind the last legal token, logits are -1e30.
    """

    logits: NDArray[np.float32]  # [B, R, k]
    tokens: Ints  # [B, R, k]
    log_sum_exp: NDArray[np.float32]  # [B, R]
    asked_logits: NDArray[np.float32] | None = None  # [B, R, M], in the order of asked_ids; None if none were asked for

    def of(self, index: int, rows: int) -> Candidates:
        """The first ``rows`` rows of one sequence: [rows, k], [rows, k], [rows], [rows, M]."""
        return self._part((index, slice(rows)))

    def first_rows(self, rows: int) -> Candidates:
        """The first ``rows`` rows of each sequence."""
        return self._part((slice(None), slice(rows)))

    def behind_first_row(self) -> Candidates:
        """Of one sequence's rows, as :meth:`of` gives them, all but the first."""
        return self._part(slice(1, None))

    def _part(self, at: slice | tuple[int | slice, slice]) -> Candidates:
        asked = None if self.asked_logits is None else self.asked_logits[at]
        return Candidates(self.logits[at], self.tokens[at], self.log_sum_exp[at], asked)


AnyStep = TypeVar("AnyStep", bound=Step)


def some_rows(step: AnyStep, rows: slice) -> AnyStep:
    """The step with a part of its logit rows."""
    return dataclasses.replace(
        step,
        logit_rows=step.logit_rows[:, rows],
        token_mask=None if step.token_mask is None else step.token_mask[:, rows],
        asked_ids=None if step.asked_ids is None else step.asked_ids[:, rows],
    )


def joined_rows(parts: Sequence[Candidates]) -> Candidates:
    """The candidates of all rows, from those of consecutive parts of them."""
    logits, tokens, log_sum_exp = (np.concatenate([part[at] for part in parts], axis=1) for at in range(3))
    asked = [part.asked_logits for part in parts if part.asked_logits is not None]
    return Candidates(logits, tokens, log_sum_exp, np.concatenate(asked, axis=1) if asked else None)


class Executor(Protocol):
    """Runs the engines of one target. ``pool`` is the KV memory that both engines share."""

    @property
    def pool(self) -> KvSlots: ...

    @property
    def threads(self) -> int | None:
        """CPU threads of a pass; None on a GPU."""
        ...

    def run(self, step: CausalStep | BidirectionalStep) -> Candidates:
        """Run one pass. Both engines write the step's KV rows."""
        ...


@runtime_checkable
class OwningExecutor(Executor, Protocol):
    """An executor that owns processes, which must be ended."""

    @property
    def failure(self) -> str | None:
        """Why no pass can be run any more; None as long as passes can be. Callable from any thread."""
        ...

    def close(self) -> None:
        """End them. No pass can be run afterwards."""
        ...


class ExecutorLostError(BaseException):
    """The executor cannot run any pass any more; the message says why. It is not an Exception, so that it ends the
    scheduler: what fails for one request or for one step raises an Exception.
    """


@runtime_checkable
class PreparingExecutor(Executor, Protocol):
    """An executor that prepares passes for each shape and range of slots, which takes longer than a pass does."""

    @property
    def preparations(self) -> int:
        """How many times a pass was prepared so far."""
        ...

    def padded_slots(self, first: int, last: int, step: int) -> tuple[int, int]:
        """The first and the last slot that a pass over the slots ``first`` to ``last`` should cover, so that few ranges
        of slots occur. step: tokens of each sequence. Slots of the pool that no sequence has are among them.
        """
        ...


class Speculated(NamedTuple):
    """Candidates of all rows, [B, S, k], of a draft and of the causal pass that verifies it. k may differ."""

    drafted: Candidates
    verified: Candidates


@runtime_checkable
class SpeculatingExecutor(Executor, Protocol):
    """An executor that runs a draft and its verification without the host in between."""

    def speculate(self, draft: BidirectionalStep, top_k: int | None = None) -> Speculated:
        """Run a draft of whole blocks, and the causal pass over the drafted blocks.

        ``draft`` has all its rows as logit rows, no token mask and no asked ids. The best token of each row is the
        causal pass's input of that row; the first row keeps the pending token. top_k: candidates needed of each row of
        the causal pass, as in :class:`Step`.
        """
        ...
