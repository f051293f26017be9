"""Folds the base into an adapter that needs it: DoRA's gains, and biases in place of the base's.

    gain = magnitude / ||W + scale B A||, output by output      B' = gain B
    bias = trained bias or base bias - gain * base bias

Then y = gain * (x W + base bias) + scale * (x A) B' + bias is what PEFT computes. And whole ends
that are the base's own, or each other's, are dropped (`base_copies`). It is done once for each
blob, beside the steps: W is taken in blocks, and between two of them whoever waits for a core has
it. A blob is of one revision and an engine has one base, so the host tier's blobs are all the
memory there is of it. It must not know files, budgets, or how a base keeps its weights.

Legend: N out features, K in features, R rank.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from lory_server.adapters.base_copies import WholeEnds
from lory_server.adapters.blob import AdapterBlob
from lory_server.adapters.errors import AdapterInvalidError
from lory_server.adapters.header import TensorSpec
from lory_server.adapters.manifest import AdapterSlice, ChunkKind
from lory_server.giving_way import pause_between_pieces
from lory_server.model.sites import Site

CPU_BLOCK_WEIGHTS = 1 << 17
"""A quarter of a millisecond of one thread: 1.2 to 1.5 ns a weight on a Zen 5 core."""

CUDA_BLOCK_WEIGHTS = 1 << 22
"""16 MiB, beside the same again while it is decoded."""


class BaseLinear(Protocol):
    """What it takes of a site's linear (lory_server.model.linear)."""

    bias_N: Tensor | None

    def row_blocks(self, rows: range, max_weights: int) -> Iterator[Tensor]: ...


class BaseFolder:
    """Serves one thread."""

    def __init__(
        self, sites: Sequence[Site], linears: Sequence[BaseLinear], device: torch.device
    ) -> None:
        """`linears`: of the base, in the order of `sites`; the embedding's rows are its columns."""
        self._ends = WholeEnds(sites, linears)
        self._sites = sites
        self._linears = linears
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        on_cuda = self._stream is not None
        self._block_weights = CUDA_BLOCK_WEIGHTS if on_cuda else CPU_BLOCK_WEIGHTS

    @torch.inference_mode()
    def fold(self, blob: AdapterBlob) -> AdapterBlob:
        """In place, or a smaller one; raises AdapterInvalidError for what has no finite result."""
        with self._beside_the_steps():
            blob = self._ends.without_copies(blob, self._block_weights)
            for part, starts in blob.manifest.placed(blob.chunk_starts):
                if part.needs_base:
                    self._fold_slice(part, _Chunks(blob.data, starts))
        return blob

    @contextmanager
    def _beside_the_steps(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield

    def _fold_slice(self, part: AdapterSlice, chunks: "_Chunks") -> None:
        linear = self._linears[part.site]
        offset = self._sites[part.site].slices[part.slice].out_offset
        rows = range(offset, offset + part.out_features)
        gain_N = chunks.vector("gain", part.out_features) if part.magnitude else None
        if part.magnitude and gain_N is not None:
            gain_N.div_(self._norms(part, chunks, linear, rows))
            _check_finite(part.magnitude, gain_N)
            b_RN = chunks.matrix("b", part.rank, part.out_features)
            b_RN.copy_(b_RN.float() * gain_N)
            _check_finite(part.magnitude, b_RN)
        if linear.bias_N is not None:
            base_N = linear.bias_N[rows.start : rows.stop].float().cpu()
            bias_N = chunks.vector("bias", part.out_features)
            if part.bias is None:
                bias_N.add_(base_N)
            bias_N.sub_(base_N if gain_N is None else gain_N * base_N)

    def _norms(
        self, part: AdapterSlice, chunks: "_Chunks", linear: BaseLinear, rows: range
    ) -> Tensor:
        """||W + scale B A|| of each output, on the host."""
        assert part.a is not None
        a_RK = _factor_a(part.a, part.is_lookup, chunks).to(self._device, torch.float32)
        b_RN = chunks.matrix("b", part.rank, len(rows)).to(self._device, torch.float32)
        norms_N = torch.empty(len(rows), device=self._device)
        done, started_s = 0, time.thread_time()
        for block_NK in linear.row_blocks(rows, self._block_weights):
            end = done + block_NK.shape[0]
            block_NK.addmm_(b_RN[:, done:end].T, a_RK, alpha=part.scale)
            torch.linalg.vector_norm(block_NK, dim=1, out=norms_N[done:end])
            done = end
            if self._stream is None:
                pause_between_pieces(time.thread_time() - started_s)
                started_s = time.thread_time()
        return norms_N.cpu()


def _factor_a(a: TensorSpec, is_transposed: bool, chunks: "_Chunks") -> Tensor:
    """A as [R, K], however it lies."""
    rank, columns = a.shape
    return chunks.matrix("a", columns, rank).T if is_transposed else chunks.matrix("a", *a.shape)


class _Chunks:
    """Those of one slice, in the blob's own memory."""

    def __init__(self, data: Tensor, starts: Mapping[ChunkKind, int]) -> None:
        self._data = data
        self._starts = starts

    def matrix(self, kind: ChunkKind, rows: int, columns: int) -> Tensor:
        start = self._starts[kind]
        return self._data[start : start + rows * columns].view(rows, columns)

    def vector(self, kind: ChunkKind, length: int) -> Tensor:
        start = self._starts[kind]
        size = length * torch.float32.itemsize // self._data.element_size()
        return self._data[start : start + size].view(torch.float32)


def _check_finite(magnitude: TensorSpec, numbers: Tensor) -> None:
    if not numbers.isfinite().all():
        name = str(numbers.dtype).removeprefix("torch.")
        raise AdapterInvalidError(
            f"tensor {magnitude.name!r} cannot be applied to this base: divided by the norms of the"
            f" weights it gives numbers that are not finite in {name}"
        )
