"""The decoder against transformers: every family, packed, chunked, paged, in every dtype.

Each tolerance is shown to catch a weight that is 1% off.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lory_kernels
import tiny_models
from lory_server.messages import EngineOptions
from lory_server.model.decoder import Decoder
from lory_server.model.kv import KVCache
from lory_server.model.load import load
from packed_steps import make_batch, make_kv, random_ids, run

ATOL_FP32 = 2e-5

needs_compiler = pytest.mark.skipif(
    lory_kernels.best_cpu_backend() != "cpu", reason="the CPU ops need a C compiler"
)
LENGTHS = (37, 9, 23)
CHUNKS = ((13, 16, 1), (9,), (1, 1, 10))


def decoder_of(
    folder: Path, dtype: torch.dtype = torch.float32, backend: lory_kernels.Backend = "torch"
) -> Decoder:
    return load(EngineOptions(model=str(folder)), "cpu", dtype, lory_kernels.select(backend))


def sequences() -> list[list[int]]:
    return [random_ids(length, tiny_models.VOCAB_SIZE, seed) for seed, length in enumerate(LENGTHS)]


def reference_logits(folder: Path, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    model = tiny_models.load_reference(folder, dtype)
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0].float() for ids in sequences()]


def largest_difference(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True))


def mean_difference(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    return torch.cat([(a - b).abs() for a, b in zip(left, right, strict=True)]).mean().item()


def perturb(folder: Path) -> None:
    """Every other row of one matrix of the last layer 1% larger (all would be normed away)."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name][::2] *= 1.01
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_compiler), "torch"])
def test_chunked_packed_paged_logits_equal_transformers(
    family: str, backend: lory_kernels.Backend, tmp_path: Path
) -> None:
    folder = tiny_models.build(family, tmp_path / "model")
    expected = reference_logits(folder)
    ours = run(decoder_of(folder, backend=backend), sequences(), CHUNKS)
    assert largest_difference(ours, expected) < ATOL_FP32
    perturb(folder)
    wrong = run(decoder_of(folder, backend=backend), sequences(), CHUNKS)
    assert largest_difference(wrong, expected) > 10 * ATOL_FP32


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_the_truth_as_transformers(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = tiny_models.build(family, tmp_path / "model", dtype=dtype)
    truth = reference_logits(folder, torch.float32)
    theirs = mean_difference(reference_logits(folder, dtype), truth)
    ours = mean_difference(run(decoder_of(folder, dtype), sequences(), CHUNKS), truth)
    assert 0 < ours < 1.15 * theirs
    if dtype == torch.float16:
        perturb(folder)
        wrong = run(decoder_of(folder, dtype), sequences(), CHUNKS)
        assert mean_difference(wrong, truth) > 1.15 * theirs


@pytest.mark.parametrize(
    ("family", "override"),
    [
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"max_window_layers": 2}),
        ("gemma2", {"sliding_window": 64}),
        ("gemma2", {"attn_logit_softcapping": 50.0}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 32}),
        ("qwen3", {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": True}),
        ("phi3", {"sliding_window": 5}),
        ("llama", {"rms_norm_eps": 0.5}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    ],
)
def test_each_switch_of_a_family_is_obeyed_and_matters(
    family: str, override: dict[str, Any], tmp_path: Path
) -> None:
    """qwen3's window is made 6 here: its class keeps one only if use_sliding_window is set."""
    if "layer_types" in override:
        override = override | {"sliding_window": 6}
    plain = reference_logits(tiny_models.build(family, tmp_path / "plain"))
    switched = tiny_models.build(family, tmp_path / "switched", **override)
    expected = reference_logits(switched)
    assert largest_difference(run(decoder_of(switched), sequences(), CHUNKS), expected) < ATOL_FP32
    assert largest_difference(plain, expected) > 100 * ATOL_FP32


@pytest.mark.parametrize(
    ("family", "override"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 32}),
        ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": 1, "num_hidden_layers": 4}),
        ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("phi3", {"tie_word_embeddings": True}),
    ],
)
def test_biases_head_sizes_and_tied_heads_equal_transformers(
    family: str, override: dict[str, Any], tmp_path: Path
) -> None:
    folder = tiny_models.build(family, tmp_path / "model", **override)
    ours = run(decoder_of(folder), sequences(), CHUNKS)
    assert largest_difference(ours, reference_logits(folder)) < ATOL_FP32


def test_a_sequence_does_not_feel_its_neighbours(tmp_path: Path) -> None:
    decoder = decoder_of(tiny_models.build("llama", tmp_path / "model"))
    together = run(decoder, sequences(), CHUNKS)
    alone = [run(decoder, [ids], [(len(ids),)], seed=7)[0] for ids in sequences()]
    assert largest_difference(together, alone) < ATOL_FP32


def test_only_the_rows_asked_for_get_logits(tmp_path: Path) -> None:
    decoder = decoder_of(tiny_models.build("gemma2", tmp_path / "model"))
    ids = random_ids(6, tiny_models.VOCAB_SIZE, 3)
    batch = make_batch([ids], [0], [[1, 2]])
    every_LV = decoder.forward(batch, make_kv(decoder, 16))
    some = replace(batch, logit_rows_L=torch.tensor([5, 2]))
    some_LV = decoder.forward(some, make_kv(decoder, 16))
    assert torch.allclose(some_LV, every_LV[[5, 2]], atol=ATOL_FP32)
    none = replace(batch, logit_rows_L=torch.tensor([], dtype=torch.int64))
    assert decoder.forward(none, make_kv(decoder, 16)).shape == (0, tiny_models.VOCAB_SIZE)


def test_logits_are_float32_in_every_dtype(tmp_path: Path) -> None:
    folder = tiny_models.build("llama", tmp_path / "model")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        decoder = decoder_of(folder, dtype)
        logits_LV = decoder.forward(make_batch([[5, 6]], [0], [[1]]), make_kv(decoder, 4))
        assert logits_LV.dtype == torch.float32
        assert decoder.dtype == dtype


def test_the_bytes_of_the_cache_are_what_the_spec_computes(tmp_path: Path) -> None:
    spec = decoder_of(tiny_models.build("qwen3", tmp_path / "model")).spec
    kv = KVCache.allocate(spec, 3, 16, torch.bfloat16, "cpu")
    held = sum(pages.nbytes for pages in (*kv.keys, *kv.values))
    assert held == 3 * spec.kv_bytes_per_block(16, torch.bfloat16.itemsize)


def test_the_weights_bytes_are_counted(tmp_path: Path) -> None:
    folder = tiny_models.build("llama", tmp_path / "model")
    stored = sum(t.nbytes for t in load_file(folder / "model.safetensors").values())
    rope_bytes = 128 * 16 * 4
    assert decoder_of(folder).num_bytes == stored + rope_bytes
