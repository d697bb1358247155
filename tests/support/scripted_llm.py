"""An LLM that answers with given text, for servers that are tested without a model."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

from trimode.model.tokenizer import Tokenizer
from trimode.runtime.api.llm import EngineLLM
from trimode.runtime.api.request_output import RequestOutput
from trimode.runtime.request.guided_decoding import GuidedDecodingParams
from trimode.runtime.request.outputs import FinishReason, Update
from trimode.runtime.request.sampling_params import SamplingParams

CONTEXT = 2048


class ScriptedLLM:
    """Each answer is the pieces, one an update. params: of the latest request. grammars: that were compiled."""

    def __init__(self, tokenizer: Tokenizer, pieces: Sequence[str], finish_reason: FinishReason = "stop") -> None:
        self.tokenizer = tokenizer
        self.failure = None
        self.max_answers = 16
        self.manifest = SimpleNamespace(limits=SimpleNamespace(top_k=64), source="scripted")
        self.capacity = SimpleNamespace(
            context=CONTEXT,
            default_max_tokens=lambda prompt: CONTEXT - prompt,
            defaults=SimpleNamespace(enable_thinking=None, mode="auto"),
        )
        self.params = SamplingParams()
        self.grammars: list[GuidedDecodingParams] = []
        self._pieces = pieces
        self._finish_reason = finish_reason

    @property
    def as_engine(self) -> EngineLLM:
        return cast(EngineLLM, self)

    def stats(self) -> Any:
        raise NotImplementedError

    def compile_grammar(self, params: GuidedDecodingParams) -> None:
        self.grammars.append(params)

    def generate_async(self, inputs: Any, params: SamplingParams, streaming: bool) -> RequestOutput:  # noqa: ARG002
        self.params = params
        request = RequestOutput(1, None, inputs["prompt_token_ids"], params.n)
        for number, piece in enumerate(self._pieces):
            last = number == len(self._pieces) - 1
            token_ids = self.tokenizer.encode(piece)
            request._mailbox.put(
                Update(
                    index=0,
                    text=piece,
                    token_ids=token_ids,
                    origins=["bonus"] * len(token_ids),
                    finish_reason=self._finish_reason if last else None,
                )
            )
        return request
