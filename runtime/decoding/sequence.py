"""Decoding: one loop, three policies.

Every cycle drafts zero or more bidirectional passes until its block is full, then commits it with one causal pass:

| mode | block | bidirectional passes | commit accepts |
|---|---|---|---|
| ``ar`` | 1 | 0 | the token |
| ``linear_spec`` | b | 1 draft, or until filled with a draft threshold | the longest matching run, and one more token |
| ``diffusion`` | b, the last block too | denoise until filled | the whole block, and one more token |
| ``auto`` | chosen each cycle | as ``linear_spec``, or ``ar`` with a block of one | as ``linear_spec`` |

AR is speculation with a block of one. Tokens that a grammar forces, tokens that prompt lookup copies, and tokens that
the last commit predicted after a rejected draft are drafts without a bidirectional pass. A :class:`Sequence` is one
answer's state: it determines which pass it needs next and receives the result, so sequences of all modes can share a
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from collections.abc import Sequence as Many
from itertools import accumulate
from operator import mul
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimode.runtime.decoding.acceptance_rates import Acceptance
from trimode.runtime.decoding.denoising import settled
from trimode.runtime.decoding.draft_sources import (
    FORCED_ONLY,
    NO_DRAFTS,
    DraftSource,
    KeptDrafts,
    MaskedDrafts,
    expected_tokens,
)
from trimode.runtime.decoding.draft_tree import DraftTree, likeliest_nodes
from trimode.runtime.decoding.ending import Ending
from trimode.runtime.decoding.lookup import Lookup
from trimode.runtime.decoding.ruled_rows import AgainRate, Biases, RuledRows
from trimode.runtime.decoding.ruled_tree import DOUBTFUL_RANK, Drafted, legal_tree
from trimode.runtime.decoding.sampling import Sampler
from trimode.runtime.decoding.token_rules import LIKELY_RANKS, TokenRules, Walk
from trimode.runtime.executor import Candidates, Ints, Words, places
from trimode.runtime.request.outputs import (
    Choice,
    Counts,
    Cycle,
    DraftRecord,
    Logprob,
    Origin,
    PromptLogprobs,
)
from trimode.runtime.request.sampling_params import SamplingParams

PassKind = Literal["prefill", "draft", "denoise", "commit"]
TREE_RANKS = 8  # candidates of each position that may be nodes of a tree
# Most tokens of a prefill pass that needs the logits of all its rows, which a CPU computes over the whole vocabulary.
PROMPT_LOGPROB_STEP = 128
NO_TOKENS = np.empty(0, np.int64)


class Pass(NamedTuple):
    """A pass that a sequence needs: its input tokens, and the rows of them that need logits.

    masks: legal tokens of these rows, None for all. asked: tokens of these rows whose logits are needed as well. tree:
    whose nodes these tokens are; None for a chain.
    """

    kind: PassKind
    tokens: Ints  # [S]
    rows: Ints  # [R]
    masks: Words | None = None  # [R, ceil(V / 32)]
    asked: Ints | None = None  # [R, M]
    tree: DraftTree | None = None


class Moves(NamedTuple):
    """KV rows to copy: rows ``sources`` to rows ``start``, ``start`` + 1, ..."""

    start: int
    sources: list[int]


class Sequence:
    """One answer: its tokens, the number of them committed to the KV pool, and the current block.

    The *pending token* is the newest emitted token. Its KV row is not committed yet; it is the first token of the next
    block.

    context: KV rows that the engine's context has. mask_id: the model's mask token. prefill_step: most tokens of a
    prefill pass. seed: of the random generator. acceptance: running estimate of this sequence's acceptance rate. rules:
    which tokens are legal, None if all are. biases: added to logits; they need rules. again_rate: of all sequences with
    rules. kept_acceptance: running estimate of the acceptance of kept drafts. most_step: most tokens of a pass, None
    for any number. lookup: copied drafts, None if the request has none. begun: the answer's first tokens, which another
    process has emitted.

    The begun tokens are *replayed*: they are committed in blocks of the mode's length, without drafts, so that KV rows,
    penalties, rules and budgets become those of the process that emitted them.

    With rules, tokens that the grammar forces enter a block without a draft, illegal drafts are replaced by the next
    best candidate, trees have legal nodes only (:mod:`trimode.runtime.decoding.ruled_tree`), and every emitted token is
    chosen among its row's legal candidates (:mod:`trimode.runtime.decoding.ruled_rows`).

    With rules, a rejected draft is often one wrong value in the right structure. So the candidates of the rows after
    it are *kept*: the best legal ones are the drafts of the next block, unless a draft pass is expected to yield more.
    """

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams,
        ending: Ending,
        acceptance: Acceptance,
        *,
        context: int,
        mask_id: int,
        prefill_step: int,
        seed: int,
        rules: TokenRules | None = None,
        biases: Biases | None = None,
        again_rate: AgainRate | None = None,
        kept_acceptance: Acceptance | None = None,
        most_step: int | None = None,
        lookup: Lookup | None = None,
        begun: Many[int] = (),
    ) -> None:
        self.prompt = np.array(prompt, np.int64)
        self.params = params
        self.ending = ending
        self.acceptance = acceptance
        self.begun = list(begun)
        self.committed = 0
        self.emitted: list[int] = []
        self.origins: list[Origin] = []
        self.logprobs: list[dict[int, Logprob]] = []
        # None if they are not requested.
        self.prompt_logprobs: PromptLogprobs | None = None if params.prompt_logprobs is None else [None]
        self.rejected: list[int] = []  # drafts that the latest commit rejected
        self.moves: Moves | None = None  # that the latest pass needs before the next one
        self.cycles: list[Cycle] = []
        self.choice: Choice | None = None  # of the block, for its record
        self.counts = Counts()
        self._sampler = Sampler(params, self.prompt, seed)
        # Whether each token of a commit must be emitted before the next one is chosen.
        self._one_by_one = self._sampler.depends_on_text or ending.depends_on_text
        self._context = context
        self._mask_id = mask_id
        self._prefill_step = prefill_step
        self._block = NO_TOKENS
        self._masks = 0  # positions of the block that are not settled
        self._forced_places: set[int] = set()  # of the block, or of its tree's nodes
        self._forced_run: list[int] | None = None  # the tokens after the pending token that are known, once they are
        self._walk: Walk | None = None  # of the rules along the block
        self._lookup = lookup
        self._masked = MaskedDrafts(mask_id, acceptance)
        self._kept = KeptDrafts(kept_acceptance or Acceptance())
        self._source: DraftSource = NO_DRAFTS  # of the block's drafts
        self._tree: DraftTree | None = None  # of the block
        self._tree_width = params.tree_width or 0  # for the block; 0 for a chain
        self._likeliest: list[int] = []  # the likeliest token of each position of the draft
        self._drafted_tokens: int  # of the block as it was opened
        self._rules = rules
        self._biases = biases
        self._most_step = most_step
        self._ruled_rows: RuledRows | None = None  # of the causal pass in progress
        self._again: tuple[Ints, Words] | None = None  # its rows to run again, with their masks
        self._drafted: list[tuple[Ints, Ints]] = []  # of each pass of the draft, positions and their candidates [n, k]
        self._doubtful_rows: set[int] = set()  # of the block: their best candidates are probably illegal
        self._again_rate = again_rate or AgainRate()
        # Of the block, in diffusion:
        self._masks_at_first: int
        self._denoise_passes: int
        self._block_logprobs: dict[int, dict[int, Logprob]] = {}  # by position of the block

    @property
    def tokens(self) -> list[int]:
        """The prompt and the emitted tokens."""
        return [*self.prompt.tolist(), *self.emitted]

    @property
    def pending_token(self) -> int:
        return self.emitted[-1]

    @property
    def prefilling(self) -> bool:
        return self.committed < len(self.prompt)

    @property
    def replaying(self) -> bool:
        """Whether some of the begun tokens are not emitted yet."""
        return len(self.emitted) < len(self.begun) and self.ending.finish_reason is None

    @property
    def fills_block(self) -> bool:
        """Whether the next pass is bidirectional."""
        return self._masks > 0

    @property
    def needs_block(self) -> bool:
        return not len(self._block) and not self.prefilling

    @property
    def drafts_on_host(self) -> bool:
        """Whether the host has work between a draft and its verification: further passes, rules, or a tree."""
        return self.params.mode == "diffusion" or bool(self.params.draft_threshold) or self.draft_candidates != 1

    @property
    def runs_again(self) -> bool:
        """Whether the next pass repeats the last one, with masks for some of its rows."""
        return self._again is not None

    @property
    def draft_candidates(self) -> int | None:
        """Candidates needed of each row of a draft; None for all that the engine returns."""
        if self._rules is not None:
            return LIKELY_RANKS
        return TREE_RANKS if self._tree_width else 1

    @property
    def candidates(self) -> int | None:
        """Candidates needed of each row of any other pass; None for all that the engine returns."""
        needed = self.params.candidates
        if needed is not None and self._rules is not None:
            needed = max(needed, LIKELY_RANKS)
        if needed is None or self.prompt_logprobs is None or not self.prefilling:
            return needed
        return max(needed, self.params.prompt_logprobs or 0)

    @property
    def longest_block(self) -> int:
        """Tokens of the longest block that may come next.

        Speculation does not draft past the length limit. Diffusion denoises whole blocks as long as the context has
        room, and cuts the text at the length limit, so its tokens do not depend on the limit.
        """
        if self.params.mode == "diffusion":
            return min(self.params.longest_block, self._context - self.committed)
        return min(self.params.longest_block, self.ending.remaining)

    @property
    def kv_rows(self) -> int:
        """Most KV rows that the prompt and the answer take."""
        return min(self.params.kv_rows(len(self.prompt)), self._context)

    def look_up(self) -> list[float]:
        """Look for a copy that can replace the next block's draft.

        Returns the expected tokens of a cycle that verifies it, by block length from 1 on, the tokens that the grammar
        forces not counted. Empty if there is none.
        """
        if self._lookup is None:
            return []
        forced = self._forced_next()
        self._lookup.find(forced, min(self.longest_block, self._room - len(forced)) - 1)
        return self._lookup.yields() if self._lookup.proposal else []

    def open_block(self, length: int, looked_up: bool = False, tree: bool = False) -> None:
        """Start the next block: the pending token, known tokens, and drafts of one source.

        length: of the block without known tokens, at most ``longest_block``. Known tokens are those that the grammar
        forces, as far as a pass has room, or begun tokens, which are part of ``length``; AR's block stays one token.
        looked_up: the drafts are copies; the latest :meth:`look_up` has found some. There is no draft pass where the
        known tokens and kept drafts alone yield more tokens per pass. tree: as many nodes of the draft are verified as
        the block has tokens; a request's own ``tree_width`` comes first.
        """
        known = self._known_next(length)
        source, count = self._source_of(length, looked_up, len(known))
        drafts = source.propose(count)
        self._source = source
        self._block = np.array([self.pending_token, *known, *drafts], np.int64)
        self._masks = len(drafts) if source is self._masked else 0
        self._forced_places = set(range(1, 1 + len(known)))
        self._tree = None
        self._tree_width = self.params.tree_width or (1 + len(drafts) if tree else 0)
        self._likeliest = []
        self._drafted = []
        self._doubtful_rows = set() if drafts else {len(self._block) - 1}
        self.rejected = []
        self._drafted_tokens = len(self._block)
        self._walk = None
        if drafts and not self._masks and self._rules is not None:
            if source is self._kept:
                self._drafted.append((1 + len(known) + places(len(drafts)), self._kept.candidates))
            self._repair_drafts(self._rules)
        if self.params.mode == "diffusion" and not self.replaying:
            self._place_end_of_thinking()
            self._masks_at_first = self._masks
            self._denoise_passes = 0
            self._block_logprobs = {}

    def _source_of(self, length: int, looked_up: bool, known: int) -> tuple[DraftSource, int]:
        """The source of a block's drafts, and the most drafts of it. known: tokens of the block that are known."""
        if self.replaying:
            return FORCED_ONLY, 0
        count = (min(length, self._room - known) if known else length) - 1
        if looked_up and self._lookup is not None:
            return self._lookup, count
        self._kept.select(known, self._room)
        kept = len(self._kept.candidates)
        if count and (known or kept):
            with_draft_pass = known + expected_tokens(self._masked, length - 1)
            if with_draft_pass > 2 * (known + expected_tokens(self._kept, kept)):
                if kept:
                    self._kept.forget()
                return self._masked, count
        elif count:
            return self._masked, count
        if kept:
            return self._kept, kept
        return (FORCED_ONLY if known else NO_DRAFTS), 0

    @property
    def _room(self) -> int:
        """Most tokens of the next block, those included that the grammar forces."""
        return self.ending.remaining if self._most_step is None else min(self.ending.remaining, self._most_step)

    def _known_next(self, length: int) -> list[int]:
        """The known tokens after the pending token: begun ones for a block of ``length``, or forced ones."""
        if not self.replaying:
            return self._forced_next()
        self._forced_run = self.begun[len(self.emitted) :][: length - 1]
        return self._forced_run

    def _forced_next(self) -> list[int]:
        """The tokens that the grammar forces after the pending token, as far as a block has room."""
        if self._forced_run is None:
            rules = None if self.params.mode == "ar" else self._rules
            self._forced_run = [] if rules is None else rules.forced_run(self._room - 1)
        return self._forced_run

    def next_pass(self) -> Pass:
        """The next pass of a sequence that is in its prefill or has a block."""
        if self.prefilling:
            if self.prompt_logprobs is not None and self.committed < len(self.prompt) - 1:
                return self._prompt_logprob_pass()
            chunk = self.prompt[self.committed : self.committed + self._prefill_step]
            whole = self.committed + len(chunk) == len(self.prompt)
            return self._with_rules(Pass("prefill", chunk, np.array([len(chunk) - 1])), whole)
        diffusion = self.params.mode == "diffusion"
        if self._masks:
            masked = (self._block == self._mask_id).nonzero()[0]
            return Pass("denoise" if diffusion else "draft", self._block, masked)
        rows = np.array([len(self._block) - 1]) if diffusion else places(len(self._block))
        return self._with_rules(Pass("commit", self._block, rows, tree=self._tree), True)

    def _prompt_logprob_pass(self) -> Pass:
        """A part of the prompt without its last token, whose row predicts the answer."""
        most = min(self._prefill_step, PROMPT_LOGPROB_STEP)
        end = min(self.committed + most, len(self.prompt) - 1)
        asked = self.prompt[self.committed + 1 : end + 1, None]
        return Pass("prefill", self.prompt[self.committed : end], np.arange(end - self.committed), asked=asked)

    def _with_rules(self, needed: Pass, chooses: bool) -> Pass:
        """A causal pass, with the masks and asked ids of its rows. chooses: whether its rows become tokens."""
        if self._rules is None or not chooses:
            return needed
        if self._again is not None:
            return needed._replace(rows=needed.rows[self._again[0]], masks=self._again[1])
        walk = self._walk or self._rules.walk(needed.tokens[needed.rows[0] :].tolist())
        needs = self.params.needed_candidates
        self._ruled_rows = RuledRows(self._rules, self._biases, walk, needs, self.params.logprobs is not None)
        if needed.kind == "prefill" or needs != 1:
            masked: Collection[int] = walk.forced  # of many candidates, some are hardly ever legal
        else:
            masked = self._doubtful_rows if self._again_rate.pays else ()
        masks, asked = self._ruled_rows.inputs(masked)
        return needed if masks is None and asked is None else needed._replace(masks=masks, asked=asked)

    def absorb(self, done: Pass, found: Candidates) -> None:
        """Process a pass's candidates: logits, tokens [R, k] and log_sum_exp [R] of its rows."""
        setattr(self.counts, done.kind, getattr(self.counts, done.kind) + 1)
        self.moves = None
        if done.kind in ("prefill", "commit") and self._ruled_rows is not None:
            if not self._complete(self._ruled_rows, found):
                return
            found = self._ruled_rows.reported
        if done.kind == "prefill":
            if self.prompt_logprobs is not None and done.asked is not None and self._ruled_rows is None:
                self._absorb_prompt_logprobs(self.prompt_logprobs, done.asked, found)
            self.committed += len(done.tokens)
            if not self.prefilling:
                self._emit_run(found, [self.committed], "prefill", _no_drafts)
        elif done.kind == "draft":
            self._draft(done, found)
        elif done.kind == "denoise":
            self._denoise(done, found)
        elif self.params.mode == "diffusion":
            self._commit_diffusion(found)
        else:
            self._commit(found)
        self._ruled_rows = None

    def _absorb_prompt_logprobs(self, logprobs: PromptLogprobs, asked: Ints, found: Candidates) -> None:
        if found.asked_logits is None:
            raise ValueError("the pass did not return the logits of the prompt's tokens")
        for row, token in enumerate(asked[:, 0].tolist()):
            values = found.logits[row] - found.log_sum_exp[row]
            listed = {
                other: Logprob(float(values[rank]), rank + 1) for rank, other in enumerate(found.tokens[row].tolist())
            }
            own = Logprob(float(found.asked_logits[row, 0] - found.log_sum_exp[row]), None)
            likeliest = dict(list(listed.items())[: self.params.prompt_logprobs])
            logprobs.append({token: listed.get(token, own)} | likeliest)

    def _complete(self, rows: RuledRows, found: Candidates) -> bool:
        """Take the candidates of a causal pass; returns whether every row has enough legal ones."""
        if self._again is None:
            self._again = rows.absorb(found)
            if self.params.needed_candidates == 1:
                rows.observe(self._doubtful_rows, self._again_rate)
        else:
            rows.absorb_again(self._again[0], found)
            self._again = None
        return self._again is None

    def _draft(self, done: Pass, found: Candidates) -> None:
        """Fill masks with the most likely tokens, at any temperature: they are the most likely to be accepted."""
        if self._tree_width:
            self._draft_tree(self._tree_width, done, found)
            return
        threshold = self.params.draft_threshold
        if self._rules is not None:
            self._drafted.append((done.rows, found.tokens))
        if not threshold:
            self._settle(done.rows, found.tokens[:, 0])
        else:
            confidence = np.exp(found.logits[:, 0] - found.log_sum_exp)
            sure = confidence >= threshold
            sure[confidence.argmax()] = True
            self._settle(done.rows[sure], found.tokens[sure, 0])
        if self._rules is not None and not self._masks:
            self._repair_drafts(self._rules)

    def _draft_tree(self, width: int, done: Pass, found: Candidates) -> None:
        """Make the block a tree, which has less likely tokens too. Tokens that the grammar forces come in addition."""
        # A tree may be wider than the block is long, but its rows must have room.
        room = self.kv_rows - self.committed
        if self._rules is None:
            tokens: list[list[int]] = found.tokens[:, :TREE_RANKS].tolist()
            log_probs = found.logits[:, :TREE_RANKS] - found.log_sum_exp[:, None]
            nodes = likeliest_nodes(log_probs, min(width, room) - 1)
            self._tree = DraftTree.of(self.pending_token, tokens, nodes)
            self._likeliest = [ranked[0] for ranked in tokens]
        else:
            width = min(width + len(self._forced_places), room, self._most_step or room)
            log_probs = found.logits - found.log_sum_exp[:, None]
            drafted = Drafted(int(done.rows[0]), found.tokens, log_probs)
            ruled = legal_tree(self._rules, self.pending_token, drafted, width, self._room - 1)
            self._walk, self._tree = ruled.walk, ruled.walk.tree
            self._forced_places, self._doubtful_rows = ruled.forced, ruled.doubtful
            self._likeliest = self._tree.likeliest_path(0)
            self._likeliest += found.tokens[max(0, len(self._likeliest) + 1 - drafted.first) :, 0].tolist()
        self._block, self._masks = np.array(self._tree.ids), 0

    def _repair_drafts(self, rules: TokenRules) -> None:
        """Replace illegal drafts by the best legal candidate of their position, and the tokens of positions that the
        grammar forces by the forced ones. The block ends before a position without a legal candidate, or after the
        tokens that are forced after its last draft.
        """
        best, room = self._block.tolist(), self._room
        drafts, forced_tokens = list[int](), dict[int, int | None]()
        while True:
            row = len(drafts)
            taken = rules.take_free(best[row + 1 : room])
            drafts += best[row + 1 : row + 1 + taken]
            forced_tokens.update(dict.fromkeys(range(row, row + taken)))
            if rules.ended:
                break
            row += taken
            forced = forced_tokens[row] = rules.forced_token
            if row + 1 == room or (forced is None and row + 1 >= len(best)):
                break
            if forced is not None:
                run = rules.take_forced(room - 1 - row)
                if not run:
                    self._doubtful_rows.add(row)
                    break
                drafts += run
                forced_tokens.update(zip(range(row, len(drafts)), run, strict=True))
                self._forced_places.update(range(row + 1, len(drafts) + 1))
            else:
                candidates = self._drafted_at(row + 1)
                rank = rules.take_first_legal(candidates[1:])
                if rank is None or rank + 1 >= DOUBTFUL_RANK:
                    self._doubtful_rows.add(row)
                if rank is None:
                    break
                drafts.append(int(candidates[1 + rank]))
        rules.undo(len(drafts))
        if len(drafts) + 1 > len(best):  # the draft has no candidates for the last row's token
            self._doubtful_rows.add(len(drafts))
        self._walk = Walk(DraftTree.chain([self.pending_token, *drafts]), forced_tokens)
        self._block = np.array(self._walk.tree.ids)

    def _drafted_at(self, position: int) -> Ints:
        """The draft's candidates at a position of the block, [k], by the latest pass that had it; empty if none had."""
        for positions, candidates in reversed(self._drafted):
            found = (positions == position).nonzero()[0]
            if len(found):
                ranked: Ints = candidates[found[0]]
                return ranked
        return NO_TOKENS

    def _denoise(self, done: Pass, found: Candidates) -> None:
        """Settle masked positions of the block by confidence, the probability of the token chosen for them."""
        positions = (self.committed + done.rows).tolist()
        tokens = self._sampler.rows(found.logits, found.tokens, positions, draw=self._denoise_passes + 1)
        confidence = np.exp(found.logits[found.tokens == tokens[:, None]] - found.log_sum_exp)
        sure = settled(confidence, self.params, self._masks_at_first, self._denoise_passes)
        self._denoise_passes += 1
        self._settle(done.rows[sure], tokens[sure])
        if self.params.logprobs is not None:
            for row in np.flatnonzero(sure):
                self._block_logprobs[int(done.rows[row])] = self._logprobs(found, row, int(tokens[row]))
        self._place_end_of_thinking()
        if self._text_ends_in_block():
            self.counts.cycles += 1
            self._emit_denoised()
            self._block, self._masks = NO_TOKENS, 0

    def _place_end_of_thinking(self) -> None:
        """Insert the end of thinking where the budget is used up, so that the next passes attend to it.

        NVIDIA's code does so when it opens the block. Here each pass repeats it, since the block may open ``<think>``,
        also more than once.
        """
        for forced in self.ending.forced_among(self._block[1:].tolist()):
            place = forced.place + 1
            self._masks -= int(self._block[place] == self._mask_id)
            self._block[place] = forced.token
            self._forced_places.add(place)

    def _settle(self, places: Ints, tokens: Ints) -> None:
        self._block[places] = tokens
        self._masks -= len(places)

    def _commit(self, found: Candidates) -> None:
        """Accept the longest path of drafts that equal the causal rows' tokens, and one more token."""
        drafts, tree = self._block[1:].tolist(), self._tree
        first = self.committed + 1
        positions: Many[int] = range(first, first + len(self._block))
        if tree is not None:
            positions = [first + depth for depth in tree.depths]
        before, known = len(self.emitted), len(self._forced_run or ())
        expected = known + expected_tokens(self._source, len(drafts) - known)
        if tree is not None and self.params.mode == "auto":
            expected += self.acceptance.tree_gain(min(self._tree_width, len(tree)))

        def next_in_chain(row: int, token: int) -> int | None:
            return row + 1 if row < len(drafts) and token == drafts[row] else None

        follow = next_in_chain if tree is None else tree.child
        rows, accepted = self._emit_run(found, positions, "bonus", follow)
        agreed = len(accepted)
        if rows[-1] != len(rows) - 1:
            stays = next(place for place, row in enumerate(rows) if row != place)
            self.moves = Moves(self.committed + stays, [self.committed + row for row in rows[stays:]])
        self.committed += len(rows)
        rest = drafts[agreed:] if tree is None else tree.likeliest_path(rows[-1])
        tested = agreed + bool(rest and self.ending.finish_reason is None)
        # Forced tokens say nothing about the drafts.
        forced = len(self._forced_places.intersection(accepted))
        drafted = len(drafts) - len(self._forced_places)
        ended = self.ending.finish_reason == "stop"
        if drafted > 0 and tree is not None:
            self._observe_tree(tree, self.emitted[before:], ended)
        elif drafted > 0:
            untested = len([place for place in self._forced_places if place <= tested])
            self._source.learn(agreed - forced, tested - untested, ended)
        emitted = len(self.emitted) - before
        record = self._record([0, *accepted]) if self.params.record_drafts else None
        kind = self._source.kind if tree is None else "tree"
        self.cycles.append(Cycle(kind, self._drafted_tokens, 1 + len(drafts), expected, emitted, record))
        if self._lookup is not None:
            self._lookup.observe(self.emitted[before + known :], ended)
        self.rejected = rest if tested > agreed else []
        if self._rules is not None:
            self._kept.keep(found.tokens[agreed + 1 : len(self._block)] if tree is None else found.tokens[:0])
        self.counts.cycles += 1
        self.counts.trees += tree is not None
        self.counts.drafted += drafted
        self.counts.accepted += agreed - forced
        if self._source is self._lookup:
            self.counts.lookups += 1
            self.counts.copied += drafted
            self.counts.accepted_copies += agreed - forced
        self._block, self._forced_run = NO_TOKENS, None

    def _record(self, path: list[int]) -> DraftRecord:
        choice, self.choice = self.choice, None
        return DraftRecord(self._block.tolist(), None if self._tree is None else self._tree.parents, path, choice)

    def _observe_tree(self, tree: DraftTree, emitted: list[int], ended: bool) -> None:
        """Learn what the chain alone would have yielded, and how many tokens the tree has gained."""
        chain = self._likeliest
        compared = min(len(chain), len(emitted))
        agreed = next((place for place in range(compared) if chain[place] != emitted[place]), compared)
        tested = min(agreed + 1, compared)
        # The likeliest path comes first, so its nodes are positions. Forced tokens say nothing about the draft.
        path = len(tree.likeliest_path(0))
        forced, untested = (
            len([place for place in self._forced_places if place <= min(last, path)]) for last in (agreed, tested)
        )
        self.acceptance.observe(agreed - forced, tested - untested, ended)
        if self.params.mode != "auto":
            return
        if agreed < len(emitted) or self.ending.finish_reason is not None:
            gained = float(len(emitted) - min(agreed + 1, len(emitted)))
        else:  # the tree left out the end of the chain, whose drafts may have been right
            gained = -sum(accumulate(self.acceptance.rates[agreed : len(chain)], mul))
        self.acceptance.observe_tree(min(self._tree_width, len(tree)), gained)

    def _commit_diffusion(self, found: Candidates) -> None:
        """Accept the whole block, and one more token."""
        before = len(self.emitted)
        self._emit_denoised()
        if self.ending.finish_reason is None:
            self._emit_run(found, [self.committed + len(self._block)], "bonus", _no_drafts)
        self.committed += len(self.emitted) - before
        self.counts.cycles += 1
        self._block, self._forced_run = NO_TOKENS, None

    def _emit_run(
        self,
        found: Candidates,
        positions: Many[int],
        origin: Origin,
        follow: Callable[[int, int], int | None],
    ) -> tuple[list[int], list[int]]:
        """Emit the tokens of causal rows, as long as each is drafted; returns the rows, and the rows after accepted
        drafts.

        No path of rows is longer than the text may still become. positions: absolute positions of the rows' tokens.
        follow: the row that follows a row with this token, None if the token is not drafted.
        """
        draw, ruled = self._draw(found, positions), self._ruled_rows
        begun = self.begun and self.begun[len(self.emitted) :]
        ends, one_by_one = self.ending.end_ids, self._one_by_one
        given = bool(begun) or one_by_one  # whether tokens may be given, not drawn
        rows: list[int] = []
        tokens: list[int] = []
        forced: set[int] = set()  # rows whose token is given
        next_row: int | None = 0
        # The agreed rows need no draw, and none of them ends the text.
        if ruled is not None and ruled.agreed and not given and ends.isdisjoint(ruled.agreed.values()):
            rows, tokens = [*ruled.agreed], [*ruled.agreed.values()]
            next_row = follow(rows[-1], tokens[-1])
        while next_row is not None:
            row = next_row
            token = self._given_token(begun, len(rows)) if given else None
            if token is None:
                token = draw(row)
            else:
                forced.add(row)
            next_row = follow(row, token)
            rows.append(row)
            tokens.append(token)
            if one_by_one:
                self._emit([token])
                if self.ending.finish_reason is not None:
                    break
            elif token in ends:
                break
        if not one_by_one:
            self._emit(tokens)
        if ruled is not None:
            forced.update(ruled.forced_among(rows))
        origins: list[Origin] = ["accepted"] * len(rows)
        if next_row is None:
            origins[-1] = origin
        if forced:
            origins = ["forced" if row in forced else each for row, each in zip(rows, origins, strict=True)]
        self.origins += origins
        if self.params.logprobs is not None:
            replayed = min(len(begun), len(rows))
            self.logprobs += [{} for _ in range(replayed)]
            drawn = zip(rows[replayed:], tokens[replayed:], strict=True)
            self.logprobs += [self._logprobs(found, row, token) for row, token in drawn]
        if self._rules is not None and self.ending.finish_reason is None:
            self._rules.take_emitted(tokens)
            if self._rules.complete and self.params.logprobs is None:
                end = self._rules.forced_token
                if end is not None:  # the end of a complete grammar needs no pass
                    self._emit([end])
                    self.origins.append("forced")
        return rows, rows[1:] if next_row is None else [*rows[1:], next_row]

    def _given_token(self, begun: list[int], place: int) -> int | None:
        """The token that comes next regardless of the model's prediction, if there is one. place: in the commit."""
        return begun[place] if place < len(begun) else self.ending.forced

    def _draw(self, found: Candidates, positions: Many[int]) -> Callable[[int], int]:
        """A function from a causal row to its token. A token may depend on those emitted before the call."""
        if self._ruled_rows is None:
            return self._sampler.by_row(found.logits, found.tokens, positions)
        rows, agreed = self._ruled_rows, self._ruled_rows.agreed

        def draw(row: int) -> int:
            if row in agreed:
                return agreed[row]
            choice = rows.choice(row)
            return self._sampler.choose(choice.logits, choice.tokens, positions[row])

        return draw

    def _emit_denoised(self) -> None:
        """Emit the block after its pending token, up to the end of the text."""
        for place, token in enumerate(self._block[1:].tolist(), start=1):
            if self.params.logprobs is not None:
                replayed = len(self.emitted) < len(self.begun)
                self.logprobs.append({} if replayed else self._block_logprobs[place])
            self._emit([token])
            self.origins.append("forced" if place in self._forced_places else "denoised")
            if self.ending.finish_reason is not None:
                return

    def _emit(self, tokens: list[int]) -> None:
        """Append tokens, of which only the last may end the text."""
        self.emitted += tokens
        self._sampler.note(tokens)
        if self._lookup is not None:
            for token in tokens:
                self._lookup.note(token)
        self.ending.take_all(tokens)

    def _text_ends_in_block(self) -> bool:
        """Whether the text ends in the block with no mask before its end, so that the rest is not needed."""
        text = self._block[1 : 1 + self.ending.remaining].tolist()
        for token in text:
            if token == self._mask_id:
                return False
            if token in self.ending.end_ids:
                return True
        return len(text) == self.ending.remaining

    def _logprobs(self, found: Candidates, row: np.intp | int, token: int) -> dict[int, Logprob]:
        """The token's own log-probability, then those of the requested number of most likely tokens."""
        tokens = found.tokens[row].tolist()
        values: NDArray[np.float32] = found.logits[row] - found.log_sum_exp[row]
        if token in tokens:
            rank = tokens.index(token)
            chosen = Logprob(float(values[rank]), rank + 1)
        elif self._ruled_rows is None:
            raise ValueError(f"token {token} is not among the candidates of its row")
        else:
            chosen = Logprob(self._ruled_rows.logit(int(row), token) - float(found.log_sum_exp[row]), None)
        likeliest = {tokens[rank]: Logprob(float(values[rank]), rank + 1) for rank in range(self.params.logprobs or 0)}
        return {token: chosen} | likeliest


def _no_drafts(_row: int, _token: int) -> None:
    """Nothing follows the only row."""
