"""An adapter's numbers as one contiguous host tensor in the engine's dtype, in pool order.

    blob: | A of slice 0 | B.T of slice 0 | A of slice 1 | B.T of slice 1 | gain of slice 1 | ...
          | full weight 0 | full weight 1 | ...

Chunks are padded; gains and biases are float32, the embedding's A is transposed. A blob that needs
the base (`fold`) has magnitudes in place of gains at first.

The numbers are read once, front to back, through the descriptor that was validated, and hashed on
the way after the manifest's digest: the revision is that of exactly the bytes that were parsed and
decoded. It must not know tiers.
"""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from math import prod
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lory_server.adapters.errors import AdapterInvalidError
from lory_server.adapters.header import DTYPE_BYTES, WEIGHTS_NAME, TensorSpec
from lory_server.adapters.manifest import (
    VECTOR_BYTES,
    AdapterManifest,
    AdapterSlice,
    ChunkKind,
)
from lory_server.messages import NO_MANNER, Manner

REVISION_CHARS = 32
BATCH_BYTES = 256 * 1024
"""Of a file read, hashed and cast at once: few enough that malloc keeps the pages for the next."""

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WORDS = {2: np.uint16, 4: np.uint32}

Words = NDArray[np.uint16] | NDArray[np.uint32]
"""Numbers of any dtype, moved without a look at them."""


@dataclass(frozen=True, slots=True, eq=False)
class AdapterBlob:
    revision: str
    manifest: AdapterManifest
    data: Tensor
    """One dimension, on the host."""
    chunk_starts: tuple[int, ...]
    """Elements from the start of `data` to each chunk of the pool's."""
    full_starts: tuple[int, ...]
    """The same of each full weight; they follow the chunks."""
    num_bytes: int
    manner: Manner = NO_MANNER

    @property
    def pool_numel(self) -> int:
        """Elements that go to the pool."""
        return self.manifest.pool_bytes(self.data.element_size()) // self.data.element_size()


def read_blob(weights_fd: int, manifest: AdapterManifest, dtype: torch.dtype) -> AdapterBlob:
    """A validated adapter in memory of its own; raises as `read_numbers` does."""
    data = torch.zeros(manifest.num_bytes(dtype.itemsize), dtype=torch.uint8).view(dtype)
    return new_blob(read_numbers(weights_fd, manifest, data), manifest, data)


def new_blob(revision: str, manifest: AdapterManifest, data: Tensor) -> AdapterBlob:
    starts, full_starts = _starts(manifest, data.element_size())
    return AdapterBlob(revision, manifest, data, starts, full_starts, data.nbytes)


def with_manner(blob: AdapterBlob, manner: Manner) -> AdapterBlob:
    """The same numbers, asked in that way, which makes another revision of them."""
    return replace(blob, revision=asked_revision(blob.revision, manner.digest), manner=manner)


def asked_revision(revision: str, manner: str) -> str:
    """Of numbers of a revision that are asked in the manner with this digest; empty: in none."""
    if not manner:
        return revision
    return hashlib.sha256(f"{revision} {manner}".encode()).hexdigest()[:REVISION_CHARS]


def read_numbers(weights_fd: int, manifest: AdapterManifest, data: Tensor) -> str:
    """Decode a validated adapter into `data`; the revision of its bytes.

    `data` is zero, of the engine's dtype and as long as all chunks. Raises AdapterInvalidError for
    numbers that are not finite, in the file or in that dtype.
    """
    dtype = data.dtype
    digest = hashlib.sha256(manifest.digest)
    chunks = _chunks_in_file_order(manifest, dtype.itemsize)
    words, vectors = _words(data), data.view(torch.float32).numpy()
    for batch in _batches(chunks):
        raw = _read(weights_fd, batch)
        digest.update(raw.data)
        for run, source in _cast_runs(raw, batch, dtype):
            if not _is_finite(source):
                raise _not_finite(weights_fd, run, source.dtype)
            if run[0].is_vector:
                _add(source.numpy(), run, vectors)
            else:
                _place(_words(source), run, words)
    return digest.hexdigest()[:REVISION_CHARS]


