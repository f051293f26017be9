"""NF4 against bitsandbytes and transformers: the same bytes, the same logits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn.modules import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

import lory_kernels
import tiny_models
from lory_kernels import panels
from lory_server.messages import EngineOptions
from lory_server.model import nf4
from lory_server.model.decoder import Decoder
from lory_server.model.errors import ModelError
from lory_server.model.linear import PanelLinear, dense_linear
from lory_server.model.load import load
from packed_steps import random_ids, run

ATOL_FP32 = 2e-5
IDS = random_ids(21, tiny_models.VOCAB_SIZE, 4)

TORCH = lory_kernels.select("torch")
CPU = lory_kernels.select(lory_kernels.best_cpu_backend(), threads=2)

needs_panels = pytest.mark.skipif(
    not panels.can_pack_nf4(torch.empty(0, dtype=torch.uint8), torch.float32),
    reason="NF4 panels need AVX2 and a C compiler",
)
needs_avx512_bf16 = pytest.mark.skipif(
    not bnb.has_avx512bf16(), reason="bitsandbytes' CPU kernel needs AVX512 with bfloat16"
)


def random_weight(out_features: int, in_features: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((out_features, in_features), generator=generator)


def decoder_of(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Decoder:
    engine = EngineOptions(model=str(folder), **options)
    return load(engine, "cpu", dtype, lory_kernels.select("torch"))


def logits(decoder: Decoder) -> torch.Tensor:
    return run(decoder, [IDS], [(len(IDS) - 4,)])[0]


def reference_model(folder: Path, dtype: torch.dtype, double_quant: bool | None) -> Any:
    """In transformers, decoding weights exactly; double_quant None: as the folder says."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=bool(double_quant),
    )
    given = {} if double_quant is None else {"quantization_config": config}
    model = tiny_models.load_reference(folder, dtype, **given)
    linears = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert linears
    for module in linears:
        module.support_avx512bf16_for_cpu = False
        # A checkpoint remembers the dtype it was made for; the reference computes in ours.
        module.compute_dtype = dtype
    return model


def reference_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("chunk", [1 << 20, 1000])
def test_packed_weights_are_the_bytes_of_bitsandbytes(
    dtype: torch.dtype, double_quant: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nf4, "_CHUNK_WEIGHTS", chunk)
    parts = [random_weight(rows, 128, seed).to(dtype) for seed, rows in enumerate((64, 32, 32))]
    packed = nf4.pack("qkv", [nf4.quantize(part, "q", double_quant) for part in parts])
    theirs = [
        bnb.quantize_4bit(part, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
        for part in parts
    ]
    assert torch.equal(packed.codes, torch.cat([codes.view(-1) for codes, _ in theirs]))
    dense = torch.cat([bnb.dequantize_4bit(codes, state) for codes, state in theirs])
    assert torch.equal(packed.dequantize(dtype), dense)
    if not double_quant:
        whole, state = bnb.quantize_4bit(torch.cat(parts), blocksize=64, quant_type="nf4")
        assert torch.equal(packed.codes, whole.view(-1))
        assert torch.equal(packed.absmax, state.absmax)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 133])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decoding_linear_is_true_to_its_dtype(bias: bool, rows: int, dtype: torch.dtype) -> None:
    """float32 stays float32: bitsandbytes' packed kernel would compute it in bfloat16."""
    weight = nf4.quantize(random_weight(96, 128), "w", False)
    bias_N = random_weight(1, 96, 3)[0].to(dtype) if bias else None
    x_TK = random_weight(rows, 128, 5).to(dtype)
    layer = nf4.NF4Linear(weight, bias_N)
    expected = torch.nn.functional.linear(x_TK, weight.dequantize(dtype), bias_N)
    assert torch.equal(layer(x_TK, None), expected)
    if dtype == torch.float32:
        assert isinstance(nf4.nf4_linear(weight, bias_N, dtype, TORCH), nf4.NF4Linear)
        rounded = x_TK.bfloat16() @ weight.dequantize(torch.bfloat16).T
        assert (rounded.float() - (expected - (0 if bias_N is None else bias_N))).abs().max() > 0.01


