"""Triton's paged attention: against the reference in the interpreter, and compiled for GPUs."""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
import torch

import lory_kernels
from kernel_cases import TOLERANCE, AttentionCase, attention_case, error_of
from triton_processes import (
    SHARED_MEMORY_LIMIT_BYTES,
    Findings,
    answer,
    findings_of,
    launches_built,
    needs_triton,
)

pytestmark = needs_triton

DTYPES = {"float32": torch.float32, "float16": torch.float16}
DECODES = ((1, 1), (1, 70), (1, 129), (1, 300), (1, 17))
SPLIT = ((1, 900), (1, 5), (0, 0), (1, 513))
CASES = {
    "decode": {"rows": DECODES, "group": 4},
    "prefill": {"rows": ((5, 5), (40, 40), (33, 33), (1, 1))},
    "chunked_prefill": {"rows": ((7, 100), (16, 64), (3, 129))},
    "mixed": {},
    "split": {"rows": SPLIT},
    "split_and_prefill": {"rows": ((1, 700), (9, 40)), "softcap": 5.0},
    "split_in_window": {"rows": SPLIT, "window": 600},
    # In float16 the whole context would make fewer splits than the window has.
    "split_by_the_window": {"rows": ((1, 1600),), "window": 1350},
    "window_1": {"window": 1},
    "window_20": {"window": 20},
    "softcap_50": {"softcap": 50.0, "window": 33},
    "softcap_tiny": {"softcap": 1e-6, "rows": DECODES},
    "group_1": {"group": 1},
    "group_3": {"group": 3},
    "group_8": {"group": 8, "num_kv_heads": 1},
    "group_20": {"group": 20, "num_kv_heads": 1, "rows": ((1, 30), (1, 9))},
    "one_row": {"rows": ((1, 33),)},
} | {
    f"head_dim_{head_dim}": {"head_dim": head_dim, "rows": ((1, 40), (1, 70), (9, 11))}
    for head_dim in (6, 64, 80, 96, 112, 120, 128, 192, 256)
} | {
    f"block_{block_size}": {"block_size": block_size, "rows": ((1, 40), (9, 31), (1, 1))}
    for block_size in (1, 5, 32, 256)
}  # fmt: skip
WRONG = ("swapped_block", "window_too_narrow", "window_too_wide", "lost_split")

FAMILIES = {
    "llama_8b": (32, 8, 128, 0, 0.0),
    "gemma_2_9b": (16, 8, 256, 4096, 50.0),
    "qwen_2_0.5b": (14, 2, 64, 0, 0.0),
    "phi_3_mini": (32, 32, 96, 2047, 0.0),
    "head_dim_80": (32, 32, 80, 0, 0.0),
    "head_dim_112": (8, 1, 112, 0, 0.0),
    "head_dim_120": (32, 8, 120, 4096, 0.0),
    "head_dim_192": (24, 8, 192, 0, 0.0),
}
"""(heads, kv heads, head dim, window, soft cap) of what is compiled."""
ALWAYS = ("llama_8b", "gemma_2_9b")
"""Compiled in bfloat16 and float32; `make test-full` compiles all, in float16 too."""


@pytest.fixture(scope="module")
def interpreted() -> Findings:
    return findings_of(__file__, "interpret")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_attention_equals_the_reference(interpreted: Findings, name: str, dtype: str) -> None:
    """Blocks that no row owns, and what lies past a context, are NaN; so is the output before."""
    assert interpreted["error"][f"{name}-{dtype}"] <= TOLERANCE[DTYPES[dtype]]


@pytest.mark.parametrize("wrong", WRONG)
def test_tolerances_catch_wrong_answers(interpreted: Findings, wrong: str) -> None:
    for dtype, expected in DTYPES.items():
        assert interpreted["wrong"][f"{wrong}-{dtype}"] > 3 * TOLERANCE[expected]


def test_results_are_the_same_from_run_to_run(interpreted: Findings) -> None:
    assert set(interpreted["repeat"].values()) == {True}


