"""The arena of temporary tensors: none shares memory with another one that is needed at the same time."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from trimode.plugins.arena import ALIGNMENT, plan_arena
from trimode.plugins.launches import PlannedLaunch
from trimode.plugins.operators import Node, SwiGlu


@st.composite
def passes(draw: st.DrawFn) -> list[list[PlannedLaunch]]:
    """Passes over the same tensors with different sizes. Each launch reads some tensors that were written before it."""
    count = draw(st.integers(1, 25))
    reads = [draw(st.lists(st.integers(0, index - 1), max_size=3)) if index else [] for index in range(count)]
    return [
        [
            PlannedLaunch(
                SwiGlu(),
                Node.of({}, {}),
                tuple(f"t{read}" for read in reads[index]),
                (f"t{index}",),
                ((draw(st.integers(1, 2000)),),),
            )
            for index in range(count)
        ]
        for _ in range(draw(st.integers(1, 3)))
    ]


@settings(max_examples=150, deadline=None)
@given(drawn=passes())
def test_tensors_that_are_needed_at_the_same_time_do_not_overlap(drawn: list[list[PlannedLaunch]]) -> None:
    """Counted launch by launch, not by lifetimes as in the plan."""
    plan = plan_arena(drawn, "fp32", ())
    last_use = {name: index for launches in drawn for index, launch in enumerate(launches) for name in launch.inputs}
    for launches in drawn:
        live: dict[str, tuple[int, int]] = {}
        for index, launch in enumerate(launches):
            live = {name: extent for name, extent in live.items() if last_use.get(name, -1) >= index}
            for name, shape, _ in launch.new_outputs():
                begin = plan.offsets[name]
                end = begin + 4 * shape[0]
                assert begin % ALIGNMENT == 0
                assert end <= plan.size
                assert all(end <= first or last <= begin for first, last in live.values())
                live[name] = (begin, end)


def test_tensors_of_a_chain_use_the_memory_of_two() -> None:
    launches = [
        PlannedLaunch(SwiGlu(), Node.of({}, {}), (f"t{index - 1}",) if index else (), (f"t{index}",), ((64,),))
        for index in range(10)
    ]
    assert plan_arena([launches], "fp32", ()).size == 2 * ALIGNMENT


def test_tensors_with_memory_elsewhere_get_none() -> None:
    launches = [PlannedLaunch(SwiGlu(), Node.of({}, {}), (), (name,), ((64,),)) for name in ("kept", "result")]
    assert plan_arena([launches], "fp32", ["result"]).offsets == {"kept": 0}
