"""The part of the GPU check that compares the shipped checkpoint's tokens with those of target ``cpu``.

Where answers differ, the *margin* tells rounding from a fault: at the first token that differs, the logit of the
engine's own token less the logit of the other engine's token, in each of the two engines. Equal engines in other
arithmetic differ where both margins are close to zero. A margin far from zero is a fault, or in ``diffusion`` the
effect of an earlier difference in the same block.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from trimode.runtime.api.llm import EngineLLM
from trimode.runtime.gpu.device import Device
from trimode.runtime.gpu.device_kv_pool import DeviceKvPool
from trimode.runtime.request.outputs import CompletionOutput
from trimode.runtime.request.sampling_params import SamplingParams

# Candidates of each token whose logits the margins come from: as many as the engines return.
RANKED = 4
Record = dict[str, Any]
# The likeliest tokens of a row with their log-probabilities, whose differences are those of the logits.
Ranked = dict[int, float]


class Answer(NamedTuple):
    """ranked: for each token, the candidates that it was chosen from."""

    tokens: list[int]
    ranked: list[Ranked]

    @classmethod
    def of(cls, output: CompletionOutput) -> Answer:
        """The answer to a request with log-probabilities."""
        ranked = [{token: found.logprob for token, found in each.items()} for each in output.logprobs or ()]
        return cls(output.token_ids, ranked)

    def stored(self) -> Any:
        return [self.tokens, [[[token, round(value, 5)] for token, value in each.items()] for each in self.ranked]]

    @classmethod
    def read(cls, stored: Any) -> Answer:
        tokens, ranked = stored
        return cls(tokens, [dict(each) for each in ranked])


# The answers of an engine to the prompts with these numbers.
Answers = Callable[[Sequence[int]], list[Answer]]


class Margin(NamedTuple):
    """gap: of the logits of an engine's own token and of the other token. least: whether the gap is at least this,
    because the other token is not among the candidates.
    """

    gap: float
    least: bool

    @classmethod
    def at(cls, answer: Answer, place: int, other: int) -> Margin:
        ranked, own = answer.ranked[place], answer.tokens[place]
        return cls(ranked[own] - ranked.get(other, min(ranked.values())), other not in ranked)


def tokens_of_tiny(folder: Path, real: str) -> Iterator[Record]:
    """Tokens of every mode against those of target cpu. Unused rows of the KV pool hold NaN."""
    expected = json.loads((folder / "expected.json").read_text())
    found: dict[str, list[list[int]]] = {}
    answers: dict[str, Answers] = {}
    engine = folder / "engines" / f"tiny-{real}"
    with patch.object(DeviceKvPool, "__init__", _poisoned), EngineLLM(engine, measure_passes=False) as llm:
        for options in expected["modes"]:
            params, mode = SamplingParams(max_tokens=expected["max_tokens"], **options), str(options["mode"])
            outputs = llm.generate(expected["prompts"], params)
            found[mode] = [output.outputs[0].token_ids for output in outputs]
            answers[mode] = _again(llm, expected["prompts"], params)
            recorded = [Answer.read(stored) for stored in expected["answers"][mode]]
            yield comparison(
                f"tiny-{real}, {mode}: tokens of target cpu",
                found[mode],
                [answer.tokens for answer in recorded],
                answers[mode],
                lambda numbers, recorded=recorded: [recorded[number] for number in numbers],
            )
        what = f"tiny-{real}: linear_spec emits the tokens of ar"
        yield comparison(what, found["linear_spec"], found["ar"], answers["linear_spec"], answers["ar"])


def _again(llm: EngineLLM, prompts: list[Any], params: SamplingParams) -> Answers:
    """Repeats requests with log-probabilities, which the requests that are compared do without."""

    def answers(numbers: Sequence[int]) -> list[Answer]:
        outputs = llm.generate([prompts[number] for number in numbers], replace(params, logprobs=RANKED))
        return [Answer.of(output.outputs[0]) for output in outputs]

    return answers


def comparison(
    what: str, found: list[list[int]], wanted: list[list[int]], found_again: Answers, wanted_again: Answers
) -> Record:
    """How many answers are equal, and each difference with both engines' margins."""
    different = [number for number, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1]]
    again = zip(found_again(different), wanted_again(different), strict=True) if different else ()
    differences = [
        _difference(number, (found[number], wanted[number]), answers)
        for number, answers in zip(different, again, strict=True)
    ]
    return {"what": what, "equal": len(found) - len(different), "of": len(found), "different": differences}


def _difference(number: int, tokens: tuple[list[int], list[int]], answers: tuple[Answer, Answer]) -> Record:
    """margins: of the engine that was compared, and of the one that it was compared with; None for an answer that came
    out differently when it was repeated.
    """
    place = next((place for place, pair in enumerate(zip(*tokens, strict=False)) if pair[0] != pair[1]), None)
    record: Record = {"answer": number, "first": place}
    if place is None:  # one answer goes on where the other has ended
        return {**record, "tokens": None, "margins": [None, None]}
    own, other = (sequence[place] for sequence in tokens)
    margins = [
        Margin.at(answer, place, token)._asdict() if answer.tokens[: place + 1] == sequence[: place + 1] else None
        for answer, sequence, token in zip(answers, tokens, (other, own), strict=True)
    ]
    return {**record, "tokens": [own, other], "margins": margins}


_plain_init = DeviceKvPool.__init__


def _poisoned(pool: DeviceKvPool, device: Device, *arguments: Any) -> None:
    _plain_init(pool, device, *arguments)
    device.fill(pool.memory.address, 0xFF, pool.memory.size)
    device.synchronize()
