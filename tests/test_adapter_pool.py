"""The pool hands out places that never overlap, never leak, and are found through the tables."""

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_files import BASE, HIDDEN, SITES, write_adapter
from lory_server.adapters.blob import read_blob
from lory_server.adapters.copier import HostCopier, StagedCopier, runs
from lory_server.adapters.extents import Allocation, ExtentAllocator
from lory_server.adapters.format import read_manifest
from lory_server.adapters.pool import AdapterPool
from lory_server.adapters.store import AdapterStore

GRAIN = 64


def test_an_adapter_takes_the_first_extent_that_holds_it() -> None:
    extents = ExtentAllocator(10 * GRAIN, GRAIN)
    first, second = extents.allocate([GRAIN, GRAIN]), extents.allocate([GRAIN] * 3)
    assert first is not None
    assert second is not None
    assert second.chunk_starts == (2 * GRAIN, 3 * GRAIN, 4 * GRAIN)
    extents.free(first)
    third = extents.allocate([GRAIN])
    assert third is not None
    assert third.chunk_starts == (0,)
    extents.check()


def test_freed_neighbours_become_one_extent() -> None:
    extents = ExtentAllocator(6 * GRAIN, GRAIN)
    parts = [extents.allocate([2 * GRAIN]) for _ in range(3)]
    assert extents.allocate([1]) is None
    for index in (0, 2, 1):
        part = parts[index]
        assert part is not None
        extents.free(part)
        extents.check()
    whole = extents.allocate([6 * GRAIN])
    assert whole is not None
    assert len(whole.extents) == 1


def test_a_scattered_adapter_is_split_between_chunks_only() -> None:
    extents = ExtentAllocator(8 * GRAIN, GRAIN)
    parts = [extents.allocate([2 * GRAIN]) for _ in range(4)]
    for index in (0, 2):
        part = parts[index]
        assert part is not None
        extents.free(part)
    assert extents.allocate([3 * GRAIN, GRAIN]) is None
    split = extents.allocate([GRAIN, 2 * GRAIN, GRAIN])
    assert split is not None
    assert len(split.extents) == 2
    assert extents.free_bytes == 0


def test_freeing_twice_is_caught() -> None:
    extents = ExtentAllocator(4 * GRAIN, GRAIN)
    part = extents.allocate([GRAIN])
    assert part is not None
    extents.free(part)
    with pytest.raises(AssertionError):
        extents.free(part)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=6), max_size=40), st.randoms())
def test_places_never_overlap_and_what_is_promised_fits(
    wishes: list[list[int]], rng: random.Random
) -> None:
    extents = ExtentAllocator(40 * GRAIN, GRAIN)
    held: list[tuple[Allocation, Sequence[int]]] = []
    for wish in wishes:
        promised = extents.padded(sum(wish)) <= extents.placeable_bytes(max(wish))
        allocation = extents.allocate(wish)
        assert allocation is not None or not promised
        if allocation is not None:
            held.append((allocation, wish))
        if held and rng.random() < 0.4:
            extents.free(held.pop(rng.randrange(len(held)))[0])
        extents.check()
        taken = sorted(
            (start, start + size)
            for allocation, sizes in held
            for start, size in zip(allocation.chunk_starts, sizes, strict=True)
        )
        assert all(a[1] <= b[0] for a, b in pairwise(taken))
        for allocation, sizes in held:
            for start, size in zip(allocation.chunk_starts, sizes, strict=True):
                assert any(
                    e.start <= start and start + size <= e.start + e.size
                    for e in allocation.extents
                )
    for allocation, _ in held:
        extents.free(allocation)
    assert extents.placeable_bytes(300) == extents.total_bytes


def _chunks_of_8b(rank: int) -> list[int]:
    """The chunks of an adapter on an 8B model's shapes, scaled down 32 times."""
    shapes = [(128, 128), (128, 32), (128, 32), (128, 128), (128, 448), (128, 448), (448, 128)]
    return [2 * rank * side for _ in range(32) for shape in shapes for side in shape]


def test_mixed_ranks_keep_85_percent_of_the_pool_usable() -> None:
    """Random loads and evictions; whenever an adapter is turned away, the pool is nearly full."""
    rng = random.Random(0)
    sizes = {rank: _chunks_of_8b(rank) for rank in (1, 4, 8, 16, 32, 64)}
    extents = ExtentAllocator(40 * sum(sizes[16]), 4096)
    held: list[Allocation] = []
    worst, refused = 1.0, 0
    for _ in range(3000):
        chunks = sizes[rng.choice(list(sizes))]
        while (allocation := extents.allocate(chunks)) is None:
            refused += 1
            worst = min(worst, (extents.used_bytes + sum(chunks)) / extents.total_bytes)
            extents.free(held.pop(rng.randrange(len(held))))
        held.append(allocation)
    extents.check()
    assert refused > 1000
    assert worst >= 0.85


