"""A decoder whose layers were recorded computes the same bits as one whose layers run op by op."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lory_kernels
import tiny_models
from lory_kernels import BASE_SLOT, panels
from lory_kernels.cpu import CpuOps
from lory_server.messages import EngineOptions, Quantization
from lory_server.model.batch import ForwardBatch
from lory_server.model.decoder import Decoder
from lory_server.model.kv import KVCache
from lory_server.model.load import load
from lory_server.model.lora import attach
from packed_steps import make_batch, make_kv, random_ids
from parity_world import ParityWorld, Session
from test_model_lora import make_tables, random_factors, segments_of

pytestmark = pytest.mark.skipif(
    not panels.can_pack(torch.empty((2, 2), dtype=torch.bfloat16)),
    reason="only panel linears can be recorded: they need AVX2, and in bfloat16 no AMX",
)

MAX_TOKENS = 48
TABLES = [[3, 1, 9], [4, 0, 8], [2, 5, 7]]


def adapted_decoder(
    folder: Path,
    threads: int,
    dtype: torch.dtype = torch.bfloat16,
    quantize: Quantization = "none",
) -> Decoder:
    options = EngineOptions(model=str(folder), quantize=quantize)
    decoder = load(options, "cpu", dtype, lory_kernels.select("cpu", threads=threads))
    tables, pool = make_tables(decoder.sites, random_factors(decoder.sites))
    attach(decoder, tables, pool.to(dtype))
    return decoder


def steps() -> list[ForwardBatch]:
    """Prefill and decode, all adapted, none, some; steps that shrink and grow."""
    first = [random_ids(length, tiny_models.VOCAB_SIZE, length) for length in (7, 1, 6)]
    lora = segments_of([7, 1, 6], [1, BASE_SLOT, 0])
    many = replace(make_batch(first, [0, 0, 0], TABLES), lora=lora)
    one = [[5], [6], [7]]
    return [
        many,
        replace(make_batch(one, [7, 1, 6], TABLES), lora=segments_of([1, 1, 1], [0, 1, 1])),
        make_batch(one, [8, 2, 7], TABLES),
        replace(make_batch(one[:1], [9], TABLES[:1]), lora=segments_of([1], [1])),
        replace(make_batch(one, [10, 3, 8], TABLES), lora=segments_of([2, 1], [BASE_SLOT, 0])),
    ]


def run_steps(decoder: Decoder, kv: KVCache) -> list[torch.Tensor]:
    return [decoder.forward(batch, kv) for batch in steps()]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_recorded_layers_compute_the_same_bits(family: str, threads: int, tmp_path: Path) -> None:
    folder = tiny_models.build(family, tmp_path / "model", dtype=torch.bfloat16)
    check_recorded(adapted_decoder(folder, threads), adapted_decoder(folder, threads))


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_precision_with_kernels_is_recorded(
    dtype: torch.dtype, quantize: Quantization, tmp_path: Path
) -> None:
    folder = tiny_models.build("llama", tmp_path / "model", dtype=dtype)
    check_recorded(*(adapted_decoder(folder, 2, dtype, quantize) for _ in range(2)))


def check_recorded(plain: Decoder, recorded: Decoder) -> None:
    plain_kv, recorded_kv = make_kv(plain, 64), make_kv(recorded, 64)
    recorded.record(recorded_kv, MAX_TOKENS)
    assert recorded.is_recorded
    assert not plain.is_recorded
    expected = run_steps(plain, plain_kv)
    for ours, theirs in zip(run_steps(recorded, recorded_kv), expected, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(recorded_kv.keys, plain_kv.keys, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(recorded_kv.values, plain_kv.values, strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_models.build("llama", tmp_path / "model", dtype=torch.bfloat16)


def test_adapters_reach_recorded_layers(folder: Path) -> None:
    decoder = adapted_decoder(folder, 1)
    kv = make_kv(decoder, 64)
    decoder.record(kv, MAX_TOKENS)
    first = steps()[0]
    adapted, base = decoder.forward(first, kv), decoder.forward(replace(first, lora=None), kv)
    assert not torch.allclose(adapted[:7], base[:7], atol=0.05)
    assert torch.equal(adapted[7], base[7])


def test_recording_computes_nothing(folder: Path) -> None:
    decoder = adapted_decoder(folder, 1)
    kv = make_kv(decoder, 64)
    before = decoder.forward(steps()[0], kv)
    keys = [part.clone() for part in kv.keys]
    decoder.record(kv, MAX_TOKENS)
    assert all(torch.equal(now, then) for now, then in zip(kv.keys, keys, strict=True))
    assert torch.equal(decoder.forward(steps()[0], kv), before)


def test_a_step_larger_than_what_was_recorded_is_refused(folder: Path) -> None:
    decoder = adapted_decoder(folder, 1)
    kv = make_kv(decoder, 64)
    decoder.record(kv, 13)
    with pytest.raises(ValueError, match="14 tokens, recorded for 13"):
        decoder.forward(steps()[0], kv)


def test_buffers_are_those_of_one_layer(tmp_path: Path) -> None:
    """However many layers: a buffer that nobody holds any more is used again."""
    sizes: list[int] = []
    for num_layers in (2, 5):
        folder = tiny_models.build(
            "llama",
            tmp_path / str(num_layers),
            dtype=torch.bfloat16,
            num_hidden_layers=num_layers,
        )
        decoder = adapted_decoder(folder, 1)
        decoder.record(make_kv(decoder, 64), MAX_TOKENS)
        sizes.append(decoder.recorded_bytes)
    assert sizes[0] == sizes[1] > 0


def test_layers_that_torch_computes_are_not_recorded(tmp_path: Path) -> None:
    folder = tiny_models.build("llama", tmp_path / "model")
    decoder = adapted_decoder(folder, 1, torch.float16)
    decoder.record(make_kv(decoder, 64), MAX_TOKENS)
    assert not decoder.is_recorded
    assert decoder.recorded_bytes == 0


def test_heads_wider_than_the_kernels_are_not_recorded(tmp_path: Path) -> None:
    """Attention falls back to the reference there, which a program could not hold."""
    folder = tiny_models.build("llama", tmp_path / "model", dtype=torch.bfloat16, head_dim=264)
    plain, asked = adapted_decoder(folder, 1), adapted_decoder(folder, 1)
    plain_kv, asked_kv = make_kv(plain, 64), make_kv(asked, 64)
    asked.record(asked_kv, MAX_TOKENS)
    assert not asked.is_recorded
    for ours, theirs in zip(run_steps(asked, asked_kv), run_steps(plain, plain_kv), strict=True):
        assert torch.equal(ours, theirs)


def test_what_has_no_kernel_is_refused_while_a_program_is_recorded() -> None:
    ops = CpuOps(threads=1)
    half = torch.ones((2, 4), dtype=torch.float16)
    with ops.caller.record(2), pytest.raises(RuntimeError, match="cannot be recorded"):
        ops.rms_norm(half, half[0], 1e-6)
    assert ops.rms_norm(half, half[0], 1e-6).shape == (2, 4)


def test_an_engine_that_preempts_answers_the_same_with_and_without_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base rows alone: what shares a step is then the same in both runs."""
    base = tiny_models.build("llama", tmp_path / "base", dtype=torch.bfloat16)
    world = ParityWorld("llama", base, tmp_path, {})

    def answers() -> tuple[list[list[int]], int]:
        session = Session(world.options(dtype="bfloat16", adapters_dir="", kv_bytes=24 << 10))
        for number in range(8):
            prompt = random_ids(5 + number, tiny_models.VOCAB_SIZE, number)
            session.submit(number, prompt, max_new_tokens=20, ignore_eos=True)
        session.run()
        session.close()
        preemptions = sum(report.preemptions for report in session.reports)
        return [session.answers[number].tokens for number in range(8)], preemptions

    recorded, preemptions = answers()
    monkeypatch.setattr(Decoder, "record", lambda *_: None)
    assert (recorded, preemptions) == answers()
    assert preemptions > 0
    assert all(len(tokens) == 20 for tokens in recorded)
