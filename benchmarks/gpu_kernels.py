"""Every kernel at every shape of an 8B Llama: right first, then its time against the limit.

The cases are those of `lory_kernels.bench`; here is which of them a GPU is asked for, in which
order, and when to stop: what the time did not reach is named, not left out. Whole, the matrix would
take an hour, most of it to compile; what is cut, and why:

- NF4 has every site and number of rows, each with the tilings that could win: its table of choices
  is written from these findings.
- SGMV has steps of few rows to many with rank 16 on every site. Its kernels differ by slices and by
  rank, not by site: other ranks, and rows without adapters, on the site with most slices and the
  one with longest inputs alone.
- Attention has batches and contexts of decoding, and one prompt; norms, rotary embedding,
  activations and the dense linears (which cuBLAS computes, for comparison) are cheap.

It must not know where results go.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lory_kernels.bench.attention import decode_case, prefill_case
from lory_kernels.bench.case import Case, Contender, Place
from lory_kernels.bench.clock import Effort
from lory_kernels.bench.elementwise import gated_case, norm_case, rope_case
from lory_kernels.bench.linears import dense_case
from lory_kernels.bench.nf4 import nf4_case
from lory_kernels.bench.popularity import by_name, equal
from lory_kernels.bench.run import run
from lory_kernels.bench.sgmv import Ranks, SgmvInputs, sgmv_case
from lory_kernels.bench.shapes import MODELS, ModelShape

Peers = tuple[Contender[SgmvInputs], ...]


@dataclass(frozen=True)
class Scale:
    """What is measured, and for how long."""

    model: ModelShape
    num_layers: int
    rows: tuple[int, ...]
    """Of linears, norms, rotary embedding and activations."""
    steps: tuple[tuple[int, int], ...]
    """(Rows, adapters) of SGMV."""
    rank: Ranks
    other_ranks: tuple[Ranks, ...]
    other_rows: int
    """Of a step with other ranks, or with rows of the base."""
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prefill: int
    effort: Effort
    budget_s: float
    """No case beyond it starts."""


FULL = Scale(
    model=MODELS["8b"],
    num_layers=32,
    rows=(1, 8, 16, 32, 64, 128, 256),
    steps=((32, 32), (32, 1), (64, 64), (8, 8), (1, 1), (32, 8)),
    rank=Ranks.parse("16"),
    other_ranks=tuple(map(Ranks.parse, ("8", "64", "mixed"))),
    other_rows=32,
    batches=(1, 8, 32, 64),
    contexts=(512, 2048, 8192),
    prefill=2000,
    effort=Effort(seconds=0.03, fewest=5, most=100),
    budget_s=420.0,
)
TINY = Scale(
    model=MODELS["tiny"],
    num_layers=2,
    rows=(1, 4),
    steps=((4, 1), (4, 4)),
    rank=Ranks.parse("8"),
    other_ranks=(Ranks.parse("mixed"),),
    other_rows=4,
    batches=(1, 2),
    contexts=(40,),
    prefill=20,
    effort=Effort(seconds=0.0, fewest=2, most=2),
    budget_s=60.0,
)


def make_place(device: torch.device) -> Place:
    """On a CPU, a dry run, plain PyTorch stands in for the kernels."""
    if device.type == "cuda":
        return Place.at("triton", device, torch.bfloat16)
    return Place.at("torch", device, torch.float32)


def measure(
    scale: Scale,
    device: torch.device,
    peers_folder: Path | None,
    keep: Callable[[dict[str, Any]], None] = lambda _found: None,
) -> dict[str, Any]:
    """The findings, said line by line and kept while they are made."""
    place = make_place(device)
    facts = {"model": scale.model.name, "num_layers": scale.num_layers}
    found = run(
        place,
        scale.effort,
        peers_folder,
        lambda peers: cases_of(scale, place, peers.sgmv),
        lambda line: print(line, flush=True),
        scale.budget_s,
        lambda found: keep(facts | found),
    )
    return facts | found


def cases_of(scale: Scale, place: Place, peers: Peers) -> Iterator[Case[Any]]:
    """SGMV, which compiles longest, comes last, with what matters most of it first."""
    model = scale.model
    for rows in scale.rows:
        for shape in model.sites:
            yield nf4_case(place, shape, rows, every_tiling=True)
    for context in scale.contexts:
        for batch in scale.batches:
            yield decode_case(place, model, batch, context)
    yield prefill_case(place, model, scale.prefill)
    for make in (norm_case, rope_case, gated_case):
        for rows in scale.rows:
            yield make(place, model, rows)
    for rows in scale.rows:
        for shape in (*model.sites, model.head):
            yield dense_case(place, shape, rows)
    yield from _sgmv_cases(scale, place, peers)


def _sgmv_cases(scale: Scale, place: Place, peers: Peers) -> Iterator[Case[Any]]:
    sites = scale.model.sites
    for rows, adapters in scale.steps:
        for shape in sites:
            yield sgmv_case(place, shape, rows, scale.rank, equal(adapters), peers)
    most_slices = max(sites, key=lambda site: len(site.slices))
    longest = max(sites, key=lambda site: site.in_features)
    rows = scale.other_rows
    for ranks in scale.other_ranks:
        for adapters in (1, rows):
            for shape in (most_slices, longest):
                yield sgmv_case(place, shape, rows, ranks, equal(adapters), peers)
    for popularity in ("base-only", "half-base", "zipf-1.5"):
        yield sgmv_case(place, most_slices, rows, scale.rank, by_name(popularity), peers)
