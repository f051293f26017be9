"""The memory plan: parts fill the whole, or the refusal names the flag to change."""

from dataclasses import replace

import pytest

from lory_server.memory_plan import MemoryNeeds, MemoryPlanError, plan_memory

MIB = 1 << 20

NEEDS = MemoryNeeds(
    device_bytes=1000 * MIB,
    weight_bytes=300 * MIB,
    workspace_bytes=100 * MIB,
    block_bytes=MIB,
    block_size=16,
    max_batch_rows=64,
    max_model_len=4096,
)


def test_the_parts_fill_the_device() -> None:
    plan = plan_memory(NEEDS)
    assert sum(num_bytes for _, num_bytes in plan.table()) == NEEDS.device_bytes
    assert plan.adapter_pool_bytes == 150 * MIB
    assert plan.num_blocks == 450


def test_captured_steps_have_a_line_of_their_own() -> None:
    plan, without = plan_memory(replace(NEEDS, graph_bytes=40 * MIB)), plan_memory(NEEDS)
    assert dict(plan.table())["CUDA graphs"] == 40 * MIB
    assert sum(num_bytes for _, num_bytes in plan.table()) == NEEDS.device_bytes
    assert plan.num_blocks < without.num_blocks
    assert "CUDA graphs" not in dict(without.table())


def test_captured_steps_that_do_not_fit_are_named() -> None:
    with pytest.raises(MemoryPlanError, match="CUDA graphs 700 MiB"):
        plan_memory(replace(NEEDS, graph_bytes=700 * MIB))


def test_a_small_machine_gets_a_smaller_pool_not_a_refusal() -> None:
    capped = replace(NEEDS, adapter_pool_cap_bytes=50 * MIB)
    assert plan_memory(capped).adapter_pool_bytes == 50 * MIB
    small = replace(capped, device_bytes=440 * MIB)
    assert plan_memory(small).adapter_pool_bytes == 10 * MIB


def test_a_base_without_adapters_reserves_no_pool() -> None:
    assert plan_memory(replace(NEEDS, serves_adapters=False)).adapter_pool_bytes == 0


def test_full_weights_have_a_line_of_their_own_and_leave_the_rest_to_the_cache() -> None:
    plan = plan_memory(replace(NEEDS, end_bytes=10 * MIB))
    assert dict(plan.table())["full weights"] == 40 * MIB
    assert sum(num_bytes for _, num_bytes in plan.table()) == NEEDS.device_bytes
    assert plan.num_blocks == 410
    large = plan_memory(replace(NEEDS, end_bytes=500 * MIB))
    assert large.full_weight_bytes == 450 * MIB // 8
    asked = plan_memory(replace(NEEDS, end_bytes=500 * MIB, full_weight_bytes=100 * MIB))
    assert asked.full_weight_bytes == 100 * MIB
    base = replace(NEEDS, end_bytes=MIB, full_weight_bytes=100 * MIB, serves_adapters=False)
    assert plan_memory(base).full_weight_bytes == 0


def test_full_weights_that_leave_nothing_are_named() -> None:
    with pytest.raises(MemoryPlanError, match="--full-weights-memory"):
        plan_memory(replace(NEEDS, full_weight_bytes=500 * MIB))


def test_derived_full_weights_leave_the_cache_what_was_asked_for_it() -> None:
    asked = replace(NEEDS, end_bytes=500 * MIB, adapter_pool_bytes=100 * MIB, kv_bytes=500 * MIB)
    assert plan_memory(asked).full_weight_bytes == 0


def test_the_context_is_lowered_to_what_the_blocks_hold() -> None:
    plan = plan_memory(replace(NEEDS, kv_bytes=10 * MIB))
    assert plan.num_blocks == 10
    assert plan.max_model_len == 160


def test_no_more_blocks_than_the_largest_batch_can_use() -> None:
    plan = plan_memory(replace(NEEDS, max_batch_rows=1, max_model_len=32))
    assert plan.num_blocks == 2
    assert plan.unused_bytes == 448 * MIB


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"weight_bytes": 950 * MIB}, "--memory"),
        ({"adapter_pool_bytes": 600 * MIB}, "--adapter-memory"),
        ({"kv_bytes": 500 * MIB}, "--kv-memory"),
        ({"kv_bytes": 1}, "--kv-memory"),
        ({"kv_bytes": 10 * MIB, "asked_model_len": 161}, "--max-model-len 161 .* 160 tokens"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_fix(changes: dict[str, int], flag: str) -> None:
    with pytest.raises(MemoryPlanError, match=flag):
        plan_memory(replace(NEEDS, **changes))
