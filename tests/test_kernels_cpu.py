"""The CPU kernels against the reference: every op, by workload and shape, in each dtype."""

import os
import subprocess
import sys
from ctypes import CDLL
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as bnb

import lory_kernels
import lory_kernels.__main__ as ahead
from kernel_cases import (
    ROWS,
    TOLERANCE,
    WORKLOADS,
    angles,
    assert_close,
    attention_case,
    error_of,
    sgmv_case,
    with_outputs,
)
from lory_kernels import KernelUnavailableError, Ops, best_cpu_backend, build, panels, select
from lory_kernels.calls import Caller

pytestmark = pytest.mark.skipif(
    best_cpu_backend() == "torch", reason="no C compiler here: the CPU kernels are not built"
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIXED_RANKS = (16, 1, 64, 3, 8, 33)


@pytest.fixture(scope="module")
def reference() -> Ops:
    return select("torch")


@pytest.fixture(scope="module", params=[1, 2], ids=["1-thread", "2-threads"])
def ops(request: pytest.FixtureRequest) -> Ops:
    return select("cpu", threads=request.param)


@pytest.fixture(scope="module")
def one_thread() -> Ops:
    return select("cpu", threads=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_sgmv_workloads(
    ops: Ops, reference: Ops, workload: str, rows: int, dtype: torch.dtype
) -> None:
    case = sgmv_case(workload, rows, dtype, ranks=MIXED_RANKS)
    assert_close(case.run(ops), case.run(reference))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 33, 64, 100, 256])
