"""The reference ops against transformers, torch's own attention and a loop over rows."""

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from kernel_cases import (
    MIXED_ROWS,
    ROWS,
    WORKLOADS,
    angles,
    assert_close,
    attention_case,
    error_of,
    sgmv_case,
)
from lory_kernels import BASE_SLOT, Ops, select


@pytest.fixture(scope="module")
def ops() -> Ops:
    return select("torch")


def test_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="backend: 'cuda'"):
        select("cuda")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_rounds_as_llama_does(ops: Ops, dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(48, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x_TH = torch.randn(5, 48, dtype=dtype)
    assert torch.equal(ops.rms_norm(x_TH, norm.weight.data, 1e-5), norm(x_TH))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_with_fp32_weight_rounds_as_gemma_does(ops: Ops, dtype: torch.dtype) -> None:
    norm = GemmaRMSNorm(48, eps=1e-6).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x_TH, weight_H = torch.randn(5, 48, dtype=dtype), 1.0 + norm.weight.data.float()
    actual_TH = ops.rms_norm(x_TH, weight_H, 1e-6, weight_in_fp32=True)
    assert torch.equal(actual_TH, norm(x_TH))


def test_add_rms_norm_keeps_the_rounded_sum_as_residual(ops: Ops) -> None:
    residual_TH, x_TH = torch.randn(2, 3, 16).bfloat16()
    weight_H, out_TH = torch.randn(16).bfloat16(), torch.empty(3, 16).bfloat16()
    sum_TH = residual_TH + x_TH
    returned = ops.add_rms_norm(residual_TH, x_TH, weight_H, 1e-5, out_TH)
    assert returned is out_TH
    assert torch.equal(residual_TH, sum_TH)
    assert torch.equal(out_TH, ops.rms_norm(sum_TH, weight_H, 1e-5))


def test_rope_turns_q_and_k_as_transformers_does_and_leaves_v(ops: Ops) -> None:
    heads, kv_heads, head_dim, tokens = 4, 2, 16, 6
    table_PD, positions_T = angles(64, head_dim), torch.tensor([0, 3, 9, 1, 63, 2])
    qkv_TN = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim)
    q, k, v = qkv_TN.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=1)
    cos, sin = (table_PD[positions_T].chunk(2, dim=1)[part].repeat(1, 2)[None] for part in (0, 1))
    expected_q, expected_k = apply_rotary_pos_emb(
        q.view(1, tokens, heads, head_dim).transpose(1, 2),
        k.view(1, tokens, kv_heads, head_dim).transpose(1, 2),
        cos,
        sin,
    )
    expected = torch.cat(
        [part.transpose(1, 2).flatten(2)[0] for part in (expected_q, expected_k)], 1
    )
    k_cache, v_cache = torch.zeros(2, 4, kv_heads, 8, head_dim)
    slots_T = torch.tensor([0, 9, -1, 31, 17, 2])
    expected_v = v.clone()
    ops.rope_write_kv(
        qkv_TN, positions_T, table_PD, k_cache, v_cache, slots_T, heads, kv_heads, head_dim
    )
    assert_close(qkv_TN, torch.cat([expected, expected_v], 1))
    assert torch.equal(v_cache[1, :, 1], expected_v[1].view(kv_heads, head_dim))
    assert torch.equal(k_cache[3, :, 7], qkv_TN[3].view(-1, head_dim)[heads : heads + kv_heads])
    written = k_cache.abs().sum((1, 3)) > 0
    assert written.sum() == 5, "a negative slot is not written"


@pytest.mark.parametrize("window", [0, 20])
def test_attention_equals_sdpa_row_by_row(ops: Ops, window: int) -> None:
    case = attention_case(torch.float32, window=window)
    actual_TN, token = case.run(ops), 0
    for row, (query_len, context) in enumerate(MIXED_ROWS):
        blocks = case.block_tables_RM[row, : -(-context // 16)].long()
        k, v = (
            cache[blocks].transpose(0, 1).flatten(1, 2)[None, :, :context]
            for cache in (case.k_cache, case.v_cache)
        )
        q = case.qkv_TN[token : token + query_len, : 4 * 32].view(1, query_len, 4, 32)
        position, key = torch.arange(context)[context - query_len :, None], torch.arange(context)
        mask = (key <= position) & (key > position - (window or context + 1))
        expected = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=True
        )
        if query_len:
            flat = expected[0].transpose(0, 1).flatten(1)
            assert_close(actual_TN[token : token + query_len], flat)
        token += query_len


def test_softcap_bounds_the_scores(ops: Ops) -> None:
    """With a tiny cap all scores are nearly equal, so a decode row averages its values."""
    case = attention_case(torch.float32, softcap=1e-6, rows=((1, 9),), num_kv_heads=1)
    mean_D = case.v_cache[case.block_tables_RM[0, 0], 0, :9].mean(0)
    assert_close(case.run(ops).view(2, 32), mean_D.expand(2, 32))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_sgmv_equals_a_dense_update_per_row(ops: Ops, workload: str, rows: int) -> None:
    case = sgmv_case(workload, rows, torch.float32, ranks=(1, 4, 0))
    actual_TN, site = case.run(ops), case.site
    slot_T = torch.repeat_interleave(case.segments.slots_G, case.segments.starts_G1.diff())
    for row in range(rows):
        expected_N, slot = case.y_TN[row].clone(), int(slot_T[row])
        for k, width in enumerate(site.out_features if slot != BASE_SLOT else ()):
            rank = int(site.rank_SK[slot, k])
            a = case.pool[site.a_offset_SK[slot, k] :][: rank * 96].view(rank, 96)
            b = case.pool[site.b_offset_SK[slot, k] :][: rank * width].view(rank, width)
            weight = (b.T @ a) * site.scale_SK[slot, k]
            expected_N[site.out_offsets[k] :][:width] += weight @ case.x_TH[row]
        assert error_of(actual_TN[row], expected_N) < 1e-5


def test_base_rows_keep_every_bit(ops: Ops) -> None:
    case = sgmv_case("base_only", 7, torch.float32)
    assert torch.equal(case.run(ops), case.y_TN)


def test_gated_activations_equal_torch(ops: Ops) -> None:
    gate_up_TN, out_TI = torch.randn(3, 20), torch.empty(3, 10)
    gate, up = gate_up_TN.chunk(2, 1)
    ops.silu_mul(gate_up_TN, out_TI)
    assert_close(out_TI, torch.nn.functional.silu(gate) * up)
    ops.gelu_tanh_mul(gate_up_TN, out_TI)
    assert_close(out_TI, torch.nn.functional.gelu(gate, approximate="tanh") * up)
