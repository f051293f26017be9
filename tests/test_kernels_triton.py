"""Triton's SGMV: against the reference in the interpreter, and compiled for sm_80 and sm_90.

The interpreter is chosen when triton is imported, so each half runs in a process of its own: this
file, called with a mode, prints its findings as JSON. The whole matrix is in
test_kernels_matrix.py; here any two of workload, rows, rank, shape and dtype meet once.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import lory_kernels
from kernel_cases import TOLERANCE, WORKLOADS, SgmvCase, error_of, every_pair, sgmv_case
from lory_kernels import Ops, SiteTable
from lory_kernels.contract import Segments
from lory_kernels.sgmv_choice import RULES, cut_up
from triton_processes import (
    SHARED_MEMORY_LIMIT_BYTES,
    Built,
    Findings,
    answer,
    findings_of,
    launches_built,
    needs_triton,
)

pytestmark = needs_triton

DTYPES = {"float32": torch.float32, "float16": torch.float16}
COMPILED = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHAPES = {
    "slices": {"out_features": (40, 24)},
    "odd": {"in_features": 150, "out_features": (130, 7)},
}
RANKS = {str(rank): (rank,) for rank in (1, 3, 8, 16, 33, 64, 100, 256)} | {
    "mixed": (16, 1, 64, 3, 0, 8, 33)
}
SAMPLE = {
    "-".join(map(str, choice)): choice
    for choice in every_pair((WORKLOADS, (1, 7, 33), list(RANKS), list(SHAPES), list(DTYPES)))
}
LARGE = {
    "splits": ("zipf", 19, {"in_features": 1104, "out_features": (136, 8), "ranks": (16, 3)}),
    "splits_rank_100": ("skewed", 7, {"in_features": 576, "ranks": (100, 0, 33)}),
    "many_rows": ("uniform", 300, {"in_features": 520, "out_features": (40, 24)}),
    "many_rows_half_base": ("half_base", 300, {"ranks": (100, 8), "out_features": (136,)}),
    "thousands_of_rows": ("skewed", 4100, {"in_features": 40, "out_features": (24,)}),
}
BUCKETS = (16, 32, 64)
"""Largest ranks that are compiled apart; above 64 there are more programs of the same kind."""
SITES = ((1, 32), (3, 32), (3, 1))
"""(slices, alignment)."""
ROWS_OF_RULES = {2: (8, 1024, 8192), 4: (8, 1024)}
"""Rows that each rule takes, by bytes of an element."""
SAMPLE_COMPILED = (
    ("bfloat16", 8, 16, (3, 32)),
    ("bfloat16", 1024, 64, (3, 32)),
    ("bfloat16", 8192, 64, (3, 32)),
    ("bfloat16", 8, 64, (3, 1)),
    ("float32", 8, 64, (3, 32)),
)
"""(dtype, rows, largest rank, site) that every run compiles; `make test-full` compiles all. Sites
have tables of gains and biases, as those that are served."""


@pytest.fixture(scope="module")
def interpreted() -> Findings:
    return findings_of(__file__, "interpret")


@pytest.mark.parametrize("name", SAMPLE)
def test_sgmv_equals_the_reference(interpreted: Findings, name: str) -> None:
    assert interpreted["sample"][name] <= TOLERANCE[DTYPES[SAMPLE[name][-1]]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LARGE)
def test_every_regime_equals_the_reference(interpreted: Findings, name: str, dtype: str) -> None:
    """Fresh memory is NaN, as are the gaps of the pool and around rows of x and y."""
    assert interpreted["large"][f"{name}-{dtype}"] <= TOLERANCE[DTYPES[dtype]]


def test_tolerance_catches_one_swapped_adapter(interpreted: Findings) -> None:
    for key, error in interpreted["swapped"].items():
        assert error > 3 * TOLERANCE[DTYPES[key.split("-")[-1]]], key


def test_fresh_memory_was_poisoned(interpreted: Findings) -> None:
    assert interpreted["poisoned"] == {"empty": True}


def test_results_are_the_same_from_run_to_run(interpreted: Findings) -> None:
    assert set(interpreted["repeat"].values()) == {True}


def test_base_rows_keep_every_bit_and_are_not_read(interpreted: Findings) -> None:
    assert set(interpreted["base"].values()) == {True}


def test_a_table_of_fixed_size_may_be_nearly_empty(interpreted: Findings) -> None:
    """Segments with rows lie far apart among 700, so that a tile looks through three blocks."""
    assert interpreted["sparse"]["error"] <= TOLERANCE[torch.float32]


def test_what_is_not_served_is_refused_by_name(interpreted: Findings) -> None:
    refused = interpreted["refused"]
    assert "x_TH must have whole rows" in refused["columns"]
    assert "slots_G must be torch.int32, not torch.int64" in refused["slots"]
    assert "rank_SK must be torch.int32, not torch.int64" in refused["ranks"]
    assert "segments.max_rank: 257 is above 256" in refused["max_rank"]


@pytest.mark.parametrize(("dtype", "part"), [(torch.bfloat16, 2.0**-16), (torch.float16, 2.0**-22)])
def test_two_parts_of_16_bits_hold_what_the_header_says(dtype: torch.dtype, part: float) -> None:
    """The arithmetic of the expand, which the interpreter cannot do in bfloat16."""
    h = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    near = h.to(dtype)
    rest = (h - near.float()).to(dtype)
    left_out = (h.double() - near.double() - rest.double()).abs()
    floor = 2.0**-25 if dtype == torch.float16 else 0.0
    assert (left_out <= (part * h.double().abs()).clamp_min(floor)).all()
    one_part = (h.double() - near.double()).abs() / h.double().abs()
    assert float(one_part.max()) > 100 * part


def test_kernels_compile_for_gpus_fit_and_do_not_spill() -> None:
    _check_built(findings_of(__file__, "compile"), len(SAMPLE_COMPILED))


@pytest.mark.full
@pytest.mark.parametrize("dtype", COMPILED)
def test_every_configuration_compiles(dtype: str) -> None:
    cases = len(BUCKETS) * len(ROWS_OF_RULES[COMPILED[dtype].itemsize]) * len(SITES)
    _check_built(findings_of(__file__, f"compile_{dtype}"), cases)


def _check_built(found: Findings, cases: int) -> None:
    """float32 is multiplied exactly, others by tensor cores. The sums of the shrink are registers
    when the expand multiplies them: it never goes on before a product is done, see EXPAND_STAGES.
    Where sites are aligned, no factor or row comes in pieces of 2 bytes; copies have 8 or 16.
    """
    assert len(found["built"]) == 2 * cases * len(SHARED_MEMORY_LIMIT_BYTES)
    for name, built in found["built"].items():
        arch = int(name.split("-")[0].removeprefix("sm_"))
        assert built["spilled_bytes"] == 0, name
        assert built["shared_bytes"] <= SHARED_MEMORY_LIMIT_BYTES[arch], name
        assert built["uses_tensor_cores"] == ("float32" not in name), name
        assert not (built["multiplies_registers"] and built["runs_ahead"]), name
        if not name.endswith("-1"):
            assert built["narrow"] == 0, name
            assert {"0x8", "0x10"}.issuperset(built["copies"]), name


def test_steps_of_other_sizes_compile_nothing_new() -> None:
    """Rows, segments, ranks of one bucket, offsets of tables: none is part of what is compiled."""
    found = findings_of(__file__, "compile_steps")["steps"]
    assert found == {"decode": 2, "prefill": 2, "decode_then_prefill": "compiled again"}


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pool_may_have_more_elements_than_32_bits_count(dtype: str) -> None:
    found = findings_of(__file__, "interpret_far")["far"]
    assert found[f"torch-{dtype}"] == 0.0
    assert found[f"triton-{dtype}"] <= TOLERANCE[DTYPES[dtype]]


def _interpret() -> Findings:
    torch.use_deterministic_algorithms(True)  # fills what torch.empty makes with NaN
    reference, ops = lory_kernels.select("torch"), lory_kernels.select("triton")
    found: Findings = {"poisoned": {"empty": bool(torch.empty(3).isnan().all())}, "sample": {}}
    for name, (workload, rows, rank, shape, dtype) in SAMPLE.items():
        case = sgmv_case(workload, rows, DTYPES[dtype], ranks=RANKS[rank], **SHAPES[shape])
        found["sample"][name] = error_of(case.run_apart(ops), case.run(reference))
    for name, dtype in DTYPES.items():
        for subject, values in _interpret_large(ops, reference, dtype).items():
            kept = {f"{key}-{name}": value for key, value in values.items()}
            found.setdefault(subject, {}).update(kept)
    found["sparse"] = {"error": _sparse_error(ops, reference)}
    found["refused"] = dict(_refusals(ops))
    return found


def _interpret_large(ops: Ops, reference: Ops, dtype: torch.dtype) -> Findings:
    found: Findings = {"large": {}, "swapped": {}, "repeat": {}, "base": {}}
    for key, (workload, rows, shape) in LARGE.items():
        case = sgmv_case(workload, rows, dtype, **shape)
        actual, expected = case.run_apart(ops), case.run(reference)
        found["large"][key] = error_of(actual, expected)
        if key in ("splits", "many_rows"):
            found["swapped"][key] = error_of(actual, _swapped(case).run(reference))
            found["repeat"][key] = torch.equal(actual, case.run_apart(ops))
    half = sgmv_case("half_base", 33, dtype)
    half.x_TH[:16] = float("nan")
    actual = half.run(ops)
    found["base"]["equal"] = torch.equal(actual[:16], half.y_TN[:16])
    found["base"]["finite"] = bool(actual.isfinite().all())
    return found


def _swapped(case: SgmvCase) -> SgmvCase:
    """The second and third segments with each other's adapters."""
    slots_G = case.segments.slots_G.clone()
    slots_G[[2, 3]] = slots_G[[3, 2]]
    return replace(case, segments=replace(case.segments, slots_G=slots_G))