def test_sgmv_ranks(one_thread: Ops, reference: Ops, rank: int, dtype: torch.dtype) -> None:
    case = sgmv_case("zipf", 33, dtype, ranks=(rank, 0, 1))
    assert_close(case.run(one_thread), case.run(reference))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("in_features", "out_features"),
    [
        (896, (4864,)),
        (576, (960, 192, 192)),
        (4864, (896,)),
        (37, (5, 1, 61)),
        (1, (1,)),
        (50, (70,)),
    ],
)
def test_sgmv_widths(
    ops: Ops,
    reference: Ops,
    in_features: int,
    out_features: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    case = sgmv_case(
        "zipf", 23, dtype, in_features=in_features, out_features=out_features, ranks=(16, 3)
    )
    assert_close(case.run(ops), case.run(reference))


def test_sgmv_handles_thousands_of_rows(ops: Ops, reference: Ops) -> None:
    case = sgmv_case("skewed", 2051, torch.float32, ranks=(8, 5))
    assert_close(case.run(ops), case.run(reference))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tolerance_catches_one_swapped_adapter(
    one_thread: Ops, reference: Ops, dtype: torch.dtype
) -> None:
    case = sgmv_case("distinct", 33, dtype)
    slots_G = case.segments.slots_G.clone()
    slots_G[[5, 6]] = slots_G[[6, 5]]
    wrong = replace(case, segments=replace(case.segments, slots_G=slots_G))
    error = error_of(wrong.run(one_thread), case.run(reference))
    assert error > 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_base_rows_keep_every_bit(ops: Ops, dtype: torch.dtype) -> None:
    case = sgmv_case("half_base", 133, dtype)
    case.x_TH[:66] = float("nan")
    actual_TN = case.run(ops)
    assert torch.equal(actual_TN[:66], case.y_TN[:66])
    assert not torch.equal(actual_TN[66:], case.y_TN[66:])


def test_a_site_whose_pool_was_replaced_is_read_from_the_new_one(
    one_thread: Ops, reference: Ops
) -> None:
    case = sgmv_case("distinct", 3, torch.float32)
    case.run(one_thread)
    other = replace(case, pool=2 * case.pool)
    assert_close(other.run(one_thread), other.run(reference))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sgmv_takes_strided_rows(one_thread: Ops, reference: Ops, dtype: torch.dtype) -> None:
    case = sgmv_case("zipf", 9, dtype)
    y_TN, x_TH = torch.full((9, 200), 7.0).to(dtype), torch.randn(9, 111).to(dtype)
    y_TN[:, :128], x_TH[:, :96] = case.y_TN, case.x_TH
    one_thread.sgmv(y_TN[:, :128], x_TH[:, :96], case.site, case.pool, case.segments)
    assert_close(y_TN[:, :128], case.run(reference))
    assert (y_TN[:, 128:] == 7.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_the_same_from_run_to_run_and_for_any_thread_count(dtype: torch.dtype) -> None:
    sgmv = sgmv_case("zipf", 133, dtype, in_features=512, out_features=(512,), ranks=MIXED_RANKS)
    attention = attention_case(dtype, head_dim=64)
    for case in (sgmv, attention):
        runs = [case.run(select("cpu", threads=threads)) for threads in (1, 2, 3, 2, 1)]
        assert all(torch.equal(run, runs[0]) for run in runs)


def test_a_row_does_not_depend_on_the_batch_around_it(one_thread: Ops) -> None:
    """A decode row's update is the same alone and among others (one row per segment)."""
    case = sgmv_case("distinct", 33, torch.float32, ranks=MIXED_RANKS)
    together_TN = case.run(one_thread)
    for row in (0, 17, 32):
        segment = row + 1
        alone = replace(
            case.segments,
            starts_G1=torch.tensor([0, 1]).int(),
            slots_G=case.segments.slots_G[segment : segment + 1],
            num_rows=1,
            num_segments=1,
            adapted_rows=1,
        )
        y_TN = case.y_TN[row : row + 1].clone()
        one_thread.sgmv(y_TN, case.x_TH[row : row + 1], case.site, case.pool, alone)
        assert torch.equal(y_TN[0], together_TN[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("window", "softcap"), [(0, 0.0), (20, 0.0), (0, 5.0), (70, 30.0), (1, 0.0)]
)
@pytest.mark.parametrize("group", [1, 2, 3, 8, 40])
def test_attention_groups_windows_softcaps(
    ops: Ops, reference: Ops, group: int, window: int, softcap: float, dtype: torch.dtype
) -> None:
    case = attention_case(dtype, group=group, window=window, softcap=softcap)
    assert_close(case.run(ops), case.run(reference))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("head_dim", [16, 24, 64, 80, 128, 256])
def test_attention_head_dims_and_block_sizes(
    one_thread: Ops, reference: Ops, head_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    case = attention_case(dtype, head_dim=head_dim, block_size=block_size)
    assert_close(case.run(one_thread), case.run(reference))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_over_a_long_context(ops: Ops, reference: Ops, dtype: torch.dtype) -> None:
    rows = ((1, 4097), (130, 1900), (1, 2))
    case = attention_case(dtype, rows=rows, num_kv_heads=1, head_dim=64)
    assert_close(case.run(ops), case.run(reference))


def test_attention_survives_large_scores(one_thread: Ops, reference: Ops) -> None:
    case = attention_case(torch.float32)
    case = replace(case, qkv_TN=case.qkv_TN * 1e4)
    assert_close(case.run(one_thread), case.run(reference))


def test_attention_leaves_tokens_past_the_last_row_alone(one_thread: Ops) -> None:
    case = attention_case(torch.float32)
    padded_TN = torch.cat([case.qkv_TN, torch.randn(3, case.qkv_TN.shape[1])])
    out_TN = replace(case, qkv_TN=padded_TN).run(one_thread)
    assert out_TN[-3:].isnan().all()
    assert not out_TN[:-3].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tolerance_catches_one_key_too_many(
    one_thread: Ops, reference: Ops, dtype: torch.dtype
) -> None:
    case = attention_case(dtype, rows=((1, 40), (1, 33)))
    wrong = replace(case, context_lens_R=torch.tensor([39, 33]).int())
    assert error_of(wrong.run(one_thread), case.run(reference)) > TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 37, 64, 576, 4864])
@pytest.mark.parametrize("rows", ROWS)
def test_norms(ops: Ops, reference: Ops, rows: int, width: int, dtype: torch.dtype) -> None:
    x_TH, residual_TH = torch.randn(2, rows, width).to(dtype)
    same_H, fp32_H = torch.randn(width).to(dtype), torch.randn(width)
    for weight_H, in_fp32 in ((same_H, False), (same_H, True), (fp32_H, True)):
        out_TH = torch.full_like(x_TH, float("nan"))
        ops.rms_norm(x_TH, weight_H, 1e-6, out_TH, weight_in_fp32=in_fp32)
        expected_TH = reference.rms_norm(x_TH, weight_H, 1e-6, weight_in_fp32=in_fp32)
        assert_close(out_TH, expected_TH)
        sums = residual_TH.clone(), residual_TH.clone()
        actual_TH = ops.add_rms_norm(sums[0], x_TH, weight_H, 1e-6, weight_in_fp32=in_fp32)
        expected_TH = reference.add_rms_norm(sums[1], x_TH, weight_H, 1e-6, weight_in_fp32=in_fp32)
        assert torch.equal(sums[0], sums[1])
        assert_close(actual_TH, expected_TH)


def share_of_other_bits(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual != expected).double().mean())


def test_what_is_rounded_before_a_product_is_rounded_as_modules_do(
    one_thread: Ops, reference: Ops
) -> None:
    """Every fifth result or more has other bits where that rounding is left out; sums in another
    order change one in a hundred."""
    x_TH, weight_H = torch.randn(33, 512).bfloat16(), torch.randn(512).bfloat16()
    expected_TH = reference.rms_norm(x_TH, weight_H, 1e-6)
    assert share_of_other_bits(one_thread.rms_norm(x_TH, weight_H, 1e-6), expected_TH) < 0.01
    once_TH = reference.rms_norm(x_TH, weight_H, 1e-6, weight_in_fp32=True)
    assert share_of_other_bits(once_TH, expected_TH) > 0.1
    actual_TH = one_thread.rms_norm(x_TH, weight_H, 1e-6, weight_in_fp32=True)
    assert share_of_other_bits(actual_TH, once_TH) < 0.01
    gate_up_TN, found_TI = torch.randn(33, 1024).bfloat16(), torch.empty(2, 33, 512).bfloat16()
    gate_TI, up_TI = gate_up_TN.float().chunk(2, 1)
    for op, active in (
        ("silu_mul", torch.nn.functional.silu),
        ("gelu_tanh_mul", lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    ):
        getattr(one_thread, op)(gate_up_TN, found_TI[0])
        getattr(reference, op)(gate_up_TN, found_TI[1])
        assert share_of_other_bits(found_TI[0], found_TI[1]) < 0.01
        assert share_of_other_bits((active(gate_TI) * up_TI).bfloat16(), found_TI[1]) > 0.1


@pytest.mark.parametrize("op", ["silu_mul", "gelu_tanh_mul"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 37, 1408])
def test_gated_activations(
    ops: Ops, reference: Ops, op: str, width: int, dtype: torch.dtype
) -> None:
    gate_up_TN = (torch.randn(33, 2 * width) * 4).to(dtype)
    actual_TI, expected_TI = torch.full((2, 33, width), float("nan")).to(dtype)
    getattr(ops, op)(gate_up_TN, actual_TI)
    getattr(reference, op)(gate_up_TN, expected_TI)
    assert_close(actual_TI, expected_TI)


def test_activations_are_finite_and_right_at_the_extremes(one_thread: Ops) -> None:
    gate = torch.tensor([-1e30, -200.0, -88.5, -87.0, -1e-30, 0.0, 1e-30, 87.0, 200.0, 1e30])
    out_TI = torch.empty(1, 10)
    for op, exact in (
        ("silu_mul", torch.nn.functional.silu),
        ("gelu_tanh_mul", lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    ):
        getattr(one_thread, op)(torch.cat([gate, torch.ones(10)])[None], out_TI)
        assert torch.allclose(out_TI[0].double(), exact(gate.double()), rtol=1e-6, atol=1e-35)


def test_exp_and_tanh_are_accurate_to_the_last_bits(one_thread: Ops) -> None:
    """silu(g) * (1 + e^-g) = g for every g; softcap near zero is the identity."""
    gate = torch.linspace(-80, 80, 100_001)
    out_TI = torch.empty(1, gate.numel())
    one_thread.silu_mul(torch.cat([gate, torch.ones_like(gate)])[None], out_TI)
    exact = torch.nn.functional.silu(gate.double())
    assert float(((out_TI[0] - exact).abs() / exact.abs().clamp_min(1e-30)).max()) < 4e-7


def test_nan_is_not_swallowed(one_thread: Ops) -> None:
    gate_up_TN, out_TI = torch.randn(1, 40), torch.zeros(1, 20)
    gate_up_TN[0, 3] = float("nan")
    one_thread.silu_mul(gate_up_TN, out_TI)
    assert out_TI.isnan().nonzero().tolist() == [[0, 3]]
    case = attention_case(torch.float32)
    case.qkv_TN[0] = float("nan")
    assert case.run(one_thread)[0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary_dim", [8, 24, 32])
@pytest.mark.parametrize("normed", [False, True])
def test_rope_write_kv(
    ops: Ops, reference: Ops, normed: bool, rotary_dim: int, dtype: torch.dtype
) -> None:
    heads, kv_heads, head_dim, tokens, block_size = 6, 2, 32, 133, 16
    qkv_TN = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim + 9).to(dtype)[:, :-9]
    positions_T = torch.randint(0, 500, (tokens,))
    slots_T = 1 + torch.randperm(12 * block_size - 1)[:tokens]
    slots_T[::5], slots_T[1] = -1, 0
    norms = torch.randn(2, head_dim).to(dtype) if normed else (None, None)
    results = []
    for each in (ops, reference):
        row_TN, caches = qkv_TN.clone(), torch.full((2, 12, kv_heads, block_size, head_dim), 9.0)
        k_cache, v_cache = caches.to(dtype)
        each.rope_write_kv(
            row_TN,
            positions_T,
            angles(500, rotary_dim),
            k_cache,
            v_cache,
            slots_T,
            heads,
            kv_heads,
            head_dim,
            q_norm_D=norms[0],
            k_norm_D=norms[1],
            norm_eps=1e-6,
        )
        results.append((row_TN, k_cache, v_cache))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)
    assert torch.equal(results[0][2], results[1][2])


def test_torch_and_the_kernels_share_one_openmp_runtime() -> None:
    """Linked to the system's libgomp, the kernels ran ten times slower: two pools of spinning
    threads fought over the cores."""
    code = (
        "import torch, lory_kernels\n"
        "ops = lory_kernels.select('cpu', threads=2)\n"
        "ops.silu_mul(torch.ones(512, 512), torch.ones(512, 256))\n"
        "lines = open('/proc/self/maps').read().splitlines()\n"
        "print(len({line[line.index('/'):] for line in lines if 'omp' in line.split('/')[-1]}))\n"
    )
    path = str(Path(lory_kernels.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "1"


needs_avx512 = pytest.mark.skipif(
    " avx512vl" not in Path("/proc/cpuinfo").read_text(), reason="this CPU has no AVX-512"
)


def _library_for(march: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CDLL:
    flags = tuple(f"-march={march}" if flag.startswith("-march") else flag for flag in build._FLAGS)
    monkeypatch.setattr(build, "_FLAGS", flags)
    return build.load_library(tmp_path)


@pytest.mark.parametrize(
    "march", ["x86-64", "x86-64-v3", pytest.param("skylake-avx512", marks=needs_avx512)]
)
def test_older_cpus_get_the_same_results(
    march: str, reference: Ops, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The plain, AVX2 and AVX-512 builds without bfloat16, in place of the native one."""
    library = _library_for(march, monkeypatch, tmp_path)
    monkeypatch.setattr("lory_kernels.cpu.compiled_library", lambda: library)
    ops = select("cpu", threads=2)
    assert library.lory_vector_lanes() == {"x86-64": 4, "x86-64-v3": 8}.get(march, 16)
    for dtype in (torch.float32, torch.bfloat16):
        for case in (
            sgmv_case("zipf", 33, dtype, ranks=MIXED_RANKS),
            sgmv_case("zipf", 33, dtype, in_features=37, out_features=(5, 1, 61)),
            with_outputs(sgmv_case("zipf", 33, dtype, ranks=(16, 0), out_features=(70, 61))),
            attention_case(dtype, head_dim=24, window=20, softcap=5.0),
            attention_case(dtype, head_dim=64, group=8),
        ):
            assert_close(case.run(ops), case.run(reference))


@pytest.mark.parametrize(
    "march", ["x86-64", "x86-64-v3", pytest.param("skylake-avx512", marks=needs_avx512)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_panels_of_older_cpus_hold_the_same_weights(
    march: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = _library_for(march, monkeypatch, tmp_path)
    monkeypatch.setattr(panels, "_library", lambda: library)
    caller = Caller(library, 2)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (70 * 128 // 2,), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(70 * 2, generator=generator)
    x_TK = torch.randn((5, 128), generator=generator).to(dtype)
    values = bnb.get_4bit_type("nf4", device="cpu")[
        torch.stack([codes >> 4, codes & 15], -1).long()
    ]
    decoded_NK = (values.view(-1, 64) * absmax[:, None]).view(70, 128).to(dtype)
    dense = panels.PanelMultiply(panels.pack(decoded_NK), None, caller)(x_TK)
    nf4 = panels.PanelMultiply(panels.pack_nf4(codes, absmax, 70, 128, dtype), None, caller)(x_TK)
    assert_close(dense, x_TK.float() @ decoded_NK.float().T)
    assert torch.equal(nf4, dense)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pool_may_have_more_elements_than_32_bits_count(
    one_thread: Ops, dtype: torch.dtype
) -> None:
    """It takes memory only where it is touched."""
    near = with_outputs(sgmv_case("distinct", 3, dtype, ranks=(8, 3)))
    away = 2**31 + 8
    pool = torch.empty(away + near.pool.numel(), dtype=dtype)
    pool[away:] = near.pool
    names = ("a_offset_SK", "b_offset_SK", "gain_offset_SK", "bias_offset_SK")
    moved = {name: _moved(getattr(near.site, name), away) for name in names}
    far = replace(near, pool=pool, site=replace(near.site, **moved))
    assert torch.equal(far.run(one_thread), near.run(one_thread))


def _moved(offset_SK: torch.Tensor, away: int) -> torch.Tensor:
    return torch.where(offset_SK < 0, offset_SK, offset_SK + away)


@pytest.mark.full
def test_a_cache_may_have_more_elements_than_32_bits_count(one_thread: Ops) -> None:
    near = attention_case(torch.bfloat16, head_dim=64)
    shape, away = near.k_cache.shape, 2**31 // near.k_cache[0].numel() + 1
    caches = []
    for cache in (near.k_cache, near.v_cache):
        far = torch.empty((away + shape[0], *shape[1:]), dtype=cache.dtype)
        far[away:] = cache
        caches.append(far)
    tables_RM = near.block_tables_RM + away
    far = replace(near, k_cache=caches[0], v_cache=caches[1], block_tables_RM=tables_RM)
    assert torch.equal(far.run(one_thread), near.run(one_thread))


@pytest.mark.parametrize("has_compiler", [True, False])
def test_compiling_ahead_says_what_came_of_it(
    has_compiler: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise KernelUnavailableError("no C compiler found")

    if not has_compiler:
        monkeypatch.setattr(ahead, "compiled_library", refuse)
    ahead.main()
    told = capsys.readouterr()
    assert ("compiled" in told.out) == has_compiler
    assert ("no C compiler found" in told.err) != has_compiler
