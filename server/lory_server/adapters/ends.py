"""What one resident adapter has beside the linears of the layers, as tensors on the device.

    embedding, norms -> layers -> norm -> head        its own, or rows or a sum of its own

Made when an adapter has been copied, read by the model (`lory_server.model.ends`) for as long as
its slot is shown. It must not know files, slots or schedules.

Legend: V vocabulary, H hidden, R rank, N tokens.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor

from lory_server.adapters.manifest import (
    VECTOR_BYTES,
    AdapterManifest,
    AdapterSlice,
    ChunkKind,
    FullWeight,
)
from lory_server.model.sites import EMBEDDING_MODULE, HEAD_MODULE, Site


@dataclass(frozen=True, slots=True, eq=False)
class TokenRows:
    """Rows of an embedding or head for some tokens."""

    ids_N: Tensor
    """int64, in the order of the rows."""
    sorted_N: Tensor
    order_N: Tensor
    """Row order_N[i] is that of token sorted_N[i]."""
    rows_NH: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Lookup:
    """LoRA on the embedding: gain * embedding[token] + scale * a[token] @ b."""

    a_VR: Tensor
    b_RH: Tensor
    scale: float
    gain_H: Tensor | None
    """float32."""


@dataclass(frozen=True, slots=True, eq=False)
class Ends:
    embedding_VH: Tensor | None = None
    embedding_rows: TokenRows | None = None
    lookup: Lookup | None = None
    head_VH: Tensor | None = None
    head_rows: TokenRows | None = None
    head_rank: int = 0
    """Of LoRA on the head, in the pool's tables like any linear's."""
    adapts_head: bool = False
    head_has_gain_or_bias: bool = False
    norms: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))
    """By module."""

    @property
    def changes_embedding(self) -> bool:
        return any(
            part is not None for part in (self.embedding_VH, self.embedding_rows, self.lookup)
        )

    @property
    def changes_head(self) -> bool:
        return self.adapts_head or self.head_VH is not None or self.head_rows is not None


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """Numbers on the device, and where an adapter's are."""

    data: Tensor
    """One dimension."""
    starts: tuple[int, ...]
    """In bytes."""

    def matrix(self, start: int, *shape: int) -> Tensor:
        first = start // self.data.element_size()
        numel = torch.Size(shape).numel()
        return self.data[first : first + numel].view(shape)


def make_ends(
    manifest: AdapterManifest,
    sites: tuple[Site, ...],
    pool: Placed,
    full: Placed,
    unit_offset_norms: bool,
) -> Ends | None:
    """None: the adapter changes linears of the layers alone. Any thread may make them."""
    ends = Ends()
    for part, places in manifest.placed(pool.starts):
        module = sites[part.site].slices[part.slice].module
        if module == EMBEDDING_MODULE:
            ends = replace(ends, lookup=_lookup(part, places, pool))
        elif module == HEAD_MODULE:
            ends = replace(
                ends,
                adapts_head=True,
                head_rank=part.rank,
                head_has_gain_or_bias="gain" in places or "bias" in places,
            )
    norms: dict[str, Tensor] = {}
    # Heads last: one of the adapter's own goes before a tied embedding.
    in_order = sorted(
        zip(manifest.full, full.starts, strict=True), key=lambda one: one[0].module == HEAD_MODULE
    )
    for weight, start in in_order:
        tensor = full.matrix(start, *weight.spec.shape)
        if weight.module in (EMBEDDING_MODULE, HEAD_MODULE):
            ends = replace(ends, **dict(_fields(weight, tensor)))
        else:
            norms[weight.module] = 1.0 + tensor.float() if unit_offset_norms else tensor
    if norms:
        ends = replace(ends, norms=MappingProxyType(norms))
    changes_any = ends.changes_embedding or ends.changes_head or ends.norms
    return ends if changes_any else None


def _lookup(part: AdapterSlice, places: Mapping[ChunkKind, int], pool: Placed) -> Lookup:
    assert part.a is not None
    rank, vocab = part.a.shape
    hidden = part.out_features
    gain_H = None
    if "gain" in places:
        size = hidden * VECTOR_BYTES // pool.data.element_size()
        gain_H = pool.matrix(places["gain"], size).view(torch.float32)
    return Lookup(
        pool.matrix(places["a"], vocab, rank),
        pool.matrix(places["b"], rank, hidden),
        part.scale,
        gain_H,
    )


def _fields(weight: FullWeight, tensor: Tensor) -> Iterator[tuple[str, Tensor | TokenRows]]:
    """What a whole end, or rows of one, are in `Ends`."""
    names = ("embedding", "head") if weight.is_tied else (_END_NAMES[weight.module],)
    if not weight.token_ids:
        yield from ((f"{name}_VH", tensor) for name in names)
        return
    ids_N = torch.tensor(weight.token_ids)
    sorted_N, order_N = torch.sort(ids_N)
    device = tensor.device
    rows = TokenRows(ids_N.to(device), sorted_N.to(device), order_N.to(device), tensor)
    yield from ((f"{name}_rows", rows) for name in names)


_END_NAMES = {EMBEDDING_MODULE: "embedding", HEAD_MODULE: "head"}