def _starts(manifest: AdapterManifest, itemsize: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Elements from the start to each chunk, and to each full weight."""
    chunks = manifest.chunk_bytes(itemsize)
    sizes = (*chunks, *manifest.full_bytes(itemsize))
    starts = (0, *accumulate(num_bytes // itemsize for num_bytes in sizes))[:-1]
    return starts[: len(chunks)], starts[len(chunks) :]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A tensor and the chunk it goes to."""

    spec: TensorSpec
    kind: ChunkKind | Literal["full"]
    start: int
    """In elements of the chunk's own dtype."""
    factor: float = 1.0
    """Of a vector, which is added to what is there: a bias is made of up to two."""
    is_transposed: bool = False

    @property
    def numel(self) -> int:
        return prod(self.spec.shape)

    @property
    def is_vector(self) -> bool:
        return self.kind in ("gain", "bias")


def _chunks_in_file_order(manifest: AdapterManifest, itemsize: int) -> list[_Chunk]:
    starts, full_starts = _starts(manifest, itemsize)
    chunks = [
        chunk
        for part, places in manifest.placed(starts)
        for chunk in _chunks_of(part, places, itemsize)
    ]
    for weight, start in zip(manifest.full, full_starts, strict=True):
        chunks.extend(_pieces(weight.spec, start))
    return sorted(chunks, key=lambda chunk: chunk.spec.offset)


def _pieces(spec: TensorSpec, start: int) -> Iterator[_Chunk]:
    """A full weight, a bounded piece at a time: an embedding is a gigabyte."""
    size = DTYPE_BYTES[spec.dtype]
    at_once = BATCH_BYTES // size
    for done in range(0, prod(spec.shape), at_once):
        numel = min(at_once, prod(spec.shape) - done)
        offset = spec.offset + done * size
        piece = TensorSpec(spec.name, spec.dtype, (numel,), offset, numel * size)
        yield _Chunk(piece, "full", start + done)


def _chunks_of(
    part: AdapterSlice, places: Mapping[ChunkKind, int], itemsize: int
) -> Iterator[_Chunk]:
    if part.a is not None:
        yield _Chunk(part.a, "a", places["a"], is_transposed=part.is_lookup)
    if part.b is not None:
        yield _Chunk(part.b, "b", places["b"], is_transposed=True)
    if part.magnitude is not None:
        yield _Chunk(part.magnitude, "gain", places["gain"] * itemsize // VECTOR_BYTES)
    for spec, factor in ((part.b_bias, part.scale), (part.bias, 1.0)):
        if spec is not None:
            yield _Chunk(spec, "bias", places["bias"] * itemsize // VECTOR_BYTES, factor)


def _batches(chunks: list[_Chunk]) -> Iterator[list[_Chunk]]:
    """Chunks side by side in the file, of bounded size together unless one alone is larger. What
    is not read (`full_format.drop_copies`) parts them."""
    batch: list[_Chunk] = []
    for chunk in chunks:
        is_apart = bool(batch) and _end(batch[-1]) != chunk.spec.offset
        if is_apart or (batch and _end(chunk) - batch[0].spec.offset > BATCH_BYTES):
            yield batch
            batch = []
        batch.append(chunk)
    yield batch


def _end(chunk: _Chunk) -> int:
    return chunk.spec.offset + chunk.spec.num_bytes


def _read(fd: int, batch: list[_Chunk]) -> NDArray[np.uint8]:
    start = batch[0].spec.offset
    raw = np.empty(_end(batch[-1]) - start, np.uint8)
    done = 0
    while done < len(raw):
        num_bytes = os.preadv(fd, [raw.data[done:]], start + done)
        if num_bytes == 0:
            raise AdapterInvalidError(f"{WEIGHTS_NAME}: the file is truncated")
        done += num_bytes
    return raw


def _cast_runs(
    raw: NDArray[np.uint8], batch: list[_Chunk], dtype: torch.dtype
) -> Iterator[tuple[list[_Chunk], Tensor]]:
    """Chunks of one dtype that lie side by side, and their numbers in `dtype`, or in float32 if
    they are vectors."""
    origin = batch[0].spec.offset
    for (name, is_vector), group in groupby(batch, key=lambda c: (c.spec.dtype, c.is_vector)):
        run = list(group)
        source = torch.frombuffer(
            raw,
            dtype=_DTYPES[name],
            count=sum(chunk.numel for chunk in run),
            offset=run[0].spec.offset - origin,
        )
        yield run, source.to(torch.float32 if is_vector else dtype)


def _words(tensor: Tensor) -> Words:
    return tensor.view(torch.uint8).numpy().view(_WORDS[tensor.element_size()])


def _place(source: Words, run: list[_Chunk], words: Words) -> None:
    """Each tensor into its chunk. numpy's copies, because a view costs it nothing."""
    done = 0
    for chunk in run:
        numbers = source[done : done + chunk.numel]
        target = words[chunk.start : chunk.start + chunk.numel]
        if chunk.is_transposed:
            rows, columns = chunk.spec.shape
            target.reshape(columns, rows)[...] = numbers.reshape(rows, columns).T
        else:
            target[...] = numbers
        done += chunk.numel


def _add(source: NDArray[np.float32], run: list[_Chunk], vectors: NDArray[np.float32]) -> None:
    done = 0
    for chunk in run:
        target = vectors[chunk.start : chunk.start + chunk.numel]
        target += np.float32(chunk.factor) * source[done : done + chunk.numel]
        done += chunk.numel


def _is_finite(numbers: Tensor) -> bool:
    """By the extremes, which NaN spreads to: 40 times as fast as isfinite."""
    low, high = torch.aminmax(numbers)
    return math.isfinite(low) and math.isfinite(high)


def _not_finite(fd: int, run: list[_Chunk], dtype: torch.dtype) -> AdapterInvalidError:
    """Names the first tensor of the run that is to blame."""
    for chunk in run:
        source = torch.frombuffer(_read(fd, [chunk]), dtype=_DTYPES[chunk.spec.dtype])
        if not _is_finite(source):
            reason = "has values that are not finite (NaN or infinity)"
            break
        if not _is_finite(source.to(dtype)):
            name = str(dtype).removeprefix("torch.")
            reason = f"has values that do not fit {name}; serve the base in bfloat16 or float32"
            break
    else:
        raise AssertionError("the file changed")
    return AdapterInvalidError(f"tensor {chunk.spec.name!r} {reason}")
