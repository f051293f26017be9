"""Packing: rows of one adapter side by side, and every index right."""

import numpy as np

from lory_server.messages import Sampling
from lory_server.model.packing import PackedSegments, Packer
from lory_server.plan import PENDING, PlanRow, SampleRow, StepPlan

SAMPLE = SampleRow(Sampling(max_new_tokens=1, seed=0), 0)


def plan_row(lane: int, start: int, token_ids: list[int], blocks: list[int], slot: int, **more):
    return PlanRow(lane, lane, start, token_ids, blocks, slot, **{"sample": SAMPLE, **more})


def test_a_mixed_step_is_laid_out_by_adapter() -> None:
    rows = (
        plan_row(0, 5, [PENDING], [3, 7], 2),
        plan_row(1, 0, [11, 12, 13], [1], -1, sample=None, targets=[12, 13]),
        plan_row(2, 4, [21, 22], [4, 5], 0),
        plan_row(3, 9, [31], [6, 8, 9], 2),
    )
    packed = Packer(num_lanes=4, max_blocks=4, block_size=4).pack(StepPlan(0, rows))
    assert packed.order == (1, 2, 0, 3)
    assert packed.token_ids_T.tolist() == [11, 12, 13, 21, 22, 0, 31]
    assert packed.positions_T.tolist() == [0, 1, 2, 4, 5, 5, 9]
    assert packed.kv_slots_T.tolist() == [4, 5, 6, 20, 21, 29, 37]
    assert packed.query_starts_R1.tolist() == [0, 3, 5, 6, 7]
    assert packed.context_lens_R.tolist() == [3, 6, 6, 10]
    assert packed.block_tables_RM[3].tolist() == [6, 8, 9]
    assert (packed.pending_P.tolist(), packed.pending_lanes_P.tolist()) == ([5], [0])
    assert packed.sampled_lanes_S.tolist() == [2, 0, 3]
    assert packed.logit_rows_L.tolist() == [4, 5, 6, 0, 1]
    assert packed.segments is not None
    assert packed.segments.starts_G1.tolist() == [0, 3, 5, 7]
    assert packed.segments.slots_G.tolist() == [-1, 0, 2]
    assert packed.segments.adapted_tokens == 4


def test_a_step_has_gains_or_biases_if_an_adapter_of_any_row_does() -> None:
    def segments(*flags: bool) -> PackedSegments:
        rows = [plan_row(i, 0, [1], [0], i, has_gain_or_bias=flag) for i, flag in enumerate(flags)]
        packed = Packer(3, 1, 4).pack(StepPlan(0, (*rows, plan_row(2, 0, [1], [0], -1))))
        assert packed.segments is not None
        return packed.segments

    assert not segments(False, False).has_gain_or_bias
    assert segments(False, True).has_gain_or_bias
    assert segments(True, False).has_gain_or_bias


def test_a_step_of_base_rows_has_no_segments() -> None:
    packed = Packer(1, 1, 4).pack(StepPlan(0, (plan_row(0, 0, [1, 2], [0], -1),)))
    assert packed.segments is None


def test_tables_follow_a_lane_that_changes_hands_and_a_sequence_that_grows() -> None:
    packer, blocks = Packer(1, 4, 4), [5]
    packer.pack(StepPlan(0, (plan_row(0, 0, [1], blocks, -1),)))
    blocks.append(6)
    grown = packer.pack(StepPlan(1, (plan_row(0, 4, [1], blocks, -1),)))
    assert grown.block_tables_RM.tolist() == [[5, 6]]
    other = packer.pack(StepPlan(2, (plan_row(0, 4, [1], [2, 3], -1),)))
    assert other.block_tables_RM.tolist() == [[2, 3]]
    assert np.array_equal(other.kv_slots_T, [12])
