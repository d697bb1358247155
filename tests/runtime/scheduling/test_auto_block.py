"""Mode auto: long blocks where tokens cost little and drafts are accepted, short blocks otherwise."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimode import SamplingParams
from trimode.runtime.decoding.acceptance_rates import Acceptance, SharedAcceptance
from trimode.runtime.decoding.ending import Ending
from trimode.runtime.decoding.sequence import Sequence
from trimode.runtime.scheduling.auto_block import (
    CHOICES,
    HOST_SECONDS,
    HOST_SECONDS_OF_A_SEQUENCE,
    LEAST_KEPT,
    LEAST_TRIAL_SHARE,
    MOST_KEPT,
    MOST_TRIAL_SHARE,
    VAIN_TRIAL,
    BlockChooser,
    Opening,
    Plan,
    seconds_of_a_tree,
)
from trimode.runtime.scheduling.pass_cost import EngineName, PassCost


def sequence(rate: float, mode: str = "auto", block_length: int | None = None, ends: float = 0.0) -> Sequence:
    params = SamplingParams(mode=mode, block_length=block_length, max_tokens=100)  # type: ignore[arg-type]
    acceptance = Acceptance()
    acceptance.rates[:], acceptance.end_rate = [rate] * len(acceptance.rates), ends
    acceptance.tree_gains[:] = [0.0] * len(CHOICES)
    return Sequence(
        [5], params, Ending(params, frozenset()), acceptance, context=1000, mask_id=0, prefill_step=8, seed=0
    )


def opening(*sequences: Sequence) -> list[Opening]:
    """Without copies."""
    return [Opening(each, []) for each in sequences]


def next_plan(chooser: BlockChooser, begins: list[Opening]) -> Plan:
    """As the scheduler takes it, where none may copy and no others run."""
    return chooser.kept(len(begins)) or chooser.choose(begins, [])


def host_seconds(sequences: int, step: int) -> float:
    return (HOST_SECONDS + HOST_SECONDS_OF_A_SEQUENCE * sequences) * (2 if step > 1 else 1)


def machine(free_tokens: float, batches: int = 16) -> PassCost:
    """A pass costs 10 ms up to so many tokens, and in proportion beyond."""
    cost = PassCost(batches, 32)

    def seconds(_: EngineName, batch: int, step: int) -> float:
        return 1e-2 * max(1.0, batch * step / free_tokens)

    cost.measure(seconds, seconds=1e9)
    return cost


@pytest.mark.parametrize(
    ("rate", "free_tokens", "requests", "block"),
    [
        (0.99, 1000, 1, 32),  # tokens cost nothing and all are accepted
        (0.0, 1000, 1, 1),  # a draft pass of which nothing is accepted
        (0.9, 1, 1, 1),  # every token costs in full: twice, and some are rejected
        (0.9, 16, 1, 16),
        (0.9, 16, 16, 1),  # the same machine under load
        (0.4, 1000, 1, 1),  # 1.67 tokens for two passes
    ],
)
def test_the_block_length_of_simple_cases(rate: float, free_tokens: float, requests: int, block: int) -> None:
    deciding = [sequence(rate) for _ in range(requests)]
    assert BlockChooser(machine(free_tokens)).choose(opening(*deciding), []).block == block


@given(
    rates=st.lists(st.floats(0, 1), min_size=1, max_size=8),
    free_tokens=st.floats(1, 200),
    longest=st.integers(1, 40),
    ends=st.floats(0, 0.2),
)
def test_it_is_the_best_of_all_choices(rates: list[float], free_tokens: float, longest: int, ends: float) -> None:
    """Compared with the formula, written out."""
    deciding = [sequence(rate, block_length=longest, ends=ends) for rate in rates]
    cost = machine(free_tokens)

    def tokens_a_second(block: int) -> float:
        block = min(block, longest)
        tokens = sum(1 + sum((rate * (1 - ends)) ** place for place in range(1, min(block, 32))) for rate in rates)
        passes = ["ar"] if block == 1 else ["ar", "diffusion"]
        seconds = sum(cost.seconds(engine, len(rates), block) for engine in passes)  # type: ignore[arg-type]
        return tokens / (seconds + host_seconds(len(rates), block))

    chosen = BlockChooser(cost).choose(opening(*deciding), []).block
    assert tokens_a_second(chosen) >= max(tokens_a_second(block) for block in CHOICES) * (1 - 1e-9)


@pytest.mark.parametrize(("longest", "block"), [(1, 1), (5, 8), (8, 8), (9, 16)])
def test_the_longest_block_of_a_request_need_be_no_power_of_two(longest: int, block: int) -> None:
    """All drafts are accepted, and tokens cost nothing. The sequence shortens its block."""
    chosen = BlockChooser(machine(1000)).choose(opening(sequence(0.99, block_length=longest)), [])
    assert chosen.block == block


def test_one_token_costs_a_pass_of_one_token() -> None:
    """Drafts are nearly free, but each verified token costs as much as the first one, and half of them are rejected."""
    cost = PassCost(1, 32)
    cost.measure(lambda engine, _, step: step * (1e-3 if engine == "ar" else 1e-6), seconds=1e9)
    assert BlockChooser(cost).choose(opening(sequence(0.5)), []).block == 1


def test_a_block_is_as_long_as_that_of_a_request_beside_it() -> None:
    """The draft pass of a request with a fixed block runs anyway, so sharing it costs nothing."""
    cost, uncertain = machine(1000), opening(sequence(0.45))
    assert BlockChooser(cost).choose(uncertain, []).block == 1
    assert BlockChooser(cost).choose(uncertain, [sequence(0.9, "linear_spec", 32)]).block > 1


def test_acceptance_is_learnt_and_forgotten() -> None:
    shared = SharedAcceptance()
    own = Acceptance(begins_with=shared)
    begins = own.yields()[15]
    for _ in range(50):
        own.observe(accepted=1, tested=2, ended=False)
    assert own.yields()[15] == pytest.approx(2, abs=0.1)
    assert Acceptance(begins_with=shared).yields()[15] < begins
    for _ in range(16000):
        own.forget()
    assert own.yields()[15] == pytest.approx(begins, rel=0.1)


def test_a_few_answers_settle_what_new_ones_start_from() -> None:
    """Every draft is accepted. After 20 cycles, nearly all of a block of 16 is expected to be."""
    shared = SharedAcceptance()
    for _ in range(20):
        Acceptance(begins_with=shared).observe(accepted=15, tested=15, ended=False)
    assert Acceptance(begins_with=shared).yields()[15] > 0.85 * 16


def test_places_that_no_block_reached_are_like_those_before() -> None:
    """Otherwise blocks of 4 would keep auto from finding out what blocks of 32 yield."""
    for accepted in (0, 3):
        shared = SharedAcceptance()
        for _ in range(50):
            shared.observe(accepted=accepted, tested=min(accepted + 1, 3), ended=False)
        reached, *_, last = shared.rates
        assert last == pytest.approx(reached, abs=0.1)


def test_an_answer_that_waited_starts_from_what_was_learnt_meanwhile() -> None:
    shared = SharedAcceptance()
    waiting, reference = Acceptance(begins_with=shared), Acceptance(begins_with=shared).yields()[15]
    for _ in range(20):
        shared.observe(accepted=15, tested=15, ended=False)
    assert waiting.yields()[15] > 1.5 * reference


def test_drafts_past_the_end_of_a_text_are_not_learnt_from() -> None:
    acceptance = Acceptance()
    before = acceptance.rates.copy()
    acceptance.observe(accepted=3, tested=3, ended=True)
    assert all(rate > known for rate, known in zip(acceptance.rates[:3], before, strict=False))
    assert acceptance.rates[3:] == before[3:]


def test_short_texts_get_short_blocks() -> None:
    """Drafts past the end of the text are lost, even if all would be accepted."""
    cost = machine(12)
    assert BlockChooser(cost).choose(opening(sequence(1.0, ends=0.01)), []).block == 16
    assert BlockChooser(cost).choose(opening(sequence(1.0, ends=0.2)), []).block == 8


def test_the_end_rate_is_learnt_from_all_sequences() -> None:
    """Texts of 20 tokens, four cycles of 5 each."""
    shared = SharedAcceptance()
    for _ in range(1000):
        own = Acceptance(begins_with=shared)
        for cycle in range(4):
            own.observe(accepted=4, tested=4, ended=cycle == 3)
    assert Acceptance(begins_with=shared).end_rate == pytest.approx(1 / 20, rel=0.1)


@given(st.lists(st.tuples(st.integers(0, 5000), st.booleans()), max_size=20))
def test_the_end_rate_stays_a_probability(cycles: list[tuple[int, bool]]) -> None:
    shared = SharedAcceptance()
    for accepted, ended in cycles:
        Acceptance(begins_with=shared).observe(accepted=accepted, tested=accepted, ended=ended)
        assert 0 <= shared.end_rate <= 1


@st.composite
def loads(draw: st.DrawFn) -> tuple[list[Opening], list[Sequence]]:
    """Sequences of all modes, some with copies. The texts of some are nearly at their end."""
    rates = st.floats(0.05, 0.95)
    lengths = st.sampled_from([1, 2, 5, 8, 16])
    begins = []
    for _ in range(draw(st.integers(1, 4))):
        mode = draw(st.sampled_from(["auto", "auto", "linear_spec"]))
        each = sequence(draw(rates), mode, block_length=draw(lengths))
        gain = draw(st.sampled_from([0.0, 0.0, 0.5, 2.0]))
        each.acceptance.tree_gains[:] = [gain * width / 32 for width in CHOICES]
        copy = [1.0]
        for _ in range(draw(st.sampled_from([0, 3, 12]))):
            copy.append(copy[-1] + draw(rates))
        if mode == "linear_spec" and len(copy) == 1:
            copy.append(1.3)  # without a copy, the scheduler does not ask
        begins.append(Opening(each, copy if len(copy) > 1 else []))
    if not any(each.decides for each in begins) and draw(st.booleans()):
        begins.append(Opening(sequence(0.5), []))
    beside = [
        sequence(draw(rates), draw(st.sampled_from(["ar", "linear_spec", "diffusion"])))
        for _ in range(draw(st.integers(0, 2)))
    ]
    return begins, beside


def expected_rate(begins: list[Opening], beside: list[Sequence], cost: PassCost, plan: Plan) -> float:
    """Tokens a second of a plan, by the rules of the module's docstring."""

    def taken(yields: list[float], each: Sequence, block: int) -> float:
        return yields[min(block, each.longest_block, len(yields)) - 1]

    tokens = sum(taken(each.acceptance.yields(), each, each.longest_block) for each in beside)
    fixed = [each for each in beside if each.params.mode == "linear_spec"]
    steps, drafting, trees, gained = [1], len(fixed), 0, 0.0
    for (each, copy_yields), copies in zip(begins, plan.copying, strict=True):
        decides = each.params.mode == "auto"
        if copies:
            tokens += taken(copy_yields, each, plan.copy_block)
            steps.append(plan.copy_block)
        elif decides and plan.block == 1:
            tokens += 1
        else:
            block = plan.block if decides else each.longest_block
            tokens += taken(each.acceptance.yields(), each, block)
            steps.append(block)
            drafting += 1
            if decides and each.longest_block > 1:
                trees, gained = trees + 1, gained + each.acceptance.tree_gains[CHOICES.index(block)]
        if not decides:
            fixed.append(each)
    longest = max(each.sequence.longest_block for each in begins)
    step = min(max(steps), longest)
    if drafting:
        step = max(step, *(each.longest_block for each in fixed), 1) if fixed else step
    batch = len(begins) + len(beside)
    seconds = cost.seconds("ar", batch, step) + (cost.seconds("diffusion", drafting, step) if drafting else 0.0)
    seconds += host_seconds(batch, step)
    return (tokens + gained) / (seconds + trees * seconds_of_a_tree(step)) if plan.tree else tokens / seconds


