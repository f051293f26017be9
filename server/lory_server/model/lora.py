"""Adapters, applied to a decoder from outside: y = base(x), then SGMV adds each row's own part.

    y[rows] = gain * y[rows] + scale * (x[rows] @ A) @ B + bias     for every segment and its slot

A batch without adapted rows carries `lora=None` and pays nothing. This module must not know
where an adapter came from, who owns a slot, or any model family. Legend: T tokens, K in features.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from lory_kernels import Ops, Segments, SiteTable
from lory_server.model.decoder import Decoder
from lory_server.model.linear import Linear


class LoraLinear:
    """A linear and, on top, what the adapters of its site add."""

    __slots__ = ("_base", "_pool", "_sgmv", "_table", "bias_N")

    def __init__(self, base: Linear, ops: Ops, table: SiteTable, pool: Tensor) -> None:
        self._base = base
        self.bias_N = base.bias_N
        self._sgmv = ops.sgmv
        self._table = table
        self._pool = pool

    def adapt(self, y_TN: Tensor, x_TK: Tensor, rows: Segments) -> None:
        """What the adapters make of the base's own y."""
        self._sgmv(y_TN, x_TK, self._table, self._pool, rows)

    @property
    def num_bytes(self) -> int:
        """Of the base; the pool is accounted for by its owner."""
        return self._base.num_bytes

    @property
    def is_recordable(self) -> bool:
        return self._base.is_recordable

    def row_blocks(self, rows: range, max_weights: int) -> Iterator[Tensor]:
        return self._base.row_blocks(rows, max_weights)

    def __call__(self, x_TK: Tensor, rows: Segments | None) -> Tensor:
        y_TN = self._base(x_TK, rows)
        if rows is not None:
            self.adapt(y_TN, x_TK, rows)
        return y_TN


def attach(decoder: Decoder, site_tables: Sequence[SiteTable], pool: Tensor) -> None:
    """Give every linear of `decoder` its site's table, in the order of `decoder.adapter_sites`.
    Once. The ends' tables, which stand last, may be left out; the embedding's is not for SGMV."""
    _check(decoder, site_tables)

    def wrap(index: int, linear: Linear) -> Linear:
        assert not isinstance(linear, LoraLinear), "adapters are attached already"
        return LoraLinear(linear, decoder.ops, site_tables[index], pool)

    decoder.wrap_linears(wrap)
    if len(site_tables) > len(decoder.sites):
        head = LoraLinear(decoder.head, decoder.ops, site_tables[len(decoder.sites)], pool)
        decoder.adapt_head(head.adapt)


def _check(decoder: Decoder, site_tables: Sequence[SiteTable]) -> None:
    geometry = [
        (
            site.in_features,
            tuple(part.out_offset for part in site.slices),
            tuple(part.out_features for part in site.slices),
        )
        for site in decoder.adapter_sites[: len(site_tables)]
    ]
    given = [(table.in_features, table.out_offsets, table.out_features) for table in site_tables]
    assert len(given) in (len(decoder.sites), len(decoder.adapter_sites))
    assert given == geometry, "the tables are not those of the decoder's sites"
