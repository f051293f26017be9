"""Thousands of adapters, made in seconds and gone when they have been measured.

Each has weights of its own: those of one adapter of its rank, shifted by as many rows as its number
says. Speed does not depend on what weights say, but bytes that differ are bytes that no cache of a
processor or a disk has already. It must not know how they are served.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.models import Shape, adapter_config, adapter_tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
SHIFT = 64
"""Elements between the weights of two neighbours."""


@dataclass(frozen=True)
class Crowd:
    """Adapters of one rank, on all seven projections."""

    shape: Shape
    rank: int
    count: int

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"r{self.rank}-{number:05d}" for number in range(self.count))


@contextmanager
def gathered(crowds: Sequence[Crowd], parent: Path) -> Iterator[Path]:
    """A folder with all of them, as long as the block lasts."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="crowd-", dir=parent))
    try:
        for crowd in crowds:
            make(crowd, folder)
        yield folder
    finally:
        shutil.rmtree(folder)


def make(crowd: Crowd, folder: Path) -> None:
    """The configuration is one file with many names."""
    tensors = adapter_tensors(crowd.shape, crowd.rank, seed=0)
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    config = folder / f".config-r{crowd.rank}.json"
    config.write_text(json.dumps(adapter_config(crowd.shape, crowd.rank), indent=1) + "\n")
    for number, name in enumerate(crowd.names):
        (folder / name).mkdir()
        shifted = torch.roll(flat, number * SHIFT)
        save_file(_like(tensors, shifted), folder / name / WEIGHTS, metadata={"format": "pt"})
        os.link(config, folder / name / CONFIG)


def forget_pages(folder: Path, names: Sequence[str]) -> None:
    """Let the system drop what it keeps of these adapters' files, so that they come from disk."""
    for name in names:
        fd = os.open(folder / name / WEIGHTS, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _like(tensors: dict[str, Tensor], flat: Tensor) -> dict[str, Tensor]:
    """`flat`, cut as `tensors` are."""
    pieces = flat.split([tensor.numel() for tensor in tensors.values()])
    return {
        name: piece.view(tensor.shape)
        for (name, tensor), piece in zip(tensors.items(), pieces, strict=True)
    }