@settings(deadline=None)
@given(load=loads(), free_tokens=st.sampled_from([1.0, 8.0, 40.0, 1000.0]))
def test_the_plan_is_the_best_of_all_that_are_considered(
    load: tuple[list[Opening], list[Sequence]], free_tokens: float
) -> None:
    """Copies where they yield as much as drafts, all copies, or copies without drafts; as trees or not."""
    begins, beside = load
    cost = machine(free_tokens)
    plan = BlockChooser(cost).choose(begins, beside)
    able = [bool(each.copy_yields) for each in begins]
    longest = max(each.sequence.longest_block for each in begins)
    found = expected_rate(begins, beside, cost, plan)
    for block in (choice for choice in CHOICES if choice < 2 * longest):
        better = [
            can
            and block > 1
            and each.copy_yields[min(block, len(each.copy_yields), each.sequence.longest_block) - 1]
            >= each.sequence.acceptance.yields()[min(block if each.decides else 32, each.sequence.longest_block) - 1]
            for can, each in zip(able, begins, strict=True)
        ]
        plans = [Plan(block, block, better)]
        if block > 1:
            plans += [Plan(block, block, able), Plan(1, block, able)]
        for other in plans:
            for tree in (False, True):
                assert found >= expected_rate(begins, beside, cost, other._replace(tree=tree)) * (1 - 1e-9)


