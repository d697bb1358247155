"""From a prompt and its parameters to the scheduler's requests; refuses what the engine cannot answer."""

from __future__ import annotations

import dataclasses
import secrets

from trimode.common.errors import TriModeError
from trimode.engine.manifest import Manifest
from trimode.model.tokenizer import Tokenizer
from trimode.runtime.api.capacity import Capacity
from trimode.runtime.api.inputs import InputEncoder, Prompt
from trimode.runtime.decoding.acceptance_rates import Acceptance, SharedAcceptance
from trimode.runtime.decoding.bad_words import BadWords
from trimode.runtime.decoding.ending import Ending
from trimode.runtime.decoding.lookup import Lookup, SharedLookupAcceptance
from trimode.runtime.decoding.ruled_rows import AgainRate, Biases
from trimode.runtime.decoding.sequence import Sequence
from trimode.runtime.decoding.text_stream import TextStream
from trimode.runtime.decoding.thinking_budget import ThinkingBudget, ThinkingIds
from trimode.runtime.decoding.token_rules import TokenRules
from trimode.runtime.grammar.compiler import GrammarCompiler
from trimode.runtime.request.errors import ContextLengthError
from trimode.runtime.request.sampling_params import SamplingParams
from trimode.runtime.scheduling.running_request import Listener, Request


