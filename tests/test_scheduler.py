"""The scheduler against a simulated device: every answer equals the one the request gets alone."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lory_server.blocks import BlockPool
from lory_server.messages import Sampling
from lory_server.plan import BASE_SLOT, PENDING, Residency
from lory_server.scheduler import Scheduler, SchedulerLimits
from lory_server.sequence import NO_LANE, Sequence
from simulated import EOS, SimulatedRunner, SimulatedTier, World, alone


def world(
    num_blocks: int = 64,
    block_size: int = 4,
    rows: int = 8,
    step_tokens: int = 32,
    slots: int = 4,
    depth: int = 0,
    **limits,
) -> World:
    scheduler = Scheduler(
        BlockPool(num_blocks, block_size), SchedulerLimits(rows, step_tokens, **limits), [EOS]
    )
    return World(scheduler, SimulatedRunner(block_size), SimulatedTier(slots), depth)


def sequence(
    request_id: int,
    prompt: list[int],
    max_new_tokens: int = 8,
    weights: str = "base",
    activation: int = 0,
    short_tokens: int = 0,
    **sampling,
) -> Sequence:
    return Sequence(
        request_id=request_id,
        sampling=Sampling(max_new_tokens=max_new_tokens, seed=request_id, **sampling),
        tokens=list(prompt),
        tenant="t",
        weights=weights,
        activation=activation,
        revision="" if weights == "base" else weights,
        adapter_bytes=0 if weights == "base" else 1,
        short_tokens=short_tokens,
    )


def check_answers(w: World, sequences: list[Sequence]) -> None:
    for s in sequences:
        assert w.answers[s.request_id] == answer_of(s), s


def answer_of(s: Sequence) -> list[int]:
    return alone(s.tokens[: s.prompt_len], s.sampling, s.weights, s.activation, s.short_tokens)


request_strategy = st.tuples(
    st.integers(1, 40),  # prompt length
    st.integers(1, 24),  # max_new_tokens
    st.sampled_from(["base", "a", "b", "c", "d", "e"]),
    st.sampled_from([0, 0, 1, 4, 9, 20, 39]),  # where the adapter begins to act
    st.integers(0, 3),  # which of few prompts: repeats make prefix hits
    st.integers(0, 12),  # steps before it arrives
    st.booleans(),  # cancelled on the way
    st.booleans(),  # needs its history on the host
    st.booleans(),  # has its prompt scored
)


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(
    requests=st.lists(request_strategy, min_size=1, max_size=24),
    num_blocks=st.integers(17, 60),
    rows=st.integers(1, 8),
    extra_tokens=st.integers(0, 24),
    slots=st.integers(1, 4),
    depth=st.integers(0, 2),
    short_tokens=st.sampled_from([0, 0, 5, 16, 30]),
    seed=st.integers(0, 1000),
)
def test_any_trace_ends_with_every_answer_right(
    requests, num_blocks, rows, extra_tokens, slots, depth, short_tokens, seed
) -> None:
    """Random arrivals, adapters, cancellations, tiny pools: invariants hold after every step."""
    w = world(num_blocks, 4, rows, rows + extra_tokens, slots, depth, max_overtakes=4)
    rng = random.Random(seed)
    prompts = [[rng.randrange(1, 50) for _ in range(40)] for _ in range(4)]
    arrivals: dict[int, list[Sequence]] = {}
    cancelled: set[int] = set()
    sequences = []
    for i, request in enumerate(requests):
        length, new, weights, activation, which, at, cancels, history, scores = request
        s = sequence(
            i,
            prompts[which][:length],
            new,
            weights,
            0 if weights == "base" else min(activation, length - 1),
            presence_penalty=0.5 if history else 0.0,
            prompt_logprobs=scores,
            short_tokens=short_tokens,
        )
        sequences.append(s)
        arrivals.setdefault(at, []).append(s)
        if cancels:
            cancelled.add(i)
    for step in range(16):
        for s in arrivals.get(step, []):
            w.add(s)
        for request_id in [i for i in cancelled if i in w.answers and rng.random() < 0.2]:
            w.cancel(request_id)
            cancelled.discard(request_id)
        w.step()
    w.run()
    assert set(w.reasons) == set(w.answers)
    assert w.scheduler.pool.num_used == 0
    check_answers(w, [s for s in sequences if w.reasons[s.request_id] != "cancelled"])
    for s in sequences:  # what a cancelled request got is a prefix of what it would have got
        assert w.answers[s.request_id] == answer_of(s)[: len(w.answers[s.request_id])]
        if w.answers[s.request_id] and s.sampling.prompt_logprobs:
            assert w.scored[s.request_id] == s.tokens[1 : s.prompt_len]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_storm_leaves_every_answer_right_and_nothing_behind(depth: int) -> None:
    """Ten thousand steps of arrivals, cancellations, preemptions and evictions without a pause."""
    w = world(num_blocks=18, rows=5, step_tokens=12, slots=2, depth=depth, max_overtakes=4)
    rng = random.Random(depth)
    prompts = [[rng.randrange(1, 50) for _ in range(30)] for _ in range(4)]
    sequences: list[Sequence] = []
    for _ in range(10_000):
        if len(w.scheduler.waiting) < 6:
            prompt, weights = rng.choice(prompts), rng.choice(["base", "base", "a", "b", "c"])
            prompt = prompt[: rng.randint(1, 30)]
            new = sequence(
                len(sequences),
                prompt,
                rng.randint(1, 24),
                weights,
                0 if weights in ("base", "a") else rng.randrange(len(prompt)),
                ignore_eos=rng.random() < 0.5,
                presence_penalty=rng.choice([0.0, 0.0, 0.0, 0.5]),
                prompt_logprobs=rng.random() < 0.2,
            )
            sequences.append(new)
            w.add(new)
        if rng.random() < 0.1:
            w.cancel(rng.choice(sequences).request_id)
        w.step()
    w.run()
    assert w.preemptions > 20
    assert w.tier.loads > 50
    assert {"length", "eos", "cancelled"} == set(w.reasons.values())
    assert len(w.reasons) == len(sequences)
    assert w.scheduler.pool.num_used == 0
    check_answers(w, [s for s in sequences if w.reasons[s.request_id] != "cancelled"])


def test_the_simulated_device_catches_a_wrong_block() -> None:
    """The property above can fail: a scheduler that mixes up blocks is noticed."""
    w = world()
    s = sequence(1, list(range(1, 20)))
    w.add(s)
    w.step()
    s.blocks[0], s.blocks[1] = s.blocks[1], s.blocks[0]
    with pytest.raises(AssertionError, match="foreign KV"):
        w.run()


def test_a_long_prompt_starves_neither_decodes_nor_arrivals() -> None:
    w = world(num_blocks=400, rows=4, step_tokens=8)
    w.add(sequence(1, list(range(1, 400)), 4))
    w.step()
    w.add(sequence(2, [3], 30, ignore_eos=True))
    w.step()
    assert w.answers[2]
    before = len(w.answers[2])
    for _ in range(10):
        w.step()
    assert len(w.answers[2]) == before + 10
    assert not w.answers[1]


def test_a_second_request_reuses_the_prompt_of_the_first_but_not_across_adapters() -> None:
    w = world()
    prompt = list(range(1, 30))
    w.add(sequence(1, prompt, weights="a"))
    w.run()
    w.add(sequence(2, prompt, weights="b"))
    w.run()
    assert w.hits == 0
    w.add(sequence(3, prompt, weights="a"))
    w.run()
    assert w.hits == 28
    check_answers(w, [sequence(i, prompt, weights=x) for i, x in ((1, "a"), (2, "b"), (3, "a"))])


def test_what_stands_before_an_activation_is_shared_with_the_base_and_others() -> None:
    """Blocks of four: an activation at 17 leaves four of the base's, one at 16 as many."""
    w = world()
    prompt = list(range(1, 30))
    asked = [
        (sequence(1, prompt), 0),
        (sequence(2, prompt, weights="a", activation=17), 16),
        (sequence(3, prompt, weights="b", activation=16), 16),
        (sequence(4, prompt, weights="a", activation=17), 28),
        (sequence(5, prompt, weights="a", activation=18), 16),  # the same tokens, later
        (sequence(6, prompt, weights="a"), 0),
        (sequence(7, prompt, weights="b", activation=3), 0),
        (sequence(8, prompt), 28),
    ]
    for s, expected_hits in asked:
        before = w.hits
        w.add(s)
        w.run()
        assert w.hits - before == expected_hits, s
    check_answers(w, [s for s, _ in asked])


