"""Adapters on a decoder: at every site, rows get exactly their own slot's factors."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lory_kernels
import tiny_models
from lory_kernels import BASE_SLOT, Segments, SiteTable
from lory_server.messages import EngineOptions
from lory_server.model.decoder import Decoder
from lory_server.model.load import load
from lory_server.model.lora import attach
from lory_server.model.sites import Site
from packed_steps import make_batch, make_kv, random_ids

ATOL = 5e-5
NUM_SLOTS = 2
RANKS = (3, 8)
SCALE = 0.5


@dataclass(frozen=True)
class Factors:
    """A and B of one slot for one slice of a site."""

    module: str
    a_RK: torch.Tensor
    b_RN: torch.Tensor


def decoder_of(folder: Path, **options: Any) -> Decoder:
    engine = EngineOptions(model=str(folder), **options)
    return load(engine, "cpu", torch.float32, lory_kernels.select("torch"))


def random_factors(sites: tuple[Site, ...]) -> list[list[Factors]]:
    """Of every slot, for every slice of every site, in order."""
    generator = torch.Generator().manual_seed(9)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.15

    return [
        [
            Factors(part.module, draw(rank, site.in_features), draw(rank, part.out_features))
            for site in sites
            for part in site.slices
        ]
        for rank in RANKS
    ]


def make_tables(
    sites: tuple[Site, ...], factors: list[list[Factors]]
) -> tuple[list[SiteTable], torch.Tensor]:
    pieces: list[torch.Tensor] = []
    offset = 0

    def put(tensor: torch.Tensor) -> int:
        nonlocal offset
        pieces.append(tensor.flatten())
        offset += tensor.numel()
        return offset - tensor.numel()

    tables: list[SiteTable] = []
    first = 0
    for site in sites:
        count = len(site.slices)
        a_offset, b_offset = (torch.zeros(NUM_SLOTS, count, dtype=torch.int64) for _ in range(2))
        ranks = torch.zeros(NUM_SLOTS, count, dtype=torch.int32)
        for slot in range(NUM_SLOTS):
            for k in range(count):
                part = factors[slot][first + k]
                a_offset[slot, k], b_offset[slot, k] = put(part.a_RK), put(part.b_RN)
                ranks[slot, k] = part.a_RK.shape[0]
        first += count
        tables.append(
            SiteTable(
                in_features=site.in_features,
                out_offsets=tuple(part.out_offset for part in site.slices),
                out_features=tuple(part.out_features for part in site.slices),
                a_offset_SK=a_offset,
                b_offset_SK=b_offset,
                rank_SK=ranks,
                scale_SK=torch.full((NUM_SLOTS, count), SCALE),
            )
        )
    return tables, torch.cat(pieces)


def merged(folder: Path, target: Path, factors: list[Factors]) -> Path:
    """The base with one slot's adapter folded into its weights."""
    target.mkdir()
    for file in folder.glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for part in factors:
        tensors[part.module + ".weight"] += SCALE * part.b_RN.T @ part.a_RK
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def segments_of(sizes: list[int], slots: list[int]) -> Segments:
    starts = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
    adapted = sum(size for size, slot in zip(sizes, slots, strict=True) if slot != BASE_SLOT)
    return Segments(
        starts_G1=torch.tensor(starts, dtype=torch.int32),
        slots_G=torch.tensor(slots, dtype=torch.int32),
        num_rows=sum(sizes),
        num_segments=len(slots),
        max_rank=max(RANKS),
        adapted_rows=adapted,
    )


SEQUENCES = [random_ids(length, tiny_models.VOCAB_SIZE, length) for length in (7, 5, 6)]
TABLES = [[3, 1], [4, 0], [2, 5]]
SLOTS = [1, BASE_SLOT, 0]


def mixed_batch(lora: Segments | None) -> Any:
    return replace(make_batch(SEQUENCES, [0, 0, 0], TABLES), lora=lora)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_each_row_gets_its_own_adapter_and_base_rows_none(family: str, tmp_path: Path) -> None:
    folder = tiny_models.build(family, tmp_path / "base")
    decoder = decoder_of(folder)
    factors = random_factors(decoder.sites)
    attach(decoder, *make_tables(decoder.sites, factors))
    rows = segments_of([len(ids) for ids in SEQUENCES], SLOTS)
    logits_LV = decoder.forward(mixed_batch(rows), make_kv(decoder, 32))
    parts = logits_LV.split([len(ids) for ids in SEQUENCES])
    folders = [merged(folder, tmp_path / f"slot{slot}", factors[slot]) for slot in range(NUM_SLOTS)]
    expected = [
        decoder_of(folder if slot == BASE_SLOT else folders[slot]).forward(
            make_batch([ids], [0], [[1, 2]]), make_kv(decoder, 32)
        )
        for ids, slot in zip(SEQUENCES, SLOTS, strict=True)
    ]
    for ours_LV, theirs_LV in zip(parts, expected, strict=True):
        assert (ours_LV - theirs_LV).abs().max() < ATOL
    swapped = segments_of([len(ids) for ids in SEQUENCES], [0, BASE_SLOT, 1])
    wrong_LV = decoder.forward(mixed_batch(swapped), make_kv(decoder, 32))
    assert (wrong_LV[:7] - expected[0]).abs().max() > 100 * ATOL


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_base_only_batch_is_bit_equal_to_the_bare_base(quantize: str, tmp_path: Path) -> None:
    folder = tiny_models.build("llama", tmp_path / "base")
    bare, adapted = (decoder_of(folder, quantize=quantize) for _ in range(2))
    attach(adapted, *make_tables(adapted.sites, random_factors(adapted.sites)))
    expected = bare.forward(mixed_batch(None), make_kv(bare, 32))
    assert torch.equal(adapted.forward(mixed_batch(None), make_kv(adapted, 32)), expected)
    assert adapted.num_bytes == bare.num_bytes


def test_every_site_is_adapted(tmp_path: Path) -> None:
    """Each site alone moves the logits; one that does not would be wired to nothing."""
    folder = tiny_models.build("llama", tmp_path / "base")
    sites = decoder_of(folder).sites
    factors = random_factors(sites)
    base = decoder_of(folder)
    plain = base.forward(mixed_batch(None), make_kv(base, 32))
    for index in range(len(sites)):
        decoder = decoder_of(folder)
        tables, pool = make_tables(sites, factors)
        for other in set(range(len(sites))) - {index}:
            tables[other].rank_SK.zero_()
        attach(decoder, tables, pool)
        rows = segments_of([len(ids) for ids in SEQUENCES], SLOTS)
        logits_LV = decoder.forward(mixed_batch(rows), make_kv(decoder, 32))
        assert (logits_LV - plain)[:7].abs().max() > 100 * ATOL, sites[index].name


def test_tables_of_another_geometry_are_not_attached(tmp_path: Path) -> None:
    decoder = decoder_of(tiny_models.build("llama", tmp_path / "base"))
    tables, pool = make_tables(decoder.sites, random_factors(decoder.sites))
    with pytest.raises(AssertionError, match="not those of the decoder's sites"):
        attach(decoder, tables[::-1], pool)
    attach(decoder, tables, pool)
    with pytest.raises(AssertionError, match="attached already"):
        attach(decoder, tables, pool)
