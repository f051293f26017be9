"""A few heads a step, by turns: nobody waits for ever, nobody without a head waits at all."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lory_server.head_turns import HeadTurns
from lory_server.messages import Sampling
from lory_server.plan import AdapterDemand, Residency, ResidentAdapter
from lory_server.sequence import Sequence
from simulated import World
from test_scheduler import check_answers
from test_scheduler import sequence as simulated_sequence
from test_scheduler import world as simulated_world


def sequence(number: int, revision: str, has_own_head: bool = True) -> Sequence:
    return Sequence(
        request_id=number,
        sampling=Sampling(max_new_tokens=8, seed=0),
        tokens=[1, 2, 3],
        tenant="t",
        weights=revision or "base",
        revision=revision,
        has_own_head=has_own_head,
    )


def step(turns: HeadTurns, running: list[Sequence], gives_way: str | None = None) -> list[str]:
    """The revisions that got a row."""
    planned: list[str] = []
    for one in turns.begin(running):
        if turns.admits(one) and one.revision != gives_way:
            turns.note(one)
            planned.append(one.revision)
    return planned


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_every_head_gets_its_turn(limit: int) -> None:
    turns, running = HeadTurns(limit), [sequence(i, f"r{i}") for i in range(5)]
    counts = dict.fromkeys((one.revision for one in running), 0)
    for _ in range(30):
        planned = step(turns, running)
        assert len(set(planned)) == limit
        for revision in planned:
            counts[revision] += 1
    assert max(counts.values()) - min(counts.values()) <= 1


def test_rows_of_one_head_go_together_and_rows_without_never_wait() -> None:
    turns = HeadTurns(1)
    running = [sequence(0, "a"), sequence(1, "a"), sequence(2, "b"), sequence(3, "", False)]
    assert sorted(step(turns, running)) == ["", "a", "a"]
    assert sorted(step(turns, running)) == ["", "b"]


def test_order_is_kept_while_all_heads_fit() -> None:
    running = [sequence(2, "b"), sequence(0, "", False), sequence(1, "a")]
    assert HeadTurns(2).begin(running) == running


def test_a_head_whose_sequence_gave_way_leaves_its_place_to_the_next() -> None:
    turns, running = HeadTurns(1), [sequence(0, "a"), sequence(1, "b")]
    assert step(turns, running, gives_way="a") == ["b"]
    assert step(turns, running) == ["a"], "it still comes first"


@settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 24), st.sampled_from("abcdef")),
        min_size=2,
        max_size=20,
    ),
    limit=st.integers(1, 3),
    num_blocks=st.integers(17, 40),
    rows=st.integers(2, 8),
    depth=st.integers(0, 2),
)
def test_any_trace_ends_with_every_answer_right(
    requests: list[tuple[int, int, str]], limit: int, num_blocks: int, rows: int, depth: int
) -> None:
    """Few blocks, few heads a step: nobody is lost, and no step is idle while somebody runs."""
    w = simulated_world(num_blocks, 4, rows, rows + 4, 6, depth, max_step_heads=limit)
    sequences = [
        simulated_sequence(i, [i % 7 + 1] * length, wanted, weights)
        for i, (length, wanted, weights) in enumerate(requests)
    ]
    for one in sequences:
        one.has_own_head = one.revision in "abcd"
        w.add(one)
    while w.has_work or w.in_flight:
        ran = step_of(w)
        heads = {revision for revision in ran if revision in "abcd"}
        assert len(heads) <= limit
    check_answers(w, sequences)


def step_of(w: World) -> list[str]:
    """The revisions whose rows a step computed."""
    was_running, was_in_flight = bool(w.scheduler.running), bool(w.in_flight)
    seen: list[list[str]] = []
    submit = w.runner.submit
    w.runner.submit = lambda plan: (  # pyright: ignore[reportAttributeAccessIssue]
        seen.append([w.runner.weights_of[row.sequence_id] for row in plan.rows]),
        submit(plan),
    )[1]
    w.step()
    w.runner.submit = submit  # pyright: ignore[reportAttributeAccessIssue]
    assert seen or was_in_flight or not was_running, "an idle step"
    return seen[0] if seen else []


def test_room_for_full_weights_is_made_for_one_that_waits_too_long() -> None:
    """Others whose weights leave no room admit nobody, those that have none of it go on."""
    w = simulated_world(slots=8, max_overtakes=1)
    for number, weights in enumerate(("big", "small")):
        w.add(simulated_sequence(number, [1, 2], 8, weights))
    large = simulated_sequence(2, [1, 2], 8, "large")
    large.full_bytes = 60
    w.add(large)
    residency = Residency(
        resident={
            "big": ResidentAdapter(0, 1, 1, full_bytes=50),
            "small": ResidentAdapter(1, 1, 1),
        },
        free_bytes=8,
        free_slots=6,
        free_full_bytes=20,
    )
    w.scheduler.plan(residency)
    large.overtaken = 5
    assert w.scheduler._draining(residency) == {"big"}
    assert w.scheduler._draining(replace(residency, free_full_bytes=60)) == frozenset()
    demand: AdapterDemand = w.scheduler._demand(residency, frozenset({"big"}))
    assert demand.wanted == ("large",)