@pytest.mark.parametrize("unit", [1.0, 0.25])
def test_a_block_that_may_be_better_is_tried_and_a_loss_is_made_up_for(unit: float) -> None:
    """Whatever the unit of time. A block of 2 seems to take twice as long as it may. The trial is slower than the best
    choice, so the next one waits until a share of the time since then is what it lost.
    """

    class Cost(PassCost):
        trial = 1.0

        def seconds(self, engine: EngineName, _batch: int, step: int) -> float:
            return unit * (1.0 if engine == "ar" and step == 1 else self.trial)

        def least_seconds(self, engine: EngineName, batch: int, step: int) -> float:
            return 0.1 * unit if step == 2 else self.seconds(engine, batch, step)

    cost = Cost(1, 2)
    chooser, begins = BlockChooser(cost), opening(sequence(0.53, block_length=2))
    # Two passes of 1 s yield 1.53 tokens, where one yields 1. The trial loses 2 - 1.53 s.
    for _ in range(2000):  # at the start, trials may take a larger share
        next_plan(chooser, begins)
    plans = [next_plan(chooser, begins) for _ in range(3000)]
    assert {(plan.block, plan.trial) for plan in plans} == {(2, True), (1, False)}
    trials = [at for at, plan in enumerate(plans) if plan.trial]
    for before, after in pairwise(trials):
        waited = (after - before - 1) - (2 - 1.53) / LEAST_TRIAL_SHARE
        assert 0 <= waited < MOST_KEPT
    assert len(trials) > 8
    cost.trial = 0.5  # it has become the faster one
    plans = [next_plan(chooser, begins) for _ in range(2 * MOST_KEPT)]
    assert plans[-1].block == 2
    assert not plans[-1].trial


