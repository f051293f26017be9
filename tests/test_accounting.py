"""Charges: they sum to the step, follow the work, and depend on nothing else."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lory_server.accounting import NO_WORK, AdapterWork, CostModel, Share, charge, row_share
from lory_server.messages import Sampling, Submit
from lory_server.plan import BASE_SLOT, PlanRow, SampleRow


def share(work: float, request_id: int = 0) -> Share:
    return Share(request_id, "tenant", "adapter", work, 1, 0)


@given(
    wall=st.floats(0, 1e4),
    works=st.lists(st.floats(1e-6, 1e9), min_size=1, max_size=64),
)
def test_charges_sum_to_the_step(wall: float, works: list[float]) -> None:
    charges = charge(wall, [share(work) for work in works])
    assert math.isclose(math.fsum(c.seconds for c in charges), wall, rel_tol=1e-9, abs_tol=1e-12)
    assert all(c.seconds >= 0 for c in charges)


def test_nothing_of_a_step_is_lost_to_rounding() -> None:
    """Ten tenths of a second added up are less than one."""
    assert sum(one.seconds for one in charge(1.0, [share(1.0)] * 10)) == 1.0


def test_a_row_pays_in_proportion_to_its_work() -> None:
    first, second = charge(4.0, [share(1.0), share(3.0)])
    assert (first.seconds, second.seconds) == (1.0, 3.0)


def test_context_and_rank_make_a_token_dearer() -> None:
    model = CostModel.of(base_params=1_000_000, num_layers=4, query_width=128)
    base = model.work(0, 1, 0)
    assert model.work(1000, 1, 0) > base
    assert model.work(0, 1, 100_000) == pytest.approx(base + 0.1)
    assert model.work(int(model.balance_context) - 1, 1, 0) == pytest.approx(2, rel=1e-3)


def test_a_prompt_costs_the_same_in_one_chunk_or_many() -> None:
    model = CostModel.of(1_000_000, 4, 128)
    whole = model.work(0, 100, 5000)
    parts = sum(model.work(start, 10, 5000) for start in range(0, 100, 10))
    assert parts == pytest.approx(whole)


def test_a_row_that_the_base_computes_costs_what_the_bases_does() -> None:
    """An adapter that waits for its invocation has done nothing for it yet."""
    model = CostModel.of(1_000_000, 4, 128)
    command = Submit(
        request_id=1,
        prompt_ids=(5,) * 20,
        sampling=Sampling(max_new_tokens=4, seed=0),
        adapter_id="a",
        tenant="t",
    )

    def row(start: int, num_tokens: int, slot: int) -> PlanRow:
        return PlanRow(1, 0, start, [5] * num_tokens, [0], slot, sample=None)

    adapter = AdapterWork(200_000)
    before = row_share(command, row(4, 8, BASE_SLOT), adapter, model)
    acting = row_share(command, row(4, 8, 0), adapter, model)
    assert before.work == model.work(4, 8, 0)
    assert acting.work == model.work(4, 8, 200_000) > before.work
    assert before.prompt_tokens == 8
    assert row_share(command, row(18, 4, 0), NO_WORK, model).prompt_tokens == 2
    assert (before.adapter_id, before.tenant) == ("a", "t")


def test_a_head_of_its_own_is_paid_for_by_the_rows_that_have_logits() -> None:
    """It is read and multiplied beside the base's: for a token sampled and for one scored, and
    neither for the rest of a prompt nor for the base's rows."""
    model = CostModel.of(1_000_000, 4, 128)
    command = Submit(
        request_id=1, prompt_ids=(5,) * 20, sampling=Sampling(max_new_tokens=4, seed=0)
    )
    sample = SampleRow(command.sampling, position=9)

    def work(adapter: AdapterWork, slot: int = 0, **fields: Any) -> float:
        row = PlanRow(1, 0, 4, [5] * 5, [0], slot, **{"sample": None, **fields})
        return row_share(command, row, adapter, model).work

    plain, headed = AdapterWork(2_000), AdapterWork(2_000, head_params=250_000)
    assert work(headed) == work(plain)
    assert work(headed, sample=sample) == pytest.approx(work(plain, sample=sample) + 0.25)
    assert work(headed, targets=[5, 5, 5]) == pytest.approx(work(plain) + 0.75)
    assert work(headed, slot=BASE_SLOT, sample=sample) == work(plain, slot=BASE_SLOT, sample=sample)