def _sparse_error(ops: Ops, reference: Ops) -> float:
    case = sgmv_case("uniform", 20, torch.float32, ranks=(8, 3))
    own, total = case.segments, 700
    places = torch.tensor([3, 250, 256, 257, 600, 699])[: own.num_segments]
    counts, slots_G = torch.zeros(total).int(), torch.full((total,), 1).int()
    counts[places], slots_G[places] = own.starts_G1.diff(), own.slots_G
    starts_G1 = torch.cat((torch.zeros(1), counts.cumsum(0))).int()
    segments = replace(own, starts_G1=starts_G1, slots_G=slots_G, num_segments=total)
    return error_of(replace(case, segments=segments).run(ops), case.run(reference))


def _refusals(ops: Ops) -> Iterator[tuple[str, str]]:
    case = sgmv_case("distinct", 4, torch.float32)
    segments = case.segments
    wrong = {
        "columns": replace(case, x_TH=case.x_TH.T.contiguous().T),
        "slots": replace(case, segments=replace(segments, slots_G=segments.slots_G.long())),
        "ranks": replace(case, site=replace(case.site, rank_SK=case.site.rank_SK.long())),
        "max_rank": replace(case, segments=replace(segments, max_rank=257)),
    }
    for name, each in wrong.items():
        with pytest.raises(ValueError, match=r"\w+") as refusal:
            each.run(ops)
        yield name, str(refusal.value)