def test_what_an_adapter_left_before_its_activation_is_the_bases_to_reuse() -> None:
    w = world()
    prompt = list(range(1, 30))
    sequences = [sequence(1, prompt, weights="a", activation=21), sequence(2, prompt)]
    for s in sequences:
        w.add(s)
        w.run()
    assert w.hits == 20
    check_answers(w, sequences)


def test_a_sequence_passes_its_activation_within_a_step() -> None:
    """One row for the base and one for the adapter, and no step more than anybody's."""
    w = world()
    w.tier.resident["a"] = 2
    w.add(sequence(1, list(range(1, 20)), weights="a", activation=13))
    plan, _ = w.scheduler.plan(w.tier.residency())
    rows = [(row.start, len(row.token_ids), row.slot, row.rank) for row in plan.rows]
    assert rows == [(0, 13, BASE_SLOT, 0), (13, 6, 2, 1)]
    assert [row.sample is None for row in plan.rows] == [True, False]


def test_prompt_logprobs_bypass_the_prefix_cache_and_name_every_target() -> None:
    w = world(step_tokens=8)
    prompt = list(range(1, 30))
    w.add(sequence(1, prompt))
    w.run()
    w.add(sequence(2, prompt, prompt_logprobs=True))
    targets: list[int] = []
    while w.has_work:
        plan, _ = w.scheduler.plan(Residency())
        targets += [t for row in plan.rows for t in row.targets]
        w.scheduler.commit(plan, w.runner.submit(plan))
    assert targets == prompt[1:]
    assert w.hits == 0