class RequestFactory:
    """max_answers: answers that may run or wait. update_seconds: the least time between a stream's updates."""

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: Tokenizer,
        encoder: InputEncoder,
        capacity: Capacity,
        grammars: GrammarCompiler,
        *,
        max_answers: int,
        update_seconds: float,
    ) -> None:
        self.manifest = manifest
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._capacity = capacity
        self._grammars = grammars
        self._max_answers = max_answers
        self._update_seconds = update_seconds
        self._shared_acceptance = SharedAcceptance()
        self._shared_lookup_acceptance = SharedLookupAcceptance()
        self._shared_kept_acceptance = SharedAcceptance(first_guess=0.5)
        self._again_rate = AgainRate()

    def resolve(self, prompt: Prompt, params: SamplingParams) -> SamplingParams:
        """``params`` with every open field set. Raises TriModeError for what the engine cannot do."""
        tokens = len(prompt.token_ids)
        if not tokens:
            raise TriModeError("the prompt is empty; give at least one token")
        params = params.with_defaults(
            mode=self._capacity.defaults.mode,
            block_length=self._capacity.defaults.block_length,
            max_tokens=self._capacity.default_max_tokens(tokens) or 1,
        )
        self._require_context(tokens, params)
        if prompt.answer:
            _require_replay(len(prompt.answer), params)
        self._require_engine(params)
        self._require_tokens(params)
        return params

    def requests(
        self, request_id: int, prompt: Prompt, params: SamplingParams, listener: Listener, streaming: bool
    ) -> list[Request]:
        """One request for each of the ``n`` answers; the first one's siblings are the others."""
        seed = secrets.randbits(63) if params.seed is None else params.seed
        requests: list[Request] = []
        for index in range(params.n):
            text = self._text(params)
            # The prompt's log-probabilities come with the first answer.
            its_params = dataclasses.replace(params, prompt_logprobs=None) if index else params
            sequence = self._sequence(prompt, its_params, seed + index, text)
            update_seconds = self._update_seconds if streaming else None
            requests.append(
                Request(sequence, text, listener, request_id=request_id, index=index, update_seconds=update_seconds)
            )
        requests[0].siblings = requests[1:]
        return requests

    def _require_context(self, prompt_tokens: int, params: SamplingParams) -> None:
        capacity, max_tokens = self._capacity, params.max_tokens or 0
        if prompt_tokens + max_tokens <= capacity.context:
            return
        limit = f"the context of {capacity.context} tokens"
        if capacity.context < capacity.built_context:
            limit += f" (the engine's {capacity.built_context} need more kv_cache_bytes or max_seq_len)"
        fits = capacity.context - prompt_tokens
        message = (
            f"the prompt has {prompt_tokens} tokens, which leave no room for an answer in {limit}; shorten it"
            if fits < 1
            else f"the prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}, which exceeds {limit}; "
            f"max_tokens can be at most {fits}"
        )
        raise ContextLengthError(message, context=capacity.context, prompt_tokens=prompt_tokens, max_tokens=max_tokens)

    def _require_engine(self, params: SamplingParams) -> None:
        limits = self.manifest.limits
        for field, tokens in (("block_length", params.longest_block), ("tree_width", params.tree_width or 1)):
            if limits.max_step is not None and tokens > limits.max_step:
                raise TriModeError(
                    f"{field} is {tokens}, but the engine was built for steps of {limits.max_step}; lower it, or build "
                    "with a larger --max-step"
                )
        if params.n > self._max_answers:
            raise TriModeError(
                f"n is {params.n}, but at most {self._max_answers} answers may run or wait; lower it, or raise "
                "max_queue_size"
            )
        if params.adapter and self.manifest.adapter is None:
            raise TriModeError("adapter is True, but the engine has no draft adapter; leave it out")
        for field in ("top_k", "logprobs", "prompt_logprobs"):
            if (getattr(params, field) or 0) > limits.top_k:
                raise TriModeError(
                    f"{field} is {getattr(params, field)}, but the engine reports {limits.top_k} candidates a row; "
                    "lower it, or build with a larger --top-k"
                )

    def _require_tokens(self, params: SamplingParams) -> None:
        for field in ("stop_token_ids", "allowed_token_ids", "bad_token_ids", "logit_bias"):
            for token in getattr(params, field) or ():
                self._encoder.require_token(f"{field}: token", token)
        for stop in params.stop_strings if params.skip_special_tokens else ():
            for special in self._tokenizer.special_tokens:
                if special in stop and special != stop:
                    raise TriModeError(
                        f"stop {stop!r} contains the special token {special}, which is not part of the text; give "
                        "skip_special_tokens=False, or the token alone"
                    )

    def _text(self, params: SamplingParams) -> TextStream:
        return TextStream(
            self._tokenizer,
            tuple(stop for stop in params.stop_strings if stop not in self._special(params)),
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
        )

    def _sequence(self, prompt: Prompt, params: SamplingParams, seed: int, text: TextStream) -> Sequence:
        model, special, budget = self.manifest.model, self._special(params), params.max_thinking_tokens
        ending = Ending(
            params,
            frozenset(model.eos_token_id),
            {special[stop]: stop for stop in params.stop_strings if stop in special},
            text if any(stop not in special for stop in params.stop_strings) else None,
            None
            if budget is None
            else ThinkingBudget(budget, ThinkingIds.of(self._tokenizer), prompt.token_ids, prompt.thinking),
        )
        lookup = Lookup(prompt.token_ids, self._shared_lookup_acceptance.of_new_answer()) if params.lookup else None
        return Sequence(
            prompt.token_ids,
            params,
            ending,
            Acceptance(self._shared_acceptance),
            mask_id=model.mask_token_id,
            prefill_step=self.manifest.limits.prefill_step,
            seed=seed % 2**64,
            context=self._capacity.context,
            rules=self._rules(prompt, params),
            biases=Biases(params.logit_bias, model.vocab_size) if params.logit_bias else None,
            again_rate=self._again_rate,
            kept_acceptance=Acceptance(self._shared_kept_acceptance),
            most_step=self.manifest.limits.max_step,
            lookup=lookup,
            begun=prompt.answer,
        )

    def _rules(self, prompt: Prompt, params: SamplingParams) -> TokenRules | None:
        """Raises GrammarError if the grammar cannot be compiled."""
        if not params.ruled:
            return None
        model, guided = self.manifest.model, params.guided_decoding
        thought_end = None
        if guided is not None and (ids := ThinkingIds.find(self._tokenizer)) is not None:
            thought_end = ids.end if ids.leave_open(prompt.token_ids, prompt.thinking) else None
        return TokenRules(
            model.vocab_size,
            {*model.eos_token_id, *(params.stop_token_ids or ())},
            grammar=None if guided is None else self._grammars.compile(guided).matcher(),
            thought_end=thought_end,
            allowed=params.allowed_token_ids,
            banned=params.bad_token_ids or (),
            min_tokens=params.min_tokens,
            bad_words=BadWords(params.bad_words, self._grammars.token_texts) if params.bad_words else None,
        )

    def _special(self, params: SamplingParams) -> dict[str, int]:
        """Special tokens by their text. They are not in the output, so a stop string that spells one is found by id."""
        return self._tokenizer.special_tokens if params.skip_special_tokens else {}


def _require_replay(begun: int, params: SamplingParams) -> None:
    """Raises TriModeError if an answer cannot be continued behind its first ``begun`` tokens."""
    if params.n > 1:
        raise TriModeError(f"n is {params.n}, but only one answer can be continued from answer_token_ids; give n 1")
    if begun >= (params.max_tokens or 0):
        raise TriModeError(
            f"answer_token_ids has {begun} tokens and max_tokens, which counts them, is {params.max_tokens}; raise it"
        )
    if params.mode == "diffusion" and (begun - 1) % params.longest_block:
        raise TriModeError(
            f"answer_token_ids has {begun} tokens, which do not end where a block of mode diffusion ends: behind the "
            f"first token and whole blocks of {params.longest_block}"
        )