def _interpret_far() -> Findings:
    """Adapters behind 2^31 elements, which take memory only where they are touched."""
    found: Findings = {"far": {}}
    for name, dtype in DTYPES.items():
        near = sgmv_case("distinct", 3, dtype, ranks=(8, 3))
        away = 2**31 + 8
        pool = torch.empty(away + near.pool.numel(), dtype=dtype)
        pool[away:] = near.pool
        site = replace(
            near.site,
            a_offset_SK=near.site.a_offset_SK + away,
            b_offset_SK=near.site.b_offset_SK + away,
        )
        far = replace(near, pool=pool, site=site)
        expected = near.run(lory_kernels.select("torch"))
        for backend in ("torch", "triton"):
            ops = lory_kernels.select(backend)
            found["far"][f"{backend}-{name}"] = error_of(far.run(ops), expected)
    return found


def launch(
    dtype: torch.dtype,
    rows: int,
    num_segments: int,
    max_rank: int,
    slices: int,
    *,
    misaligned: int = 0,
    alignment: int = 32,
    has_outputs: bool = False,
    has_gain_or_bias: bool = True,
) -> Callable[[], None]:
    """A call of the kernels by sizes alone; its tables begin `misaligned` elements later."""
    from lory_kernels.triton_sgmv import sgmv

    def table(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(1024, dtype=dtype)[misaligned:][: torch.Size(shape).numel()].view(shape)

    site = SiteTable(
        256, tuple(256 * k for k in range(slices)), (256,) * slices, table(torch.int64, 4, slices),
        table(torch.int64, 4, slices), table(torch.int32, 4, slices),
        table(torch.float32, 4, slices), alignment,
        gain_offset_SK=table(torch.int64, 4, slices) if has_outputs else None,
        bias_offset_SK=table(torch.int64, 4, slices) if has_outputs else None,
    )  # fmt: skip
    segments = Segments(
        table(torch.int32, num_segments + 1), table(torch.int32, num_segments), rows, num_segments,
        max_rank, rows, has_gain_or_bias,
    )  # fmt: skip
    x_TH, y_TN = torch.empty(rows, 256, dtype=dtype), torch.empty(rows, 256 * slices, dtype=dtype)
    columns_2K = table(torch.int64, 2, slices)
    return lambda: sgmv(y_TN, x_TH, site, torch.empty(64, dtype=dtype), segments, columns_2K)


def _compiled(cases: Iterable[tuple[str, int, int, tuple[int, int]]]) -> Findings:
    found: Findings = {"built": {}}
    for dtype, rows, max_rank, (slices, alignment) in cases:
        call = launch(
            COMPILED[dtype], rows, 2, max_rank, slices, alignment=alignment, has_outputs=True
        )
        for arch in SHARED_MEMORY_LIMIT_BYTES:
            for kernel, facts in launches_built(call, arch).items():
                key = f"sm_{arch}-{kernel}-{dtype}-{rows}-{max_rank}-{slices}-{alignment}"
                found["built"][key] = _facts(facts)
    return found


def _facts(built: Built) -> dict[str, Any]:
    waits = re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", built.ptx)
    products = re.findall(r"wgmma\.mma_async\S+\s+\{[^}]*\},\s*(\S)", built.ptx)
    sizes = {key: value for key, value in asdict(built).items() if key != "ptx"}
    return sizes | {
        "uses_tensor_cores": bool(products) or "mma.sync" in built.ptx,
        "multiplies_registers": "{" in products,
        "narrow": len(re.findall(r"(?:ld|st)\.global\S*\.b16 ", built.ptx)),
        "copies": re.findall(r"cp\.async\.c[ag]\.shared\S*.*?, (0x\w+)[,;]", built.ptx),
        "runs_ahead": any(int(left) > 0 for left in waits),
    }


def _compile() -> Findings:
    return _compiled(SAMPLE_COMPILED)


def _compile_all(dtype: str) -> Findings:
    rows = ROWS_OF_RULES[COMPILED[dtype].itemsize]
    sizes = itertools.product(rows, BUCKETS, SITES)
    return _compiled((dtype, num_rows, rank, site) for num_rows, rank, site in sizes)


def _compile_steps() -> Findings:
    """A kernel that compiled again for a later step is an AssertionError of `launches_built`."""
    decode = [(1, 1, 9), (3, 3, 16), (32, 17, 12), (255, 512, 10), (256, 256, 16), (200, 1, 11)]
    prefill = [(257, 1, 9), (1024, 3, 16), (4095, 32, 10), (4096, 256, 16)]
    assert {cut_up(2, True, *step, 256, 3).rule for step in decode} == {RULES[2][0]}
    assert {cut_up(2, True, *step, 256, 3).rule for step in prefill} == {RULES[2][1]}

    def compiled(steps: list[tuple[int, int, int]]) -> int | str:
        calls = [
            launch(torch.bfloat16, *step, slices=3, misaligned=place % 2)
            for place, step in enumerate(steps)
        ]
        try:
            return len(launches_built(lambda: [call() for call in calls], 90))
        except AssertionError:
            return "compiled again"

    return {
        "steps": {
            "decode": compiled(decode),
            "prefill": compiled(prefill),
            "decode_then_prefill": compiled(decode[:1] + prefill[:1]),
        }
    }


MODES: dict[str, Callable[[], Findings]] = {
    "interpret": _interpret,
    "interpret_far": _interpret_far,
    "compile": _compile,
    "compile_steps": _compile_steps,
}

if __name__ == "__main__":
    every = {f"compile_{dtype}": (lambda dtype=dtype: _compile_all(dtype)) for dtype in COMPILED}
    answer(MODES | every)