@pytest.mark.parametrize("depth", [0, 1])
def test_a_preempted_prompt_is_scored_once(depth: int) -> None:
    """Recomputing a prompt told its scores again, before a token in the middle of the answer."""
    w = world(num_blocks=12, rows=4, step_tokens=6, depth=depth)
    sequences = [
        sequence(i, [i + 1 + j for j in range(14)], 30, ignore_eos=True, prompt_logprobs=True)
        for i in range(4)
    ]
    for s in sequences:
        w.add(s)
    w.run()
    assert w.preemptions > 0
    check_answers(w, sequences)
    for s in sequences:
        assert w.scored[s.request_id] == s.tokens[1 : s.prompt_len]


def test_a_prompt_can_be_scored_without_generating() -> None:
    w = world(step_tokens=8)
    w.add(sequence(1, list(range(1, 30)), max_new_tokens=0, prompt_logprobs=True))
    w.run()
    assert w.answers[1] == []
    assert w.reasons[1] == "length"


@pytest.mark.parametrize("depth", [0, 1])
def test_a_sequence_that_outgrows_its_rotations_is_computed_anew_and_shares_no_short_kv(
    depth: int,
) -> None:
    w = world(depth=depth)
    first = sequence(1, list(range(1, 11)), 12, short_tokens=14, ignore_eos=True)
    w.add(first)
    w.run()
    again = sequence(2, first.tokens[:13], 1, short_tokens=14)
    longer = sequence(3, first.tokens, 2, short_tokens=14)
    w.add(again)
    w.add(longer)
    w.run()
    check_answers(w, [first, again, longer])
    assert [s.is_long for s in (first, again, longer)] == [True, False, True]
    assert (again.num_cached, longer.num_cached) == (12, 20)
    assert w.preemptions == 0


def test_a_sequence_that_ends_at_its_short_rotations_last_token_keeps_them() -> None:
    w = world()
    s = sequence(1, list(range(1, 11)), 5, short_tokens=14, ignore_eos=True)
    w.add(s)
    w.run()
    check_answers(w, [s])
    assert (len(s.tokens), s.is_long) == (15, False)


def test_too_few_blocks_preempt_the_latest_and_recompute_it_exactly() -> None:
    w = world(num_blocks=12, rows=4, step_tokens=16)
    sequences = [sequence(i, [i + 1] * 8, 30, ignore_eos=True) for i in range(4)]
    for s in sequences:
        w.add(s)
    w.run()
    assert w.preemptions > 0
    check_answers(w, sequences)


def test_admission_leaves_the_running_a_block_each() -> None:
    """The second prompt would just fit, and be thrown out as soon as the first one grows."""
    w = world(num_blocks=5, rows=2)
    sequences = [sequence(1, [7] * 4, 8, ignore_eos=True), sequence(2, [8] * 12, 8)]
    w.add(sequences[0])
    w.step()
    w.add(sequences[1])
    w.run()
    assert w.preemptions == 0
    check_answers(w, sequences)


def test_blocks_that_a_prefix_hit_takes_back_are_not_left_for_the_running() -> None:
    """Counted as free beside the sequence that takes them, they would be missed at once."""
    w = world(num_blocks=5, rows=2)
    sequences = [
        sequence(1, [7] * 8, 1, ignore_eos=True),
        sequence(2, [8] * 4, 8, ignore_eos=True),
        sequence(3, [7] * 12, 4, ignore_eos=True),
    ]
    w.add(sequences[0])
    w.run()
    w.add(sequences[1])
    w.step()
    w.step()
    w.add(sequences[2])
    w.run()
    assert w.preemptions == 0
    assert sequences[2].num_cached == 8
    check_answers(w, sequences)