def test_rows_without_context_and_tokens_of_no_row_are_left_alone(interpreted: Findings) -> None:
    assert interpreted["untouched"] == {"no_context": True, "no_row": True, "others": True}


def test_nan_in_a_query_is_not_swallowed(interpreted: Findings) -> None:
    assert interpreted["nan"] == {"poisoned_token": True, "others": False}


def test_what_is_not_served_is_refused_by_name(interpreted: Findings) -> None:
    refused = interpreted["refused"]
    assert "qkv_TN is torch.bfloat16" in refused["bfloat16"]
    assert "context_lens_R must be torch.int32, not torch.int64" in refused["int64"]
    assert "head_dim: 258 is above 256" in refused["head_dim"]


def test_splits_fill_the_device_and_are_worth_their_programs(interpreted: Findings) -> None:
    from lory_server.build import MAX_CONTEXT_SPLITS  # the interpreter's process has no server

    assert interpreted["splits"] == {
        "long": 32, "filled": 1, "filled_but_long": 13, "short": 1, "two_splits": 2,
        "most": MAX_CONTEXT_SPLITS,
    }  # fmt: skip


def _check_built(built: Findings, kernels: int) -> None:
    for arch, limit in SHARED_MEMORY_LIMIT_BYTES.items():
        here = {key: sizes for key, sizes in built["built"].items() if f"sm_{arch}" in key}
        assert len(here) == kernels
        assert not {key: sizes for key, sizes in here.items() if sizes["spilled_bytes"]}
        assert max(sizes["shared_bytes"] for sizes in here.values()) <= limit


def test_kernels_compile_for_gpus_fit_and_do_not_spill() -> None:
    _check_built(findings_of(__file__, "compile"), kernels=len(ALWAYS) * 2 * 4)


@pytest.mark.full
def test_kernels_compile_for_every_family_and_dtype() -> None:
    _check_built(findings_of(__file__, "compile_all"), kernels=len(FAMILIES) * 3 * 4)


def _interpret() -> Findings:
    reference, ops = lory_kernels.select("torch"), lory_kernels.select("triton")
    found: Findings = {"error": {}, "wrong": {}, "repeat": {}}
    for name, dtype in DTYPES.items():
        for key, shape in CASES.items():
            case = _with_poisoned_tables(attention_case(dtype, **shape))
            actual, expected = case.run(ops), case.run(reference)
            found["error"][f"{key}-{name}"] = error_of(actual, expected)
            if key in ("mixed", "split"):
                found["repeat"][f"{key}-{name}"] = torch.equal(actual, case.run(ops))
        for key, wrong, right in _wrong_cases(dtype):
            found["wrong"][f"{key}-{name}"] = error_of(wrong.run(ops), right.run(reference))
    found["untouched"], found["nan"] = _left_alone(), _poisoned_query()
    found["refused"], found["splits"] = _refusals(), _split_counts()
    return found


