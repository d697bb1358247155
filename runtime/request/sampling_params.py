"""``SamplingParams``: TensorRT-LLM's fields by name and meaning, and the fields of the three modes.

A value or a combination that the engine cannot honour is refused with the reason, never ignored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from trimode.common.errors import TriModeError
from trimode.runtime.request.foreign_fields import REASONS, refuse_foreign_fields
from trimode.runtime.request.guided_decoding import GuidedDecodingParams

# From the answer's tokens so far, a row's candidates [k] and their logits [k] to new logits [k].
LogitsProcessor = Callable[[Sequence[int], NDArray[np.int64], NDArray[np.float32]], NDArray[np.float32]]
Mode = Literal["auto", "ar", "diffusion", "linear_spec"]
Denoising = Literal["threshold", "quota", "top_n", "factor", "product"]

DEFAULT_BLOCK_LENGTH = 32
DEFAULT_THRESHOLD = 0.9
# Fields of the block modes, and the modes in which each has a meaning.
_MODES_OF_FIELD: dict[str, tuple[Mode, ...]] = {
    "block_length": ("auto", "diffusion", "linear_spec"),
    "threshold": ("diffusion",),
    "denoising": ("diffusion",),
    "denoising_steps": ("diffusion",),
    "denoising_top_n": ("diffusion",),
    "draft_threshold": ("linear_spec",),
    "adapter": ("auto", "linear_spec"),
    "lookup": ("auto", "linear_spec"),
    "tree_width": ("linear_spec",),
}
_PENALTIES = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
# Fields that decide which tokens are legal or how likely they are, with the values that do nothing.
_RULES: dict[str, Any] = {
    "guided_decoding": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_token_ids": None,
    "bad": None,
    "min_tokens": 0,
}
# Not available in diffusion: a block's tokens are chosen together, so none of them is in the text before another.
_NOT_IN_DIFFUSION = _PENALTIES | _RULES | {"logits_processor": None}
MOST_BIASES = 300


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is decoded and where it ends. Immutable; one record may serve many requests.

    Sampling. temperature, top_k, top_p: greedy if none of them is set, and whenever temperature is 0, top_k is 1 or
    top_p is 0; otherwise tokens are sampled, at temperature 1 if none is given. min_p: least probability of a sampled
    token, as a share of the most probable one's; refused in greedy decoding. The engine returns only the top k
    logits of each position (``--top-k`` of the build). Sampling is restricted to them, in every mode alike. seed: of
    the random generator; the same seed and parameters give the same tokens, whatever else runs. presence_penalty,
    frequency_penalty: subtracted from the logit of an emitted token, once or for each occurrence. repetition_penalty:
    divides a positive logit and multiplies a negative one, for tokens emitted or in the prompt. n: answers to one
    prompt, with seeds ``seed``, ``seed + 1``, ...

    Rules. guided_decoding: the form of the answer, which begins after the thought if the prompt opens one. logit_bias:
    added to the logits of these tokens. allowed_token_ids: the only tokens; bad_token_ids: tokens that never come. bad:
    strings that never appear in the text. min_tokens: end tokens and stop tokens do not come before so many tokens.
    All of them hold over the whole vocabulary: a token outside the engine's top k is found as well. logits_processor:
    called for each token, one after the other, as ``processor(token_ids, candidates, logits)`` with the answer's tokens
    so far and the engine's candidates [k] with their logits [k], best first; returns new logits [k]. It runs on the
    scheduler's thread, so every running request waits for it.

    Ends. max_tokens: of the answer; None for as many as the KV memory allows. ignore_eos: do not stop at the model's
    end tokens. stop: strings, and stop_token_ids: tokens, that end the text; neither is part of it unless
    include_stop_str_in_output. max_thinking_tokens: tokens after which an open ``<think>`` is closed.

    Output. logprobs: alternatives to report with each token, 0 for the token alone; log-probabilities are the model's,
    before temperature and penalties. prompt_logprobs: the same for the prompt's tokens, whose KV rows are then
    computed and not reused. skip_special_tokens: leave them out of the text. record_drafts: record the drafts of each
    cycle, and what ``auto`` compared when it chose them (``Cycle.record``).

    Modes. mode: None for the LLM's default; ``auto`` chooses each cycle, by its cost at the current load, the block
    length of self-speculation, copies, and how much of a draft is verified. block_length: tokens of a block, pending
    token included; the longest that ``auto`` may choose. adapter: draft with the draft adapter. draft_threshold: above
    0, drafts are refined in further passes until every token is at least this probable. lookup: copy the tokens that
    followed an earlier occurrence of the text's end, in the prompt or the answer, instead of drafting, in cycles where
    that is expected to be faster. tree_width: verify a tree of so many drafted tokens,
    pending token included, instead of the block alone; its paths are as long as the block. denoising: which masked
    positions a denoise pass of ``diffusion`` settles, the most confident one always: ``threshold``, every one whose
    confidence reaches threshold; ``quota``, an even share in denoising_steps passes for each block; ``top_n``, the
    denoising_top_n most confident; ``factor``, by rank r = 0, 1, ..., the leading run with confidence at least 1 -
    threshold / (r + 2); ``product``, the leading run whose confidences multiply to at least threshold.

    Numbers and lists of token ids may be numpy's or torch's.

    Raises TriModeError that names the field, the value and the rule.
    """

    def __new__(cls, **fields: Any) -> SamplingParams:
        refuse_foreign_fields(fields)
        return super().__new__(cls)

    max_tokens: int | None = 32
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    n: int = 1
    guided_decoding: GuidedDecodingParams | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_token_ids: Sequence[int] | None = None
    bad: str | Sequence[str] | None = None
    min_tokens: int = 0
    logits_processor: LogitsProcessor | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    max_thinking_tokens: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    record_drafts: bool = False
    mode: Mode | None = None
    block_length: int | None = None
    adapter: bool | None = None
    draft_threshold: float | None = None
    lookup: bool | None = None
    tree_width: int | None = None
    denoising: Denoising | None = None
    threshold: float | None = None
    denoising_steps: int | None = None
    denoising_top_n: int | None = None

    def __post_init__(self) -> None:
        for declared in dataclasses.fields(self):
            object.__setattr__(self, declared.name, _plain(getattr(self, declared.name)))
        self._require_types()
        self._require("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1")
        for field in ("temperature", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            value = getattr(self, field)
            self._require(field, value is None or math.isfinite(value), "a finite number")
        self._require("temperature", (self.temperature or 0) >= 0, "0 (greedy) or a positive number")
        self._require("top_k", (self.top_k or 0) >= 0, "0 (all candidates) or a positive number")
        self._require("top_p", 0 <= (self.top_p or 0) <= 1, "between 0 and 1")
        self._require("min_p", 0 <= (self.min_p or 0) <= 1, "between 0 and 1")
        self._require("seed", 0 <= (self.seed or 0) < 2**64, "between 0 and 2**64 - 1")
        self._require("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "between 0.01 and 100")
        self._require("min_tokens", self.min_tokens >= 0, "at least 0")
        self._require("bad", all(self.bad_words), "without empty strings")
        self._require(
            "allowed_token_ids", self.allowed_token_ids is None or len(self.allowed_token_ids) > 0, "not empty"
        )
        self._require("logit_bias", len(self.logit_bias or {}) <= MOST_BIASES, f"of at most {MOST_BIASES} tokens")
        self._require("n", self.n >= 1, "at least 1")
        self._require("stop", all(self.stop_strings), "without empty strings")
        self._require("max_thinking_tokens", (self.max_thinking_tokens or 0) >= 0, "at least 0")
        self._require("logprobs", (self.logprobs or 0) >= 0, "at least 0")
        self._require("prompt_logprobs", (self.prompt_logprobs or 0) >= 0, "at least 0")
        self._require("mode", self.mode in (None, *get_args(Mode)), f"one of {', '.join(get_args(Mode))}")
        self._require("block_length", self.block_length is None or self.block_length >= 1, "at least 1")
        self._require("tree_width", self.tree_width is None or self.tree_width >= 2, "at least 2")
        self._require("draft_threshold", 0 <= (self.draft_threshold or 0) <= 1, "between 0 and 1")
        self._require("threshold", 0 <= (self.threshold or 0) <= 1, "between 0 and 1")
        self._require(
            "denoising", self.denoising in (None, *get_args(Denoising)), f"one of {', '.join(get_args(Denoising))}"
        )
        self._require("denoising_steps", self.denoising_steps is None or self.denoising_steps >= 1, "at least 1")
        self._require("denoising_top_n", self.denoising_top_n is None or self.denoising_top_n >= 1, "at least 1")
        self._refuse_what_cannot_be_honoured()

    @classmethod
    def of(cls, params: Any) -> SamplingParams:
        """``params`` itself, or the equivalent of TensorRT-LLM's. Raises TriModeError for a field that is set there and
        that TriMode lacks.
        """
        if isinstance(params, cls):
            return params
        if type(params).__module__.partition(".")[0] != "tensorrt_llm":
            raise TriModeError(f"sampling_params is a {type(params).__name__}; give trimode.runtime.SamplingParams")
        ours = {field.name for field in dataclasses.fields(cls)}
        given: dict[str, Any] = {}
        for field in dataclasses.fields(params):
            value = getattr(params, field.name)
            if field.name.startswith("_") or value is None or value == field.default:
                continue
            if field.name == "logits_processor":
                raise TriModeError(
                    f"sampling_params: logits_processor is {value!r}, but its calls differ from TriMode's"
                )
            if field.name in ours:
                given[field.name] = GuidedDecodingParams.of(value) if field.name == "guided_decoding" else value
            elif (field.name == "best_of" and value == params.n) or field.name in ("end_id", "pad_id"):
                continue  # tensorrt_llm sets them itself
            else:
                reason = REASONS.get(field.name, "TriMode does not support it")
                raise TriModeError(f"sampling_params: {field.name} is {value!r}: {reason}")
        return cls(**given)

    def with_defaults(self, *, mode: Mode, block_length: int | None, max_tokens: int) -> SamplingParams:
        """Open fields set: ``mode`` and ``max_tokens`` if they are None, ``block_length`` if the mode has blocks."""
        resolved_mode = self.mode or mode
        if self.block_length is not None or resolved_mode not in _MODES_OF_FIELD["block_length"]:
            block_length = self.block_length
        return dataclasses.replace(
            self, mode=resolved_mode, block_length=block_length, max_tokens=self.max_tokens or max_tokens
        )

    @cached_property
    def greedy(self) -> bool:
        if self.temperature == 0 or self.top_k == 1 or self.top_p == 0:
            return True
        return self.temperature is None and not self.top_k and not self.top_p

    @cached_property
    def penalised(self) -> bool:
        return any(getattr(self, field) != neutral for field, neutral in _PENALTIES.items())

    @property
    def ruled(self) -> bool:
        """Whether some tokens are illegal or biased."""
        return any(getattr(self, field) not in (neutral, [], (), {}) for field, neutral in _RULES.items())

    @property
    def bad_words(self) -> tuple[str, ...]:
        if self.bad is None:
            return ()
        return (self.bad,) if isinstance(self.bad, str) else tuple(self.bad)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @cached_property
    def needed_candidates(self) -> int | None:
        """Legal candidates of a row that the choice of its token may need; None for all that the engine returns."""
        if self.penalised or self.logits_processor is not None:
            return None
        return 1 if self.greedy else self.top_k or None

    @cached_property
    def candidates(self) -> int | None:
        """Candidates of a row that the choice of its token and its log-probabilities may need; None for all."""
        return max(1, self.logprobs or 0) if self.needed_candidates == 1 else None

    @cached_property
    def longest_block(self) -> int:
        """Tokens of a block, pending token included; AR's block is its one token."""
        return 1 if self.mode == "ar" else self.block_length or DEFAULT_BLOCK_LENGTH

    def kv_rows(self, prompt: int) -> int:
        """Most KV rows that a prompt of so many tokens and its answer take.

        The answer's first token comes from the prefill, and every later one from a block. In ``diffusion`` all blocks
        are whole, the last one too. Raises ValueError if max_tokens is open.
        """
        if self.max_tokens is None:
            raise ValueError("max_tokens is open")
        blocks = -(-(self.max_tokens - 1) // self.longest_block) if self.mode == "diffusion" else 0
        return prompt + max(self.max_tokens, blocks * self.longest_block)

    @cached_property
    def uses_adapter(self) -> bool:
        return self.mode in ("auto", "linear_spec") and self.adapter is not False

    def _is_empty(self, field: str) -> bool:
        value = getattr(self, field)
        return value is not None and len(value) == 0

    def _require(self, field: str, holds: bool, rule: str) -> None:
        if not holds:
            raise TriModeError(f"{field} is {getattr(self, field)!r}; it must be {rule}")

    def _require_types(self) -> None:
        """Requests come from JSON too, so types are checked at run time."""
        for declared in dataclasses.fields(self):
            name, kind = declared.name, str(declared.type)
            value = getattr(self, name)
            if value is None and "None" in kind:
                continue
            whole = isinstance(value, int) and not isinstance(value, bool)
            if kind.startswith("int"):
                self._require(name, whole, "a whole number")
            elif kind.startswith("float"):
                self._require(name, whole or isinstance(value, float), "a number")
            elif kind.startswith("bool"):
                self._require(name, isinstance(value, bool), "true or false")
        for field in ("stop", "bad"):
            texts = getattr(self, field)
            if texts is not None and not isinstance(texts, str):
                listed = isinstance(texts, Sequence) and all(isinstance(text, str) for text in texts)
                self._require(field, listed, "a string or a list of strings")
        for field in ("stop_token_ids", "allowed_token_ids", "bad_token_ids"):
            ids = getattr(self, field)
            listed = ids is None or (isinstance(ids, Sequence) and all(type(token) is int for token in ids))
            self._require(field, listed, "a list of token ids")
        biases = {} if self.logit_bias is None else self.logit_bias
        mapped = isinstance(biases, Mapping) and all(
            type(token) is int and type(bias) in (int, float) and math.isfinite(bias) for token, bias in biases.items()
        )
        self._require("logit_bias", mapped, "numbers by token id")
        guided = isinstance(self.guided_decoding, GuidedDecodingParams | None)
        self._require("guided_decoding", guided, "a trimode.GuidedDecodingParams")
        self._require(
            "logits_processor", self.logits_processor is None or callable(self.logits_processor), "a function"
        )

    def _refuse_what_cannot_be_honoured(self) -> None:
        for field, modes in _MODES_OF_FIELD.items():
            if getattr(self, field) is not None and self.mode not in (None, *modes):
                raise TriModeError(f"{field} has no meaning in mode {self.mode}, only in {' and '.join(modes)}")
        if self.tree_width is not None and self.draft_threshold:
            raise TriModeError("tree_width has no meaning with draft_threshold, which drafts one token for each place")
        policy = self.denoising or "threshold"
        for field, policies in {
            "threshold": ("threshold", "factor", "product"),
            "denoising_steps": ("quota",),
            "denoising_top_n": ("top_n",),
        }.items():
            if getattr(self, field) is not None and policy not in policies:
                raise TriModeError(
                    f"{field} has no meaning with denoising {policy}, only with {' and '.join(policies)}"
                )
        if policy == "top_n" and self.denoising_top_n is None:
            raise TriModeError("denoising top_n needs denoising_top_n, the number of tokens to settle a pass")
        if self.mode == "diffusion":
            for field, neutral in _NOT_IN_DIFFUSION.items():
                if getattr(self, field) not in (neutral, [], (), {}):
                    raise TriModeError(
                        f"{field} cannot be honoured in mode diffusion: a block's tokens are chosen together, not one "
                        "after another; use mode linear_spec, auto or ar"
                    )
        if self.guided_decoding is not None and self.ignore_eos:
            raise TriModeError("ignore_eos cannot be given with guided_decoding: the text ends where the grammar ends")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise TriModeError(f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}")
        if self.n > 1 and self.greedy:
            raise TriModeError(f"n is {self.n}, but greedy answers are all equal; give a temperature, or n 1")
        if self.min_p and self.greedy:
            raise TriModeError(f"min_p is {self.min_p}, but greedy decoding does not sample; give a temperature")
        if self.logprobs is not None and self.max_thinking_tokens is not None:
            raise TriModeError(
                "logprobs cannot be given with max_thinking_tokens: a token that the budget forces was not sampled"
            )


def _plain(value: Any) -> Any:
    """numpy's and torch's numbers and arrays as Python's, also in lists and as keys; other values as they are."""
    if isinstance(value, list | tuple):
        plain = [_plain(item) for item in value]
        return plain if isinstance(value, list) else tuple(plain)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    return value.tolist() if callable(getattr(value, "tolist", None)) else value
