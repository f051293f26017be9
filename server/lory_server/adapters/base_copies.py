"""Drops whole embeddings and heads that an adapter's file repeats.

PEFT writes the base's own embedding or head beside LoRA on it, a gigabyte that is nearly always the
base's, and a tied pair twice. What is equal to the base's is dropped; of two that are equal, or
were one tensor in PEFT, one is kept. What stays is an end of the adapter's own. It must not know
files, budgets, or how a base keeps its weights.

Legend: N rows, K columns of a linear.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from lory_server.adapters.blob import AdapterBlob, new_blob
from lory_server.adapters.errors import AdapterInvalidError
from lory_server.adapters.manifest import FullWeight, is_end
from lory_server.giving_way import pause_between_pieces
from lory_server.model.sites import EMBEDDING_MODULE, HEAD_MODULE, Site


class Rows(Protocol):
    """What it takes of a linear (lory_server.model.linear)."""

    def row_blocks(self, rows: range, max_weights: int) -> Iterator[Tensor]: ...


class WholeEnds:
    def __init__(self, sites: Sequence[Site], linears: Sequence[Rows]) -> None:
        """`linears` in the order of `sites`; the embedding's rows are its columns."""
        self._linears = {
            part.module: linear
            for site, linear in zip(sites, linears, strict=True)
            for part in site.slices
            if is_end(part.module)
        }
        self._modules_of_sites = [site.slices[0].module for site in sites]

    def without_copies(self, blob: AdapterBlob, block_weights: int) -> AdapterBlob:
        """The same blob if nothing is dropped."""
        kept = [
            weight
            for weight in blob.manifest.full
            if not (weight.may_be_base and self._is_base(blob, weight, block_weights))
        ]
        kept = _one_of_each(blob, kept)
        self._check_no_gain(blob, kept)
        if kept and blob.manifest.invocation_tokens:
            raise AdapterInvalidError(
                f"tensor {kept[0].spec.name!r} is another weight than the base's, and acts before"
                " the invocation tokens, too; train an aLoRA without it"
            )
        return blob if kept == list(blob.manifest.full) else _with_only(blob, kept)

    def _is_base(self, blob: AdapterBlob, weight: FullWeight, block_weights: int) -> bool:
        matrix_NK = full_matrix(blob, weight)
        if weight.module == EMBEDDING_MODULE:
            matrix_NK = matrix_NK.T
        done, started_s = 0, time.thread_time()
        num_rows = matrix_NK.shape[0]
        for base_NK in self._linears[weight.module].row_blocks(range(num_rows), block_weights):
            end = done + base_NK.shape[0]
            if not torch.equal(matrix_NK[done:end].to(base_NK), base_NK):
                return False
            done = end
            if base_NK.device.type == "cpu":
                pause_between_pieces(time.thread_time() - started_s)
                started_s = time.thread_time()
        return True

    def _check_no_gain(self, blob: AdapterBlob, kept: list[FullWeight]) -> None:
        """DoRA's norms are of the base's weights."""
        gains = {
            self._modules_of_sites[part.site]
            for part in blob.manifest.slices
            if part.magnitude is not None
        }
        for weight in kept:
            ends = (EMBEDDING_MODULE, HEAD_MODULE) if weight.is_tied else (weight.module,)
            if gains.intersection(ends):
                raise AdapterInvalidError(
                    f"tensor {weight.spec.name!r} is in place of the base's weight: DoRA over it"
                    " is not served; leave one of the two out"
                )


def full_matrix(blob: AdapterBlob, weight: FullWeight) -> Tensor:
    """A full weight in the blob's own memory, in its shape."""
    start = blob.full_starts[blob.manifest.full.index(weight)]
    return blob.data[start : start + weight.numel].view(weight.spec.shape)


def _one_of_each(blob: AdapterBlob, kept: list[FullWeight]) -> list[FullWeight]:
    """Two whole ends become one that is both, if they are equal or were one tensor in PEFT, which
    loads the head last."""
    ends = [weight for weight in kept if is_end(weight.module) and not weight.token_ids]
    if len(ends) < 2:
        return kept
    first, last = ends[0], ends[-1]
    were_one = first.is_tied and last.is_tied
    if not were_one and not torch.equal(full_matrix(blob, first), full_matrix(blob, last)):
        return kept
    tied = replace(last, is_tied=True)
    return [tied if weight is last else weight for weight in kept if weight is not first]


def _with_only(blob: AdapterBlob, kept: list[FullWeight]) -> AdapterBlob:
    """A blob without the other full weights; `kept` may differ in what they are for."""
    old = {weight.spec.name: weight for weight in blob.manifest.full}
    manifest = replace(blob.manifest, full=tuple(kept))
    num_bytes = manifest.num_bytes(blob.data.element_size())
    data = torch.zeros(num_bytes, dtype=torch.uint8).view(blob.data.dtype)
    smaller = replace(new_blob(blob.revision, manifest, data), manner=blob.manner)
    data[: blob.pool_numel] = blob.data[: blob.pool_numel]
    for weight in kept:
        full_matrix(smaller, weight).copy_(full_matrix(blob, old[weight.spec.name]))
    return smaller
