"""What the CPU kernels cannot take is refused by name: C is given addresses, and checks nothing."""

from dataclasses import replace

import pytest
import torch

from kernel_cases import angles, attention_case, sgmv_case
from lory_kernels import Ops, best_cpu_backend, select

pytestmark = pytest.mark.skipif(
    best_cpu_backend() == "torch", reason="no C compiler here: the CPU kernels are not built"
)


@pytest.fixture(scope="module")
def one_thread() -> Ops:
    return select("cpu", threads=1)


def test_strided_tensors_are_refused_by_name(one_thread: Ops) -> None:
    with pytest.raises(ValueError, match="x_TH must be contiguous"):
        one_thread.rms_norm(torch.randn(4, 8)[:, :4], torch.ones(4), 1e-6)


@pytest.mark.parametrize("field", ["block_tables_RM", "query_starts_R1", "context_lens_R"])
def test_attention_refuses_indices_of_another_width(one_thread: Ops, field: str) -> None:
    case = attention_case(torch.float32)
    case = replace(case, **{field: getattr(case, field).long()})
    with pytest.raises(ValueError, match=f"{field} must be torch.int32, not torch.int64"):
        case.run(one_thread)


def test_sgmv_refuses_rows_with_gaps_and_indices_of_another_width(one_thread: Ops) -> None:
    case = sgmv_case("distinct", 4, torch.float32)
    columns = case.x_TH.T.contiguous().T
    with pytest.raises(ValueError, match="x_TH must have whole rows"):
        replace(case, x_TH=columns).run(one_thread)
    segments = replace(case.segments, slots_G=case.segments.slots_G.long())
    with pytest.raises(ValueError, match=r"slots_G must be torch\.int32"):
        replace(case, segments=segments).run(one_thread)
    site = replace(case.site, rank_SK=case.site.rank_SK.long())
    with pytest.raises(ValueError, match=r"rank_SK must be torch\.int32"):
        replace(case, site=site).run(one_thread)


def test_numbers_of_another_dtype_are_refused_by_name(one_thread: Ops) -> None:
    """C is given addresses: float32 weights were read as twice as many of 16 bits."""
    half_TH, weight_H = torch.randn(4, 8).bfloat16(), torch.ones(8).bfloat16()
    with pytest.raises(ValueError, match=r"weight_H must be torch\.bfloat16, not torch\.float32"):
        one_thread.rms_norm(half_TH, weight_H.float(), 1e-6)
    with pytest.raises(ValueError, match=r"weight_H must be torch\.bfloat16, not torch\.float16"):
        one_thread.rms_norm(half_TH, weight_H.half(), 1e-6, weight_in_fp32=True)
    with pytest.raises(ValueError, match="out_TH must be"):
        one_thread.rms_norm(half_TH, weight_H, 1e-6, half_TH.float())
    with pytest.raises(ValueError, match="residual_TH must be"):
        one_thread.add_rms_norm(half_TH.float(), half_TH, weight_H, 1e-6)
    with pytest.raises(ValueError, match="gate_up_TN must be"):
        one_thread.silu_mul(half_TH.float(), half_TH[:, :4].contiguous())
    case = sgmv_case("distinct", 4, torch.bfloat16)
    for name in ("y_TN", "x_TH"):
        with pytest.raises(ValueError, match=f"{name} must be"):
            replace(case, **{name: getattr(case, name).float()}).run(one_thread)
    attention = attention_case(torch.bfloat16)
    for name in ("k_cache", "v_cache"):
        with pytest.raises(ValueError, match=f"{name} must be"):
            replace(attention, **{name: getattr(attention, name).float()}).run(one_thread)


@pytest.mark.parametrize("wrong", ["k_cache", "v_cache", "q_norm_D", "k_norm_D"])
def test_rope_refuses_another_dtype_by_name(one_thread: Ops, wrong: str) -> None:
    """One mode serves both norms, so they have one dtype."""
    caches = torch.zeros(2, 1, 1, 4, 8).bfloat16()
    tensors = {
        "k_cache": caches[0],
        "v_cache": caches[1],
        "q_norm_D": torch.ones(8).bfloat16(),
        "k_norm_D": torch.ones(8).bfloat16(),
    }
    tensors[wrong] = tensors[wrong].float()
    with pytest.raises(ValueError, match=f"{wrong.replace('q_norm', '[qk]_norm')} must be"):
        one_thread.rope_write_kv(
            torch.randn(1, 32).bfloat16(),
            torch.zeros(1).long(),
            angles(4, 8),
            kv_slots_T=torch.zeros(1).long(),
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
            norm_eps=1e-6,
            norm_weight_in_fp32=wrong == "k_norm_D",
            **tensors,
        )
