"""The whole matrix of SGMV against float64: plain PyTorch, the CPU kernels as each kind of CPU gets
them, and Triton in its interpreter.

Each test is a piece of minutes on one core. `make test-full` keeps their figures
in benchmarks/results.
"""

import itertools
from collections.abc import Callable, Mapping
from ctypes import CDLL
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kernel_cases import TOLERANCE
from lory_kernels import Ops, best_cpu_backend, build, select
from sgmv_matrix import (
    DTYPES,
    PROPERTY,
    ROWS,
    SHAPES,
    Choice,
    every_choice,
    summary,
    tallies,
)
from triton_processes import Findings, answer, findings_of, needs_triton

MARCHES = {"plain": "x86-64", "avx2": "x86-64-v3", "avx512": "skylake-avx512", "native": "native"}
HAS_AVX512 = " avx512vl" in Path("/proc/cpuinfo").read_text()
TRITON_DTYPES = ("float32", "float16")
"""The interpreter's own; bfloat16 it computes wrongly."""
NARROW = [shape for shape, (of, to) in SHAPES.items() if max(of, *to) <= 960]
"""Shapes of which the interpreter takes 512 rows."""
PIECES = {
    f"interpret {dtype} {shape} {part}": (dtype, shape, part)
    for dtype, shape, part in itertools.product(TRITON_DTYPES, SHAPES, ("to 33", "133", "512"))
    if part != "512" or shape in NARROW
}
"""Dtype, shape and rows of what one process interprets."""

Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CDLL]:
    """The C kernels as CPUs of each kind compile them."""
    if best_cpu_backend() == "torch":
        pytest.skip("no C compiler here: the CPU kernels are not built")
    found = {}
    for name, march in MARCHES.items():
        if name == "avx512" and not HAS_AVX512:
            continue
        with pytest.MonkeyPatch.context() as patch:
            own = "-march=native"
            flags = tuple(f"-march={march}" if flag == own else flag for flag in build._FLAGS)
            patch.setattr(build, "_FLAGS", flags)
            found[name] = build.load_library(tmp_path_factory.mktemp(name))
        lanes = {"plain": 4, "avx2": 8, "avx512": 16}.get(name)
        assert lanes in (None, found[name].lory_vector_lanes())
    return found


def _cpu_ops(library: CDLL) -> Ops:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lory_kernels.cpu.compiled_library", lambda: library)
        return select("cpu", threads=1)


def _check(dtype: str, found: Mapping[str, Mapping[str, Any]], cells: int) -> None:
    tolerance = TOLERANCE[DTYPES[dtype]]
    for name, tally in found.items():
        assert tally["cells"] == cells, name
        assert tally["largest_error"] <= tolerance, name
        assert tally["smallest_swapped_error"] > 3 * tolerance, name
        assert tally["changed_base_rows"] == 0, name
        assert tally["unequal_repeats"] == 0, name


@pytest.mark.full
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_cell_on_the_cpu(
    libraries: dict[str, CDLL], dtype: str, shape: str, record_property: Record
) -> None:
    """The C kernels have no float16: there they are plain PyTorch."""
    backends: dict[str, Ops] = {"torch": select("torch")}
    if dtype != "float16":
        backends |= {f"cpu {name}": _cpu_ops(library) for name, library in libraries.items()}
    found = tallies(backends, DTYPES[dtype], shape, every_choice(), ROWS)
    told = {name: tally.as_json() for name, tally in found.items()}
    piece = {"piece": f"cpu {dtype} {shape}", "dtype": dtype, "backends": told}
    record_property(PROPERTY, piece)
    _check(dtype, told, cells=len(every_choice()))


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("piece", [pytest.param(name, marks=needs_triton) for name in PIECES])
def test_cells_in_tritons_interpreter(piece: str, record_property: Record) -> None:
    told = findings_of(__file__, piece)
    dtype = PIECES[piece][0]
    record_property(PROPERTY, {"piece": piece, "dtype": dtype, "backends": told})
    _check(dtype, told, cells=len(interpreted_choices(*PIECES[piece])))


def test_the_interpreter_meets_every_workload_at_every_number_of_rows_and_rank() -> None:
    """Each once, in one shape and dtype, which take turns so that any two values meet as well."""
    cells = [
        (dtype, shape, *choice)
        for dtype, shape, part in PIECES.values()
        for choice in interpreted_choices(dtype, shape, part)
    ]
    assert sorted(cell[2:] for cell in cells) == sorted(every_choice())
    too_wide = {(shape, 512) for shape in SHAPES if shape not in NARROW}
    for pair in itertools.combinations(zip(*cells, strict=True), 2):
        met = set(zip(*pair, strict=True))
        assert met | too_wide >= set(itertools.product(*map(set, pair)))
        assert not met & too_wide


def interpreted_choices(dtype: str, shape: str, part: str) -> list[Choice]:
    """Of the whole matrix, an hour and a half of the interpreter, an eighth: every choice in turn
    in one of all dtypes and shapes, or of the narrow ones."""
    shapes = NARROW if part == "512" else list(SHAPES)
    places = list(itertools.product(TRITON_DTYPES, shapes))
    return [
        choice
        for turn, choice in enumerate(every_choice())
        if _part_of(choice) == part and places[turn % len(places)] == (dtype, shape)
    ]


def _part_of(choice: Choice) -> str:
    return "to 33" if choice[1] <= 33 else str(choice[1])


def _interpret(dtype: str, shape: str, part: str) -> Findings:
    torch.use_deterministic_algorithms(True)  # fills what torch.empty makes with NaN
    backends = {"triton": select("triton")}
    choices = interpreted_choices(dtype, shape, part)
    found = tallies(backends, DTYPES[dtype], shape, choices, (7, 512))
    return {name: tally.as_json() for name, tally in found.items()}


def test_a_summary_joins_pieces_by_backend_and_dtype() -> None:
    figures = {"cells": 3, "largest_error": 1e-3, "smallest_swapped_error": 0.5, "seconds": 1.5}
    worse = {"cells": 4, "largest_error": 2e-3, "smallest_swapped_error": 0.4, "seconds": 1.0}
    pieces = [
        {"dtype": "float32", "backends": {"torch": figures}},
        {"dtype": "float32", "backends": {"torch": worse}},
        {"dtype": "float16", "backends": {"torch": figures}},
    ]
    assert summary(pieces) == [
        {"backend": "torch", "dtype": "float16", **figures},
        {"backend": "torch", "dtype": "float32", **worse, "cells": 7, "seconds": 2.5},
    ]


if __name__ == "__main__":
    answer({name: partial(_interpret, *piece) for name, piece in PIECES.items()})