@pytest.mark.parametrize("reason", ["a pass", "a trial"])
def test_trials_may_take_more_time_for_a_while_after_an_unexpected_time(reason: str) -> None:
    class Cost(PassCost):
        def seconds(self, _engine: EngineName, _batch: int, step: int) -> float:
            return 1e-3 * (factor if step == 2 else 1)

        def least_seconds(self, engine: EngineName, batch: int, step: int) -> float:
            return 1e-9 if step == 2 else self.seconds(engine, batch, step)

    def cycles_to_the_next_trial() -> int:
        return next(cycle for cycle in range(5000) if next_plan(chooser, begins).trial)

    factor, cost, begins = 1.0, Cost(1, 2), opening(sequence(0.0, block_length=2))
    chooser = BlockChooser(cost)
    assert cycles_to_the_next_trial() == 0
    usual = [cycles_to_the_next_trial() for _ in range(20)][-1]
    if reason == "a pass":
        cost.surprises += 1
    else:
        factor = 2.5  # known before the trial is settled
    waited = [cycles_to_the_next_trial() for _ in range(20)]
    lost = 1.0 if reason == "a pass" else 4.0  # of the usual loss, about
    assert waited[0] < 0.2 * lost * usual
    assert all(later >= sooner - MOST_KEPT for sooner, later in pairwise(waited[1:]))
    assert waited[1] / waited[-1] == pytest.approx(LEAST_TRIAL_SHARE / MOST_TRIAL_SHARE / VAIN_TRIAL, abs=0.1)


def test_blocks_are_tried_in_turn() -> None:
    """Not only the shortest one, whose trials cost least."""

    class Cost(PassCost):
        def least_seconds(self, engine: EngineName, batch: int, step: int) -> float:
            return self.seconds(engine, batch, step) if step == 1 else 1e-9

    cost = Cost(1, 32)
    cost.measure(lambda _engine, _batch, step: 1e-3 * step, seconds=1e9)
    chooser, begins = BlockChooser(cost), opening(sequence(0.5))
    plans = [next_plan(chooser, begins) for _ in range(60000)]
    assert [plan.block for plan in plans if plan.trial][:6] == [2, 4, 8, 16, 32, 2]