def _with_poisoned_tables(case: AttentionCase) -> AttentionCase:
    """Unused places of the tables name a block of NaN, as a stale table would a stranger's."""
    tables, block_size = case.block_tables_RM.clone(), case.k_cache.shape[2]
    unowned = set(range(case.k_cache.shape[0]))
    used = [-(-length // block_size) for length in case.context_lens_R.tolist()]
    for row, blocks in enumerate(used):
        unowned -= set(tables[row, :blocks].tolist())
    for row, blocks in enumerate(used):
        tables[row, blocks:] = min(unowned)
    return replace(case, block_tables_RM=tables)


def _wrong_cases(dtype: torch.dtype) -> Iterator[tuple[str, AttentionCase, AttentionCase]]:
    case = attention_case(dtype)
    tables = case.block_tables_RM.clone()
    tables[1, [0, 1]] = tables[6, [0, 1]]
    yield "swapped_block", replace(case, block_tables_RM=tables), case
    windowed = replace(case, window=20)
    yield "window_too_narrow", replace(windowed, window=19), windowed
    yield "window_too_wide", replace(windowed, window=21), windowed
    long = attention_case(dtype, rows=((1, 600),))
    tables = long.block_tables_RM[:, 20:].contiguous()
    yield "lost_split", replace(long, block_tables_RM=tables, context_lens_R=_lens(280)), long


def _lens(*lengths: int) -> torch.Tensor:
    return torch.tensor(lengths, dtype=torch.int32)


def _left_alone() -> dict[str, bool]:
    ops = lory_kernels.select("triton")
    case = attention_case(torch.float32, rows=((1, 20), (2, 9), (1, 40), (3, 8)))
    cut = replace(
        case,
        query_starts_R1=case.query_starts_R1[:4],
        context_lens_R=_lens(20, 0, 40),
        block_tables_RM=case.block_tables_RM[:3],
    )
    whole_TN, out_TN = case.run(ops), cut.run(ops)
    return {
        "no_context": bool(out_TN[1:3].isnan().all()),
        "no_row": bool(out_TN[4:].isnan().all()),
        "others": torch.equal(out_TN[[0, 3]], whole_TN[[0, 3]]),
    }


def _poisoned_query() -> dict[str, bool]:
    case = attention_case(torch.float32)
    case.qkv_TN[3] = float("nan")
    out_TN = case.run(lory_kernels.select("triton"))
    others = torch.cat((out_TN[:3], out_TN[4:]))
    return {"poisoned_token": bool(out_TN[3].isnan().all()), "others": bool(others.isnan().any())}


def _refusals() -> dict[str, str]:
    ops, said = lory_kernels.select("triton"), {}
    case = attention_case(torch.float32, rows=((1, 3),))
    for name, wrong in {
        "bfloat16": attention_case(torch.bfloat16, rows=((1, 3),)),
        "int64": replace(case, context_lens_R=case.context_lens_R.long()),
        "head_dim": attention_case(torch.float32, rows=((1, 3),), head_dim=258),
    }.items():
        try:
            wrong.run(ops)
        except ValueError as error:
            said[name] = str(error)
    return said


def _split_counts() -> dict[str, int]:
    from lory_kernels.triton_attention import MAX_SPLITS, num_splits_for

    return {
        "long": num_splits_for(8, 100_000),
        "filled": num_splits_for(512, 8192),
        "filled_but_long": num_splits_for(512, 100_000),
        "short": num_splits_for(8, 256),
        "two_splits": num_splits_for(8, 257),
        "most": MAX_SPLITS,
    }


def _compile() -> Findings:
    return _compiled(ALWAYS, (torch.bfloat16, torch.float32))


def _compile_all() -> Findings:
    return _compiled(tuple(FAMILIES), (torch.bfloat16, torch.float16, torch.float32))


def _compiled(families: tuple[str, ...], dtypes: tuple[torch.dtype, ...]) -> Findings:
    """Both kernels as launched for 4 rows of one token each, and of 900 in all."""
    found: Findings = {"built": {}}
    for family, dtype in itertools.product(families, dtypes):
        for tokens, arch in itertools.product((4, 900), SHARED_MEMORY_LIMIT_BYTES):
            for kernel, sizes in launches_built(
                lambda f=family, d=dtype, t=tokens: _launch(d, t, *FAMILIES[f]), arch
            ).items():
                key = f"sm_{arch}-{kernel}-{family}-{dtype}-{tokens}"
                found["built"][key] = asdict(sizes)
    return found


def _launch(
    dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, dim: int, window: int, cap: float
) -> None:
    from lory_kernels.triton_attention import paged_attention

    qkv_TN = torch.empty(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    k_cache, v_cache = torch.empty(2, 4, kv_heads, 16, dim, dtype=dtype)
    tables, starts, lens = (torch.empty(n, dtype=torch.int32) for n in (4 * 512, 5, 4))
    paged_attention(
        qkv_TN, k_cache, v_cache, tables.view(4, 512), starts, lens,
        torch.empty(tokens, heads * dim, dtype=dtype), heads, kv_heads, dim, 0.1, window, cap,
    )  # fmt: skip


if __name__ == "__main__":
    answer({"interpret": _interpret, "compile": _compile, "compile_all": _compile_all})
