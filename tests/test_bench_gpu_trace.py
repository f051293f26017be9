"""From a profile to the parts of a step: by name, and by where a kernel stands."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import gpu_trace
from benchmarks.gpu_trace import KERNELS, PARTS, NoMarksError, Span, Trace, traced, traced_apart

import lory_kernels

CUBLAS = "nvjet_hsh_64x8_64x16_4x1_v_bz_TNT"
CAST = "void at::native::unrolled_elementwise_kernel<...>"
SUM = "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>"
SPIN = "at::cuda::(anonymous namespace)::spin_kernel(long)"

LAYER = (
    "norm_kernel", "matmul_kernel", "shrink_kernel", "expand_kernel", "rope_kernel",
    "attention_kernel", "join_kernel", "kgemm_4bit_inference_naive<...>", "norm_kernel",
    "matmul_kernel", "reduce_kernel", "gated_kernel", CUBLAS,
)  # fmt: skip
STEP = (
    "Memcpy HtoD (Pinned -> Device)", "void at::native::vectorized_gather_kernel<16>", *LAYER,
    *LAYER, "norm_kernel", CUBLAS, CAST, SUM, "Memcpy DtoH (Device -> Pinned)",
)  # fmt: skip


def spans(names: Sequence[str], began_us: float = 0.0) -> tuple[Span, ...]:
    """Each of a millisecond, and another between it and the next."""
    starts = (began_us + 2000 * place for place in range(len(names)))
    return tuple(Span(name, at, at + 1000) for name, at in zip(names, starts, strict=True))


def test_a_step_is_told_apart_by_names_and_by_the_last_norm() -> None:
    assert Trace(spans(STEP), 1).parts_ms() == {
        "linears": 10.0,  # 2 layers: three of ours, one of bitsandbytes, one of cuBLAS
        "head": 1.0,
        "lora": 4.0,
        "attention": 4.0,
        "elementwise": 10.0,  # the embedding, 4 a layer, the last norm
        "sampling": 2.0,
        "copies": 2.0,
    }


def test_a_step_of_base_rows_alone_is_told_apart_too() -> None:
    bare = [name for name in STEP if name not in ("shrink_kernel", "expand_kernel")]
    parts = Trace(spans(bare), 1).parts_ms()
    assert (parts["lora"], parts["head"], parts["sampling"]) == (0.0, 1.0, 2.0)


def test_steps_are_cut_where_the_device_was_held_up() -> None:
    """Otherwise what begins a step would be the sampling of the one before."""
    together = Trace(spans((SPIN, *STEP) * 3), 3)
    once = Trace(spans(STEP), 1)
    assert together.parts_ms() == once.parts_ms()
    assert together.busy_ms() == pytest.approx(once.busy_ms())
    assert not any("spin" in name for name in together.largest_ms())


def test_what_runs_side_by_side_counts_once() -> None:
    trace = Trace((Span("a", 0, 1000), Span("b", 500, 2000), Span("c", 3000, 4000)), 1)
    assert trace.busy_ms() == pytest.approx(3.0)
    assert trace.span_ms() == pytest.approx(4.0)


def test_every_kernel_of_ours_has_a_part() -> None:
    """A kernel that is written and put nowhere would count as sampling or elementwise."""
    folder = Path(lory_kernels.__file__).parent
    sources = "\n".join(path.read_text() for path in sorted(folder.glob("triton_*.py")))
    written = set(re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE))
    assert written == set(KERNELS)
    assert set(KERNELS.values()) <= set(PARTS)


def test_a_profile_of_real_steps_has_their_ops() -> None:
    left, right = torch.ones(2, 64, 64).unbind()
    trace = traced(lambda: left @ right, torch.device("cpu"), 3)
    assert 0 < trace.busy_ms() <= trace.span_ms()
    assert set(trace.largest_ms()) == {"aten::matmul"}


def test_runs_in_one_profile_are_told_apart() -> None:
    left, right = torch.ones(2, 64, 64).unbind()
    runs = [lambda: left @ right, lambda: left + right]
    traces = traced_apart(runs, torch.device("cpu"), 3)
    assert [set(trace.largest_ms()) for trace in traces] == [{"aten::matmul"}, {"aten::add"}]
    assert all(trace.steps == 3 and trace.busy_ms() > 0 for trace in traces)


def test_a_profile_without_marks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_trace, "_mark", lambda _device: None)
    left, right = torch.ones(2, 64, 64).unbind()
    with pytest.raises(NoMarksError, match="0 steps in a profile of 2"):
        traced_apart([lambda: left @ right], torch.device("cpu"), 2)