def test_nothing_is_tried_beside_a_prefill() -> None:
    """Its pass would measure the prefill."""
    cost = PassCost(1, 32)  # guesses only
    begins = opening(sequence(0.9))
    assert BlockChooser(cost).choose(begins, []).trial
    assert not BlockChooser(cost).choose(begins, [], prefilling=True).trial


@pytest.mark.parametrize(
    ("milliseconds", "kept", "changed"),
    [(0.01, [16, 32, 64, 64], 16), (0.3, [6, 12, 24, 25, 25], 12), (10.0, [4, 4], LEAST_KEPT)],
)
def test_a_choice_is_kept_longer_each_time_it_is_confirmed_while_choosing_takes_long(
    milliseconds: float, kept: list[int], changed: int
) -> None:
    cost = PassCost(1, 32)
    cost.measure(lambda *_: 1e-3 * milliseconds, seconds=1e9)
    chooser, begins = BlockChooser(cost), opening(sequence(0.99))
    assert chooser.kept(1) is None
    for cycles in kept:
        plan = chooser.choose(begins, [])
        assert (plan.block, plan.cycles) == (32, cycles)
        assert [chooser.kept(1) for _ in range(cycles)] == [plan] * (cycles - 1) + [None]
    assert chooser.choose(opening(sequence(0.1)), []) == Plan(1, 1, [False], cycles=changed)


@pytest.mark.parametrize(("now", "holds"), [(4, True), (5, True), (3, True), (6, False), (2, False)])
def test_a_choice_is_kept_while_the_batch_changes_little(now: int, holds: bool) -> None:
    chooser = BlockChooser(machine(1000))
    chosen = chooser.choose(opening(*[sequence(0.99)] * 3), [sequence(0.99, "linear_spec")])
    assert chooser.kept(now) == (chosen if holds else None)


def test_a_choice_with_copies_or_of_a_trial_holds_for_one_cycle() -> None:
    chooser, copied = BlockChooser(machine(1000)), [Opening(sequence(0.1), [1.0, *[9.0] * 31])]
    assert chooser.choose(opening(sequence(0.1)), []).cycles == LEAST_KEPT
    plan = chooser.choose(copied, [])
    assert (plan.copying, plan.cycles, chooser.kept(1)) == ([True], 1, None)
    chooser, begins = BlockChooser(PassCost(1, 32)), opening(sequence(0.9))
    plan = chooser.choose(begins, [])
    assert (plan.trial, plan.cycles, chooser.kept(1)) == (True, 1, None)


def test_short_passes_are_worth_longer_blocks_because_of_the_hosts_time() -> None:
    """By the passes alone, one token would be faster. The host takes as long for many tokens as for two."""
    for milliseconds, longer in ((0.01, True), (10.0, False)):
        cost = PassCost(1, 32)
        cost.measure(lambda _engine, _batch, step, each=milliseconds: 1e-3 * each * step, seconds=1e9)
        assert (BlockChooser(cost).choose(opening(sequence(0.95)), []).block > 1) == longer


def test_a_copy_replaces_the_draft_where_it_yields_as_much() -> None:
    """On a machine whose passes cost the same whatever their length, a copy saves half of the cycle."""
    cost, good, poor = machine(1000), [1.0, *[4.0] * 31], [1.0, *[1.2] * 31]
    for mode in ("auto", "linear_spec"):
        drafting = sequence(0.8, mode)  # up to 5 tokens a cycle
        assert BlockChooser(cost).choose([Opening(drafting, good)], []).copying == [True]
        assert BlockChooser(cost).choose([Opening(drafting, poor)], []).copying == [False]
        assert BlockChooser(cost).choose([Opening(drafting, [])], [sequence(0.8)]).copying == [False]


def test_a_block_of_one_token_copies_nothing() -> None:
    """Where every token costs as much as the first one, copies that fail cost more than they save."""
    assert BlockChooser(machine(1)).choose([Opening(sequence(0.1), [1.0, 1.1, 1.1])], []) == Plan(1, 1, [False])


def test_beside_sequences_that_draft_a_copy_must_yield_more() -> None:
    """The draft pass runs anyway, so that a copy of fewer tokens saves nothing."""
    cost, copy = machine(1000), [1.0, *[3.0] * 31]
    alone = BlockChooser(cost).choose([Opening(sequence(0.8), copy)], [])
    beside = BlockChooser(cost).choose([Opening(sequence(0.8), copy), Opening(sequence(0.99), [])], [])
    assert alone.copying == [True]
    assert beside == Plan(32, 32, [False, False])


