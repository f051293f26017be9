"""What adapters of one shape have in common lies in memory once."""

from pathlib import Path

import pytest
import torch

from adapter_files import BASE, write_adapter
from lory_server.adapters.blob import AdapterBlob
from lory_server.adapters.reader import ThreadReader
from lory_server.adapters.shapes import Shapes
from lory_server.adapters.store import AdapterStore
from test_adapter_cache import World


def blob_of(root: Path, name: str) -> AdapterBlob:
    reader = ThreadReader(BASE, torch.float32)
    with AdapterStore(root).locate(name) as files:
        return reader.blob(files, reader.manifest(files))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed in range(3):
        write_adapter(tmp_path / f"a{seed}", seed=seed)
    write_adapter(tmp_path / "other", rank=2)
    return tmp_path


def test_adapters_of_one_shape_share_all_but_their_numbers(root: Path) -> None:
    shapes = Shapes()
    first, second = (shapes.shared(blob_of(root, name)) for name in ("a0", "a1"))
    alone, other = blob_of(root, "a1"), shapes.shared(blob_of(root, "other"))
    assert second.manifest.slices is first.manifest.slices
    assert second.chunk_starts is first.chunk_starts
    assert second.manifest == alone.manifest
    assert (second.revision, second.num_bytes) == (alone.revision, alone.num_bytes)
    assert second.data.equal(alone.data)
    assert other.manifest.slices is not first.manifest.slices


def test_shapes_that_nobody_has_had_for_long_are_shared_no_more(root: Path) -> None:
    shapes = Shapes(most=1)
    first = shapes.shared(blob_of(root, "a0"))
    shapes.shared(blob_of(root, "other"))
    again = shapes.shared(blob_of(root, "a1"))
    assert again.manifest.slices is not first.manifest.slices
    assert shapes.shared(blob_of(root, "a2")).manifest.slices is again.manifest.slices
    assert len(shapes._kept) == 1


def test_what_is_loaded_shares(root: Path) -> None:
    world = World(root, 200_000, 16)
    held = [world.hold(name) for name in ("a0", "a1", "a2")]
    blobs = [world.blob(one.revision) for one in held]
    assert len({id(blob.manifest.slices) for blob in blobs}) == 1
    assert len({id(blob.chunk_starts) for blob in blobs}) == 1
    world.cache.close()