def test_a_preempted_sequence_comes_back_before_those_who_came_later() -> None:
    w = world(num_blocks=12, rows=2)
    sequences = [sequence(i, [i + 1] * 16, 30, ignore_eos=True) for i in (0, 1)]
    for s in sequences:
        w.add(s)
    w.step()
    late = sequence(2, [3], 4, ignore_eos=True)
    w.add(late)
    while not w.preemptions:
        w.step()
    while sequences[1].lane == NO_LANE:
        assert not w.answers[2]
        w.step()
    w.run()
    check_answers(w, [*sequences, late])


def test_a_sequence_already_in_the_step_is_never_preempted_by_it() -> None:
    """A decode planned before a prompt's chunk kept its row while its blocks went to the chunk."""
    for num_blocks in range(9, 14):
        w = world(num_blocks=num_blocks, rows=3, step_tokens=10)
        sequences = [sequence(1, [7] * 24, 4), sequence(2, [8] * 3, 9, ignore_eos=True)]
        w.add(sequences[0])
        w.step()
        w.add(sequences[1])
        w.run()
        check_answers(w, sequences)


def test_a_request_that_can_never_fit_is_refused_at_once() -> None:
    w = world(num_blocks=4, block_size=4)
    with pytest.raises(ValueError, match="--kv-memory"):
        w.scheduler.add(sequence(1, [1] * 10, 8))


def test_with_one_slot_a_flood_of_one_adapter_does_not_starve_another() -> None:
    """Adapter a always has work; b waits, is passed over a bounded number of times, then runs."""
    w = world(rows=2, slots=1, max_overtakes=4)
    w.add(sequence(0, [1], 6, "a", ignore_eos=True))
    w.step()
    w.step()
    w.add(sequence(1, [2], 6, "b", ignore_eos=True))
    request_id = 2
    while not w.answers[1]:
        w.add(sequence(request_id, [3], 6, "a", ignore_eos=True))
        request_id += 1
        w.step()
        assert request_id < 100, "b starved"
    w.run()
    assert len(w.answers[1]) == 6


def test_a_resident_adapter_next_in_line_is_not_evicted_for_one_behind_it() -> None:
    w = world(rows=1, slots=1)
    w.add(sequence(0, [1], 2, "a"))
    w.run()
    w.add(sequence(1, [2], 6, ignore_eos=True))
    w.step()
    w.add(sequence(2, [3], 6, "a", ignore_eos=True))
    w.add(sequence(3, [4], 6, "b", ignore_eos=True))
    while not w.answers[2]:
        w.step()
        assert not w.answers[3]
    w.run()
    assert w.tier.loads == 2


def test_adapters_of_those_who_wait_are_loaded_together() -> None:
    w = world(rows=8, slots=8)
    sequences = [sequence(i, [i + 1], 4, f"adapter-{i}") for i in range(8)]
    for s in sequences:
        w.add(s)
    for _ in range(3):
        w.step()
    assert all(w.answers[s.request_id] for s in sequences)


def test_more_adapters_than_slots_are_all_served() -> None:
    w = world(rows=8, slots=2)
    sequences = [sequence(i, [i + 1] * 5, 6, f"adapter-{i}") for i in range(20)]
    for s in sequences:
        w.add(s)
    w.run()
    check_answers(w, sequences)


def test_a_cold_adapter_delays_only_its_own_requests() -> None:
    w = world(slots=0)
    w.tier = SimulatedTier(0)
    w.add(sequence(1, [1, 2], 4, "never"))
    w.add(sequence(2, [1, 2], 4, ignore_eos=True))
    for _ in range(8):
        w.step()
    assert len(w.answers[2]) == 4
    assert not w.answers[1]


def test_a_pipelined_plan_names_an_unseen_token_by_its_lane() -> None:
    w = world(depth=1)
    w.add(sequence(1, [1, 2, 3], 4, ignore_eos=True))
    w.step()
    w.step()
    plan, _ = w.in_flight[-1]
    assert list(plan.rows[0].token_ids) == [PENDING]
    w.run()
    check_answers(w, [sequence(1, [1, 2, 3], 4, ignore_eos=True)])


def test_the_row_after_the_end_is_never_streamed() -> None:
    w = world(depth=1)
    prompt = next(
        [p] for p in range(1, 50) if EOS in alone([p], Sampling(max_new_tokens=60, seed=0), "base")
    )
    w.add(sequence(1, prompt, 60))
    w.run()
    assert w.answers[1][-1] == EOS
    assert w.reasons[1] == "eos"