@needs_panels
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 64), (33, 128), (100, 576), (64, 960)])
@pytest.mark.parametrize("rows", [0, 1, 6, 12, 13, 33, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_panels_of_nf4_equal_those_of_the_decoded_weight_to_the_bit(
    rows: int, shape: tuple[int, int], bias: bool, dtype: torch.dtype
) -> None:
    """bitsandbytes' own decoding, rounded to the dtype as it does on a GPU."""
    weight = nf4.quantize(random_weight(*shape), "w", False)
    bias_N = random_weight(1, shape[0], 3)[0].to(dtype) if bias else None
    x_TK = random_weight(rows, shape[1], 5).to(dtype)
    layer = nf4.nf4_linear(weight, bias_N, dtype, CPU)
    assert isinstance(layer, PanelLinear)
    decoded = dense_linear(weight.dequantize(dtype), bias_N, 1, CPU)
    assert isinstance(decoded, PanelLinear)
    assert torch.equal(layer(x_TK, None), decoded(x_TK, None))
    if rows:
        codes = weight.codes.clone()
        codes[-1] ^= 0x08
        other = nf4.nf4_linear(replace(weight, codes=codes), bias_N, dtype, CPU)
        assert not torch.equal(other(x_TK, None), layer(x_TK, None))


@needs_panels
@pytest.mark.parametrize("block", [64, 128])
def test_panels_take_the_block_size_of_a_checkpoint(block: int) -> None:
    weight = nf4.quantize(random_weight(40, 256), "w", False)
    scales = weight.absmax.view(40, -1, block // 64)[..., 0].flatten().contiguous()
    weight = replace(weight, absmax=scales, block=block)
    x_TK = random_weight(5, 256, 5)
    expected = dense_linear(weight.dequantize(torch.float32), None, 1, CPU)(x_TK, None)
    assert torch.equal(nf4.nf4_linear(weight, None, torch.float32, CPU)(x_TK, None), expected)


@needs_panels
def test_panels_of_nf4_take_a_quarter_of_the_bytes() -> None:
    weight = nf4.quantize(random_weight(64, 1024), "w", False)
    dense = dense_linear(weight.dequantize(torch.bfloat16), None, 1, CPU).num_bytes
    assert nf4.nf4_linear(weight, None, torch.bfloat16, CPU).num_bytes < 0.29 * dense


@needs_avx512_bf16
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 133])
def test_packed_cpu_linear_is_near_the_decoding_one(bias: bool, rows: int) -> None:
    weight = nf4.quantize(random_weight(96, 128), "w", False)
    bias_N = random_weight(1, 96, 3)[0].bfloat16() if bias else None
    x_TK = random_weight(rows, 128, 5).bfloat16()
    layer = nf4.nf4_linear(weight, bias_N, torch.bfloat16, TORCH)
    assert isinstance(layer, nf4.PackedNF4Linear)
    exact = nf4.NF4Linear(weight, bias_N)(x_TK, None).float()
    relative = (layer(x_TK, None).float() - exact).norm() / exact.norm()
    assert relative < 0.006
    other = nf4.quantize(random_weight(96, 128) * 1.01, "w", False)
    wrong = nf4.PackedNF4Linear(other, bias_N)(x_TK, None).float()
    assert (wrong - exact).norm() / exact.norm() > 0.006


@needs_avx512_bf16
def test_shapes_the_cpu_kernel_cannot_tile_are_decoded() -> None:
    weight = nf4.quantize(random_weight(100, 128), "w", False)
    layer = nf4.nf4_linear(weight, None, torch.bfloat16, TORCH)
    assert isinstance(layer, nf4.NF4Linear)
    assert layer(torch.ones(2, 128, dtype=torch.bfloat16), None).shape == (2, 100)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_quantized_while_loading_equals_transformers(
    family: str, double_quant: bool, tmp_path: Path
) -> None:
    folder = tiny_models.build(family, tmp_path / "model")
    expected = reference_logits(reference_model(folder, torch.float32, double_quant))
    ours = decoder_of(folder, quantize="nf4", double_quant=double_quant)
    assert (logits(ours) - expected).abs().max() < ATOL_FP32
    other = decoder_of(folder, quantize="nf4", double_quant=not double_quant)
    assert (logits(other) - expected).abs().max() > 10 * ATOL_FP32


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_checkpoints_in_nf4_are_served_as_they_are(
    family: str, double_quant: bool, quantize: str, tmp_path: Path
) -> None:
    plain = tiny_models.build(family, tmp_path / "plain")
    made = reference_model(plain, torch.float32, double_quant)
    made.save_pretrained(tmp_path / "nf4")
    expected = reference_logits(reference_model(tmp_path / "nf4", torch.float32, None))
    decoder = decoder_of(tmp_path / "nf4", quantize=quantize)
    assert decoder.spec.prequantized
    assert (logits(decoder) - expected).abs().max() < ATOL_FP32
    dense = decoder_of(plain)
    assert (logits(dense) - expected).abs().max() > 100 * ATOL_FP32
    assert decoder.num_bytes < dense.num_bytes / 2


@needs_avx512_bf16
def test_bfloat16_on_the_cpu_is_as_near_the_truth_as_transformers(tmp_path: Path) -> None:
    folder = tiny_models.build("llama", tmp_path / "model", dtype=torch.bfloat16)
    truth = reference_logits(reference_model(folder, torch.float32, False))
    config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    packed = tiny_models.load_reference(
        folder,
        torch.bfloat16,
        quantization_config=BitsAndBytesConfig(**config, bnb_4bit_compute_dtype=torch.bfloat16),
    )
    theirs = (reference_logits(packed) - truth).abs().mean()
    ours = (logits(decoder_of(folder, torch.bfloat16, quantize="nf4")) - truth).abs().mean()
    dense = (logits(decoder_of(folder, torch.bfloat16)) - truth).abs().mean()
    assert ours < 1.15 * theirs < dense


def test_head_and_embedding_are_not_quantized(tmp_path: Path) -> None:
    folder = tiny_models.build("llama", tmp_path / "model", tie_word_embeddings=True)
    linear_bytes = sum(
        site.in_features * site.out_features for site in decoder_of(folder).sites
    ) * (0.5 + 4 / 64)
    norms_and_rope = 5 * 64 * 4 + 128 * 16 * 4
    table = tiny_models.VOCAB_SIZE * 64 * 4
    decoder = decoder_of(folder, quantize="nf4")
    assert decoder.num_bytes == linear_bytes + norms_and_rope + table


def test_layers_a_checkpoint_leaves_unquantized_stay_so(tmp_path: Path) -> None:
    plain = tiny_models.build("llama", tmp_path / "plain")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", "model.layers.0.mlp"],
    )
    made = tiny_models.load_reference(plain, torch.float32, quantization_config=config)
    made.save_pretrained(tmp_path / "nf4")
    expected = reference_logits(reference_model(tmp_path / "nf4", torch.float32, None))
    decoder = decoder_of(tmp_path / "nf4", quantize="nf4")
    assert (logits(decoder) - expected).abs().max() < ATOL_FP32


