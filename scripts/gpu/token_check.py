"""The part of the GPU check that compares the shipped checkpoint's tokens with those of target ``cpu``.

Where answers differ, the *margin* tells rounding from a fault: at the first token that differs, the logit of the
engine's own token less the logit of the other engine's token, in each of the two engines. Equal engines in other
arithmetic differ where both margins are close to zero. A margin far from zero is a fault, or in ``diffusion`` the
effect of an earlier difference in the same block.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from trimode.runtime.api.llm import EngineLLM
from trimode.runtime.gpu.device import Device
from trimode.runtime.gpu.device_kv_pool import DeviceKvPool
from trimode.runtime.request.guided_decoding import GuidedDecodingParams
from trimode.runtime.request.outputs import CompletionOutput
from trimode.runtime.request.sampling_params import SamplingParams

# Candidates of each token whose logits the margins come from: as many as the engines return.
RANKED = 4
EXPECTED = "expected.json.gz"
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


class Setting(NamedTuple):
    """How prompts are answered. options: fields of the sampling parameters, as JSON. prompts: the first so many; None
    for all. repeats: the setting whose tokens this one must emit, because self-speculation changes no answer.
    """

    name: str
    options: dict[str, Any]
    prompts: int | None = None
    repeats: str | None = None

    def params(self, max_tokens: int, **others: Any) -> SamplingParams:
        options = dict(self.options)
        if guided := options.pop("guided_decoding", None):
            options["guided_decoding"] = GuidedDecodingParams(**guided)
        return SamplingParams(max_tokens=max_tokens, **options, **others)


def write_expected(folder: Path, expected: Record) -> None:
    """Prompts, settings, and the answers of target cpu."""
    with gzip.open(folder / EXPECTED, "wt", encoding="utf-8") as file:
        json.dump(expected, file)


def read_expected(folder: Path) -> Record:
    with gzip.open(folder / EXPECTED, "rt", encoding="utf-8") as file:
        expected: Record = json.load(file)
    return expected


def tokens_of_tiny(folder: Path, real: str) -> Iterator[Record]:
    """Tokens of every setting against those of target cpu. Unused rows of the KV pool hold NaN."""
    expected = read_expected(folder)
    found: dict[str, list[list[int]]] = {}
    answers: dict[str, Answers] = {}
    engine = folder / "engines" / f"tiny-{real}"
    with patch.object(DeviceKvPool, "__init__", _poisoned), EngineLLM(engine, measure_passes=False) as llm:
        for setting in (Setting(*fields) for fields in expected["settings"]):
            name, prompts = setting.name, expected["prompts"][: setting.prompts]
            outputs = llm.generate(prompts, setting.params(expected["max_tokens"]))
            found[name] = [output.outputs[0].token_ids for output in outputs]
            answers[name] = _again(llm, prompts, setting.params(expected["max_tokens"], logprobs=RANKED))
            recorded = [Answer.read(stored) for stored in expected["answers"][name]]
            yield comparison(
                f"tiny-{real}, {name}: tokens of target cpu",
                found[name],
                [answer.tokens for answer in recorded],
                answers[name],
                lambda numbers, recorded=recorded: [recorded[number] for number in numbers],
            )
            if setting.repeats is not None:
                yield comparison(
                    f"tiny-{real}, {name}: tokens of {setting.repeats}",
                    found[name],
                    found[setting.repeats][: len(prompts)],
                    answers[name],
                    answers[setting.repeats],
                )


def _again(llm: EngineLLM, prompts: list[Any], params: SamplingParams) -> Answers:
    """Repeats requests with parameters that ask for log-probabilities, which the compared requests do without."""

    def answers(numbers: Sequence[int]) -> list[Answer]:
        outputs = llm.generate([prompts[number] for number in numbers], params)
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
