"""SGMV where adapters have gains and biases: every backend against plain sums in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernel_cases import (
    TOLERANCE,
    SgmvCase,
    assert_close,
    error_of,
    sgmv_case,
    with_outputs,
)
from lory_kernels import BASE_SLOT, Ops, best_cpu_backend, select

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("torch", "cpu-1", "cpu-2")
WORKLOADS = ("distinct", "identical", "zipf", "half_base")


@pytest.fixture(scope="module", params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> Ops:
    if request.param == "torch":
        return select("torch")
    if best_cpu_backend() == "torch":
        pytest.skip("no C compiler here: the CPU kernels are not built")
    return select("cpu", threads=int(request.param[-1]))


def vector_of(case: SgmvCase, offset_SK: Tensor | None, slot: int, k: int) -> Tensor | None:
    assert offset_SK is not None
    offset, width = int(offset_SK[slot, k]), case.site.out_features[k]
    if offset < 0:
        return None
    return case.pool[offset:].view(torch.float32)[:width].double()


def expected(case: SgmvCase) -> Tensor:
    """gain * y + scale * (x @ A.T) @ B + bias, in float64, row by row; rounded once."""
    site, pool, segments = case.site, case.pool.double(), case.segments
    y_TN, x_TH = case.y_TN.double(), case.x_TH.double()
    starts = segments.starts_G1.tolist()
    for segment, slot in enumerate(segments.slots_G.tolist()):
        if slot == BASE_SLOT:
            continue
        rows = slice(starts[segment], starts[segment + 1])
        for k, (first, width) in enumerate(zip(site.out_offsets, site.out_features, strict=True)):
            rank, a, b = (
                int(table[slot, k]) for table in (site.rank_SK, site.a_offset_SK, site.b_offset_SK)
            )
            a_RH = pool[a : a + rank * site.in_features].view(rank, site.in_features)
            b_RN = pool[b : b + rank * width].view(rank, width)
            gain_N = vector_of(case, site.gain_offset_SK, slot, k)
            bias_N = vector_of(case, site.bias_offset_SK, slot, k)
            part_TN = y_TN[rows, first : first + width]
            part_TN *= 1 if gain_N is None else gain_N
            part_TN += 0 if bias_N is None else bias_N
            if rank:
                part_TN += site.scale_SK[slot, k].double() * (x_TH[rows] @ a_RH.T) @ b_RN
    return y_TN.to(case.y_TN.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(64, 32, 32), (5, 1, 61), (4864,), (70,)])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_gains_and_biases(
    ops: Ops, workload: str, widths: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Slices of rank 0 among them, which have a gain or a bias alone, or nothing."""
    for rows, ranks in ((1, (3, 0)), (7, (0, 16, 1)), (33, (8, 0, 33)), (33, (0,))):
        case = sgmv_case(workload, rows, dtype, out_features=widths, ranks=ranks, in_features=37)
        case = with_outputs(case)
        assert_close(case.run(ops), expected(case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["gain_offset_SK", "bias_offset_SK"])
def test_tolerance_catches_two_swapped_gains_or_biases(
    ops: Ops, which: str, dtype: torch.dtype
) -> None:
    case = with_outputs(sgmv_case("distinct", 33, dtype, ranks=(8, 0)), ("both",))
    swapped = getattr(case.site, which).clone()
    swapped[[5, 6]] = swapped[[6, 5]]
    wrong = replace(case, site=replace(case.site, **{which: swapped}))
    assert error_of(wrong.run(ops), expected(case)) > 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gain_close_to_one_counts_in_16_bits(ops: Ops, dtype: torch.dtype) -> None:
    """bfloat16's next number after 1 is 1.0078."""
    case = with_outputs(sgmv_case("identical", 7, dtype, ranks=(0,)), ("gain",))
    gain_N = torch.full((64,), 1.005)
    offset = int(case.site.gain_offset_SK[int(case.segments.slots_G[1]), 0])  # pyright: ignore
    case.pool[offset : offset + 64 * 4 // dtype.itemsize] = gain_N.view(dtype)
    case.y_TN[:, :64] = 100.0
    assert torch.equal(case.run(ops)[:, :64], torch.full((7, 64), 100.5).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_base_rows_keep_every_bit(ops: Ops, dtype: torch.dtype) -> None:
    case = with_outputs(sgmv_case("half_base", 133, dtype, ranks=(8, 0, 0)), ("both",))
    actual_TN = case.run(ops)
    assert torch.equal(actual_TN[:66], case.y_TN[:66])
    assert not (actual_TN[66:] == case.y_TN[66:]).any(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_tables_are_not_read_where_nobody_is_said_to_have_a_gain_or_a_bias(
    ops: Ops, dtype: torch.dtype
) -> None:
    plain = sgmv_case("zipf", 33, dtype, ranks=(8, 3))
    for kinds, has_any in (("none",), True), (("both",), False):
        case = with_outputs(plain, kinds)
        case = replace(case, segments=replace(case.segments, has_gain_or_bias=has_any))
        assert torch.equal(case.run(ops), plain.run(ops))


def test_a_step_of_biases_alone_is_computed_and_one_of_nothing_is_not(ops: Ops) -> None:
    case = with_outputs(sgmv_case("identical", 3, torch.float32, ranks=(0,)), ("bias",))
    assert_close(case.run(ops), expected(case))
    idle = replace(case.segments, has_gain_or_bias=False)
    assert not idle.changes_rows
    assert torch.equal(replace(case, segments=idle).run(ops), case.y_TN)


def test_a_step_said_to_change_no_rows_changes_none(ops: Ops) -> None:
    """On every backend: the reference once hid that a step had been given no rank."""
    case = sgmv_case("identical", 3, torch.float32)
    idle = replace(case.segments, max_rank=0, has_gain_or_bias=False)
    assert torch.equal(replace(case, segments=idle).run(ops), case.y_TN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_alone_and_among_others(dtype: torch.dtype) -> None:
    if best_cpu_backend() == "torch":
        pytest.skip("no C compiler here: the CPU kernels are not built")
    ops = select("cpu", threads=1)
    case = with_outputs(sgmv_case("distinct", 33, dtype, ranks=(16, 1, 0, 8)))
    together_TN = case.run(ops)
    for row in (0, 17, 32):
        alone = replace(
            case.segments,
            starts_G1=torch.tensor([0, 1]).int(),
            slots_G=case.segments.slots_G[row + 1 : row + 2],
            num_rows=1,
            num_segments=1,
            adapted_rows=1,
        )
        y_TN = case.y_TN[row : row + 1].clone()
        ops.sgmv(y_TN, case.x_TH[row : row + 1], case.site, case.pool, alone)
        assert torch.equal(y_TN[0], together_TN[row])