# -- tables and copies ----------------------------------------------------------------------


def make_pool(num_bytes: int, max_slots: int = 3, grain_bytes: int = GRAIN) -> AdapterPool:
    return AdapterPool(
        num_bytes,
        torch.float32,
        torch.device("cpu"),
        SITES,
        max_slots,
        grain_bytes=grain_bytes,
    )


@pytest.mark.parametrize("scattered", [False, True])
def test_the_tables_lead_to_the_adapters_factors(scattered: bool, tmp_path: Path) -> None:
    write_adapter(tmp_path / "x", 3, ("q_proj", "v_proj", "down_proj"), layers_to_transform=None)
    with AdapterStore(tmp_path).locate("x") as files:
        manifest = read_manifest(files.config_fd, files.weights_fd, BASE)
        blob = read_blob(files.weights_fd, manifest, torch.float32)
    pool = make_pool(64 * 1024)
    if scattered:
        blocks = [pool.extents.allocate([1024]) for _ in range(64)]
        for block in blocks[::2]:
            assert block is not None
            pool.extents.free(block)
    footprint = pool.footprint(manifest)
    allocation = pool.allocate(footprint)
    assert allocation is not None
    assert (len(list(runs(blob, allocation))) > 1) == scattered
    pool.publish(1, HostCopier(pool).copy(blob, footprint.columns, allocation))
    adapted = {(part.site, part.slice): index for index, part in enumerate(manifest.slices)}
    for i, (site, table) in enumerate(zip(SITES, pool.tables, strict=True)):
        assert table.in_features == site.in_features
        assert not table.rank_SK[0].any()
        assert not table.rank_SK[2].any()
        for offset_SK in (table.gain_offset_SK, table.bias_offset_SK):
            assert offset_SK is not None
            assert (offset_SK == -1).all()
        for k, part in enumerate(site.slices):
            rank = int(table.rank_SK[1, k])
            index = adapted.get((i, k))
            assert rank == (0 if index is None else 3)
            if index is None:
                continue
            assert float(table.scale_SK[1, k]) == manifest.slices[index].scale
            for chunk, start, width in (
                (2 * index, int(table.a_offset_SK[1, k]), site.in_features),
                (2 * index + 1, int(table.b_offset_SK[1, k]), part.out_features),
            ):
                source = blob.chunk_starts[chunk]
                length = rank * width
                assert start * 4 % 64 == 0
                assert torch.equal(
                    pool.data[start : start + length], blob.data[source : source + length]
                )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_pool_gets_the_same_bytes_through_the_ring(tmp_path: Path) -> None:
    write_adapter(tmp_path / "x", 16)
    with AdapterStore(tmp_path).locate("x") as files:
        manifest = read_manifest(files.config_fd, files.weights_fd, BASE)
        blob = read_blob(files.weights_fd, manifest, torch.float32)
    pool = AdapterPool(1 << 20, torch.float32, torch.device("cuda", 0), SITES, 2)
    footprint = pool.footprint(manifest)
    allocation = pool.allocate(footprint)
    assert allocation is not None
    pool.publish(1, StagedCopier(pool, buffer_bytes=4096).copy(blob, footprint.columns, allocation))
    start = allocation.chunk_starts[0] // 4
    assert torch.equal(pool.data[start : start + blob.data.numel()].cpu(), blob.data)
    assert int(pool.tables[0].rank_SK[1, 0]) == 16


def test_the_tables_say_where_slices_lie_in_the_packed_output() -> None:
    pool = make_pool(1024)
    qkv = pool.tables[0]
    assert qkv.out_offsets == (0, HIDDEN, HIDDEN + HIDDEN // 2)
    assert qkv.out_features == (HIDDEN, HIDDEN // 2, HIDDEN // 2)
    assert all(
        t.is_contiguous() for t in (qkv.a_offset_SK, qkv.b_offset_SK, qkv.rank_SK, qkv.scale_SK)
    )
    assert (qkv.a_offset_SK.dtype, qkv.b_offset_SK.dtype) == (torch.int64, torch.int64)
    assert (qkv.rank_SK.dtype, qkv.scale_SK.dtype) == (torch.int32, torch.float32)


def test_impossible_pools_are_refused() -> None:
    with pytest.raises(ValueError, match="max_slots"):
        make_pool(1024, max_slots=0)
    with pytest.raises(ValueError, match="grain_bytes"):
        make_pool(1024, grain_bytes=100)