def test_copies_are_verified_beside_sequences_that_decode_one_token() -> None:
    """Drafts that fail are not worth a pass; the copy is, though it lengthens the pass of all."""
    plan = BlockChooser(machine(1000)).choose(
        [Opening(sequence(0.1), [1.0, *[9.0] * 31]), Opening(sequence(0.1), [])], []
    )
    assert plan.block == 1
    assert plan.copy_block > 1
    assert plan.copying == [True, False]


@pytest.mark.parametrize(("gained", "tree"), [(0.0, False), (1.0, True)])
@pytest.mark.parametrize("milliseconds", [0.02, 20.0])
def test_a_tree_is_verified_where_it_is_worth_its_time(gained: float, tree: bool, milliseconds: float) -> None:
    """One token more of eight is worth the host's time only if the passes take long."""
    cost = PassCost(1, 32)
    cost.measure(lambda _engine, _batch, _step: 1e-3 * milliseconds, seconds=1e9)
    each = sequence(0.9, ends=0.0)
    each.acceptance.tree_gains[:] = [gained] * len(CHOICES)
    plan = BlockChooser(cost).choose(opening(each), [])
    assert plan.block == 32
    assert plan.tree == (tree and milliseconds > 1.0)


def test_a_tree_may_pay_where_the_block_alone_does_not() -> None:
    """Few drafts are accepted, so the block would be one token; as a tree it yields three tokens more."""
    each = sequence(0.3)
    assert BlockChooser(machine(1000)).choose(opening(each), []).block == 1
    each.acceptance.tree_gains[:] = [0.0, 0.0, 0.0, 0.0, 0.0, 3.0]
    plan = BlockChooser(machine(1000)).choose(opening(each), [])
    assert (plan.block, plan.tree) == (32, True)


def test_a_sequence_at_its_last_token_gains_nothing_by_a_tree() -> None:
    long, last = sequence(0.9), sequence(0.9, block_length=1)
    last.acceptance.tree_gains[:] = [9.0] * len(CHOICES)
    assert not BlockChooser(machine(1000)).choose(opening(long, last), []).tree


def test_tree_gains_are_learnt_and_forgotten() -> None:
    shared = SharedAcceptance()
    own, first = Acceptance(begins_with=shared), SharedAcceptance().tree_gains
    for _ in range(200):
        own.observe_tree(32, 4.0)
    assert own.tree_gains[5] == pytest.approx(4.0, abs=0.1)
    assert Acceptance(begins_with=shared).tree_gains[5] == pytest.approx(4.0, abs=0.2)
    assert own.tree_gains[4] == pytest.approx(first[4])
    for _ in range(10_000):
        own.forget_trees()
    assert own.tree_gains == pytest.approx(first, abs=0.1)


def test_expectations_have_the_fastest_plan_of_each_block_length() -> None:
    """A copy yields less than a draft here, and needs half the time. Trees gain tokens, and cost the host time."""
    deciding = sequence(0.9, block_length=8)
    deciding.acceptance.tree_gains[:] = [0.0, 0.0, 1.5, 0.0, 0.0, 0.0]
    cost, chooser = machine(1000), BlockChooser(machine(1000))
    assert chooser.expectations() == {}
    copies = [1.0, 1.8, 2.2, 2.3, 2.3, 2.3, 2.3, 2.3]
    chooser.choose([Opening(deciding, copies)], [])
    found = chooser.expectations()
    one = cost.seconds("ar", 1, 1)
    copied = one + host_seconds(1, 2)
    both = cost.seconds("ar", 1, 4) + cost.seconds("diffusion", 1, 4) + host_seconds(1, 4)
    drafts = deciding.acceptance.yields()
    expected = {
        1: (1.0, one + host_seconds(1, 1)),
        2: (1.8, copied),
        4: (drafts[3] + 1.5, both + seconds_of_a_tree(4)),
        8: (drafts[7], both),
    }
    assert found == {block: pytest.approx(values) for block, values in expected.items()}
    assert found[4].rate == pytest.approx((drafts[3] + 1.5) / (both + seconds_of_a_tree(4)))
