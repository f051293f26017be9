"""Which cases are measured: ops, shapes, rows, ranks and popularities, multiplied out.

It must not know how a case is made or measured.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lory_kernels.bench import attention, elementwise
from lory_kernels.bench.case import Case, Contender, Place
from lory_kernels.bench.linears import dense_case
from lory_kernels.bench.nf4 import nf4_case
from lory_kernels.bench.popularity import POPULARITIES, Popularity
from lory_kernels.bench.sgmv import Ranks, SgmvInputs, sgmv_cases
from lory_kernels.bench.shapes import ModelShape

OPS = ("sgmv", "linear", "nf4", "attention", "norm", "rope", "activation")


@dataclass(frozen=True, slots=True)
class Selection:
    models: tuple[ModelShape, ...]
    ops: tuple[str, ...] = OPS
    rows: tuple[int, ...] = (1, 32)
    ranks: tuple[Ranks, ...] = (Ranks("16", (16,)),)
    popularities: tuple[Popularity, ...] = tuple(POPULARITIES.values())
    contexts: tuple[int, ...] = (512,)
    """Of rows that decode."""
    prefill: int = 256
    """Tokens of the whole prompt that attention is given; 0: none."""
    every_tiling: bool = False
    """NF4 in Triton also with tiles that are not served."""


def cases_of(
    selection: Selection, place: Place, sgmv_peers: Sequence[Contender[SgmvInputs]] = ()
) -> Iterator[Case[Any]]:
    """Op by op, model by model."""
    for op in selection.ops:
        for model in selection.models:
            if op == "sgmv":
                yield from sgmv_cases(
                    place,
                    model.sites,
                    selection.rows,
                    selection.ranks,
                    selection.popularities,
                    sgmv_peers,
                )
            else:
                yield from _plain_cases(op, selection, place, model)


def _plain_cases(
    op: str, selection: Selection, place: Place, model: ModelShape
) -> Iterator[Case[Any]]:
    """Of the ops that know no adapters."""
    rows = selection.rows
    if op == "attention":
        for context in selection.contexts:
            yield from (attention.decode_case(place, model, n, context) for n in rows)
        if selection.prefill:
            yield attention.prefill_case(place, model, selection.prefill)
    elif op == "linear":
        shapes = (*model.sites, model.head)
        yield from (dense_case(place, shape, n) for shape in shapes for n in rows)
    elif op == "nf4":
        tried = selection.every_tiling
        for shape in model.sites:
            yield from (nf4_case(place, shape, n, every_tiling=tried) for n in rows)
    else:
        yield from (_OF_MODELS[op](place, model, n) for n in rows)


_OF_MODELS = {
    "norm": elementwise.norm_case,
    "rope": elementwise.rope_case,
    "activation": elementwise.gated_case,
}
