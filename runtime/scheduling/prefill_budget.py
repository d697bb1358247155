"""How many prompt tokens a step of the scheduler processes beside the sequences that decode."""

from __future__ import annotations

from trimode.runtime.scheduling.pass_cost import PassCost

# The time for which prompts may delay the sequences that decode in each step, if one chunk does not take longer.
PREFILL_SECONDS = 0.05


class PrefillBudget:
    """Of one step. One chunk always runs; more of them would delay the sequences that decode.

    tokens: prompt tokens of the step, not counting the first chunk; more if they take at most PREFILL_SECONDS. Chunks
    of one pass take less time than the sum that is compared.
    """

    def __init__(self, tokens: int, cost: PassCost) -> None:
        self._tokens = tokens
        self._cost = cost
        self._spent_tokens, self._spent_seconds = 0, 0.0

    def admits(self, tokens: int) -> bool:
        """Whether the step processes another chunk of so many tokens. It is counted if so."""
        spent, seconds = self._spent_tokens + tokens, self._spent_seconds + self._cost.seconds("ar", 1, tokens)
        if self._spent_tokens and spent > self._tokens and seconds > PREFILL_SECONDS:
            return False
        self._spent_tokens, self._spent_seconds = spent, seconds
        return True