def quantized_folder(tmp_path: Path) -> Path:
    plain = tiny_models.build("llama", tmp_path / "plain")
    reference_model(plain, torch.float32, False).save_pretrained(tmp_path / "nf4")
    return tmp_path / "nf4"


@pytest.mark.parametrize("suffix", [".absmax", ".quant_map", ""])
def test_a_part_missing_from_an_nf4_tensor_is_named(suffix: str, tmp_path: Path) -> None:
    path = quantized_folder(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.k_proj.weight" + suffix
    del tensors[name]
    save_file(tensors, path)
    with pytest.raises(ModelError, match=f"no tensor {name}$"):
        decoder_of(path.parent)


def test_a_damaged_nf4_tensor_is_named(tmp_path: Path) -> None:
    path = quantized_folder(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.k_proj.weight.absmax"
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.k_proj\.weight.*damaged"):
        decoder_of(path.parent)


def test_a_pack_half_in_nf4_is_refused(tmp_path: Path) -> None:
    path = quantized_folder(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.k_proj.weight"
    for suffix in (".absmax", ".quant_map", nf4.STATE_SUFFIX):
        del tensors[name + suffix]
    tensors[name] = torch.zeros(32, 64)
    save_file(tensors, path)
    with pytest.raises(ModelError, match="all or none"):
        decoder_of(path.parent)


def test_widths_that_blocks_do_not_divide_are_refused_by_name(tmp_path: Path) -> None:
    folder = tiny_models.build("llama", tmp_path / "model", intermediate_size=96)
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.down_proj.*96.*--quantize none"):
        decoder_of(folder, quantize="nf4")


def test_double_quant_is_refused_where_it_would_mean_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="--double-quant needs --quantize nf4"):
        decoder_of(tiny_models.build("llama", tmp_path / "m"), double_quant=True)
    with pytest.raises(ModelError, match="quantized already"):
        decoder_of(quantized_folder(tmp_path), quantize="nf4", double_quant=True)
