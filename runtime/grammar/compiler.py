"""Compiles grammars, within limits of size, time and memory, and keeps the latest.

Compilation runs on the thread that asks for it, never on the scheduler's, and without the interpreter's lock. A few
run at once; others wait for them. llguidance counts its own work, so its limits bound time and memory: a grammar that
passes them is refused here, and one that passes them while an answer is decoded ends that answer with an error.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Iterable
from functools import cached_property

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from trimode.model.tokenizer import Tokenizer
from trimode.runtime.grammar.cached_spelling import CachedSpelling
from trimode.runtime.grammar.definition import definition
from trimode.runtime.grammar.matcher import GrammarMatcher, Vocabulary
from trimode.runtime.grammar.token_texts import TokenTexts
from trimode.runtime.request.errors import GrammarError
from trimode.runtime.request.guided_decoding import GrammarSource, GuidedDecodingParams

MAX_CHARACTERS = 1 << 17  # of a schema or grammar
MAX_KEPT = 128  # compiled grammars
MAX_KEPT_CHARACTERS = 1 << 20  # of their sources
_AT_ONCE = 2
_LONGEST_REASON = 300
_SHOWN_LINES = re.compile(r"^\s*\d+ \|", re.MULTILINE)
_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,  # about 20 ms
    step_lexer_fuel=200_000,  # about 15 ms
    step_max_items=50_000,  # about 3 ms
    max_lexer_states=20_000,  # about 40 MB
    max_grammar_size=100_000,
    verbose_errors=False,
)


class CompiledGrammar:
    """A grammar for one vocabulary. Immutable; :meth:`matcher` begins a match of one answer."""

    def __init__(self, start: LLMatcher, vocabulary: Vocabulary) -> None:
        self._start = start
        self._vocabulary = vocabulary

    def matcher(self) -> GrammarMatcher:
        return GrammarMatcher(self._start.deep_copy(), self._vocabulary)


class GrammarCompiler:
    """tokenizer, vocab_size: of the model; the tokenizer may have more or fewer tokens. end_ids: the model's end
    tokens. Usable from many threads.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = tuple(dict.fromkeys(end_ids))
        self._vocabulary: Vocabulary | None = None
        self._first_use = threading.Lock()
        self._compiling = threading.BoundedSemaphore(_AT_ONCE)
        self._kept: OrderedDict[GrammarSource, CompiledGrammar] = OrderedDict()
        self._keeping = threading.Lock()

    def compile(self, params: GuidedDecodingParams) -> CompiledGrammar:
        """The compiled grammar, from the cache if it is there. Raises GrammarError with the reason."""
        source = params.source
        with self._keeping:
            if source in self._kept:
                self._kept.move_to_end(source)
                return self._kept[source]
        if len(source.text) > MAX_CHARACTERS:
            raise GrammarError(
                f"guided_decoding: {source.kind} has {len(source.text)} characters; the limit is {MAX_CHARACTERS}"
            )
        with self._compiling:
            compiled = self._compile(source)
        with self._keeping:
            self._kept[source] = compiled
            while len(self._kept) > MAX_KEPT or sum(len(key.text) for key in self._kept) > MAX_KEPT_CHARACTERS:
                self._kept.popitem(last=False)
        return compiled

    @cached_property
    def token_texts(self) -> TokenTexts:
        """Of the model's tokens; built with the first use."""
        vocabulary = self._loaded_vocabulary()
        hidden = set(self._tokenizer.special_tokens.values())
        return TokenTexts(vocabulary.tokenizer, vocabulary.size, hidden)

    def _compile(self, source: GrammarSource) -> CompiledGrammar:
        vocabulary = self._loaded_vocabulary()
        try:
            text = definition(source, self._tokenizer.special_tokens)
        except ValueError as error:
            raise _refusal(source, str(error)) from None
        except RecursionError:
            raise _refusal(source, "it is nested too deeply") from None
        start = LLMatcher(vocabulary.tokenizer, text, log_level=0, limits=_LIMITS)
        if start.is_error():
            raise _refusal(source, start.get_error())
        compiled = CompiledGrammar(start, vocabulary)
        # The first mask is the first use of the automata; some grammars exceed the limits there.
        first = start.deep_copy()
        first.compute_bitmask()
        if first.is_error():
            raise _refusal(source, first.get_error())
        return compiled

    def _loaded_vocabulary(self) -> Vocabulary:
        """Built with the first grammar: with 131,072 tokens, it takes about a second."""
        with self._first_use:
            if self._vocabulary is None:
                count = max(self._vocab_size, self._tokenizer.size)
                ends = list(self._end_ids)
                tokenizer = LLTokenizer(self._tokenizer.serialized(), n_vocab=count, eos_token=ends)
                cached = LLTokenizer(TokenizerWrapper(CachedSpelling(tokenizer)), eos_token=ends)
                self._vocabulary = Vocabulary(cached, self._vocab_size, self._end_ids)
            return self._vocabulary


def _refusal(source: GrammarSource, reason: str) -> GrammarError:
    """One line, without the lines of the grammar that the library shows. A panic of the library means that one of its
    sizes was exceeded.
    """
    line = " ".join(_SHOWN_LINES.split(reason)[0].split()) or "it is not valid"
    if line.startswith("panic"):
        line = "it is too large"
    if line.startswith("NoExtension"):
        line = "no text matches it"
    if len(line) > _LONGEST_REASON:
        line = line[:_LONGEST_REASON] + "..."
    return GrammarError(f"guided_decoding: {source.kind} cannot be compiled: {line}")
