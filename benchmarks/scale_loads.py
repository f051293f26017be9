"""What a load takes, by tier and rank: milliseconds and bytes, and what a first token waits for.

Loads are measured in process, by the cache, reader process and copier that serve; first tokens over
HTTP, one request at a time, on a server whose device holds one adapter, so that it is known where
the bytes of each request's adapter are. It must not know how anything is shown.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.crowd import Crowd, forget_pages, gathered
from benchmarks.models import Shape, ensure_base
from benchmarks.server import RunningServer, serving
from lory_kernels import best_cpu_backend, select
from lory_router.bench.client import Target
from lory_router.bench.load import CompletionsRoute, Load
from lory_router.bench.workload import Popularity, Workload
from lory_server.adapters.cache import AdapterCache
from lory_server.adapters.fold import BaseFolder
from lory_server.adapters.format import Base
from lory_server.adapters.outcomes import Resolved
from lory_server.adapters.pool import AdapterPool
from lory_server.adapters.reader_process import ProcessReader
from lory_server.adapters.store import AdapterStore
from lory_server.messages import AdapterMove, EngineOptions
from lory_server.model.load import load
from lory_server.plan import AdapterDemand

LOAD_TIMEOUT_S = 120.0
POLL_S = 0.0002
REQUEST_TIMEOUT_S = 120.0
PROMPT_TOKENS = 16

Place = Literal["disk", "host", "device"]
PLACES: tuple[Place, ...] = ("disk", "host", "device")


@dataclass(frozen=True)
class LoadSettings:
    shape: Shape
    ranks: tuple[int, ...]
    per_rank: int
    """Adapters of each rank."""
    rounds: int
    """How often each is asked for from host memory."""
    threads: int

    @property
    def crowds(self) -> list[Crowd]:
        return [Crowd(self.shape, rank, self.per_rank) for rank in self.ranks]


def measure(settings: LoadSettings, models: Path) -> dict[str, Any]:
    base = ensure_base(settings.shape, models)
    with gathered(settings.crowds, models) as folder:
        with cache_of(base, folder, settings) as cache:
            loads = [load_times(cache, crowd, folder) for crowd in settings.crowds]
        flags = server_flags(settings)
        forget_pages(folder, [name for crowd in settings.crowds for name in crowd.names])
        with serving(base, folder, flags, models / "lory-loads.log") as server:
            tokens = [first_tokens(server, crowd, settings) for crowd in settings.crowds]
    return {"loads": loads, "first_tokens": tokens}


# -- loads ------------------------------------------------------------------------------------


@contextmanager
def cache_of(base: Path, folder: Path, settings: LoadSettings) -> Iterator[AdapterCache]:
    """The tiers of an engine that never steps."""
    cpu, dtype = torch.device("cpu"), torch.bfloat16
    ops = select(best_cpu_backend(), threads=settings.threads)
    decoder = load(EngineOptions(model=str(base)), cpu, dtype, ops)
    largest = max(settings.ranks) * 2 * sum(a + b for _, a, b in settings.shape.modules)
    pool = AdapterPool(4 * largest, dtype, cpu, decoder.sites, max_slots=4)
    cache = AdapterCache(
        AdapterStore(folder),
        pool,
        Base(decoder.sites),
        8 * largest,
        BaseFolder(decoder.sites, decoder.linears, cpu),
        num_loaders=1,
        make_reader=ProcessReader,
    )
    try:
        cache.wait_until_ready()
        yield cache
    finally:
        cache.close()


def load_times(cache: AdapterCache, crowd: Crowd, folder: Path) -> dict[str, Any]:
    """Medians over the adapters of one rank."""
    _brought(cache, crowd.names[0])
    found: dict[str, list[AdapterMove]] = {"disk": [], "pages": [], "device": []}
    for name in crowd.names:
        forget_pages(folder, [name])
        found["disk"].append(_brought(cache, name)["host"])
        moves = _brought(cache, name)
        found["pages"].append(moves["host"])
        found["device"].append(moves["device"])
    return {
        "rank": crowd.rank,
        "count": crowd.count,
        "host_bytes": found["disk"][0].num_bytes,
        "device_bytes": found["device"][0].num_bytes,
        "from_disk_ms": _median_ms(found["disk"]),
        "from_pages_ms": _median_ms(found["pages"]),
        "to_device_ms": _median_ms(found["device"]),
    }


def _brought(cache: AdapterCache, name: str) -> dict[str, AdapterMove]:
    """An adapter from disk to the device and away again: its loads, by tier."""
    cache.resolve(1, name)
    revision, moves = "", dict[str, AdapterMove]()
    deadline_s = time.monotonic() + LOAD_TIMEOUT_S
    while "device" not in moves:
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"adapter {name} does not arrive")
        for outcome in cache.poll():
            if not isinstance(outcome, Resolved):
                raise RuntimeError(f"adapter {name} is refused: {outcome}")
            revision = outcome.revision
        if revision:
            cache.demand(AdapterDemand(frozenset(), (revision,)))
        cache.residency()
        moves |= {move.tier: move for move in cache.drain_moves() if move.kind == "load"}
        time.sleep(POLL_S)
    cache.release(revision)
    assert cache.let_go(revision)
    cache.drain_moves()
    return moves


def _median_ms(moves: Sequence[AdapterMove]) -> float:
    return round(statistics.median(move.seconds for move in moves) * 1e3, 3)


# -- first tokens -----------------------------------------------------------------------------


def server_flags(settings: LoadSettings) -> list[str]:
    """One slot: an adapter is on the device only if the request before was for it, too."""
    largest = max(settings.ranks) * 2 * sum(a + b for _, a, b in settings.shape.modules)
    total = settings.per_rank * sum(settings.ranks) * largest // max(settings.ranks)
    return [
        *("--threads", str(settings.threads)),
        *("--max-batch-rows", "1"),
        *("--max-model-len", "256"),
        *("--dtype", "bfloat16"),
        *("--max-resident-adapters", "1"),
        *("--adapter-memory", str(2 * largest)),
        *("--adapter-host-memory", str(2 * total + 2 * largest)),
        *("--served-model-name", settings.shape.name),
        *("--log-level", "warning"),
    ]


def first_tokens(server: RunningServer, crowd: Crowd, settings: LoadSettings) -> dict[str, Any]:
    """Each adapter for the first time, then in rounds, each twice in a row."""
    load = Load(
        Target.of(server.url),
        CompletionsRoute(crowd.shape.name),
        output_tokens=1,
        stream=False,
        concurrency=1,
        timeout_s=REQUEST_TIMEOUT_S,
    )
    _one(load, crowd, "", 0)
    found: dict[Place, list[float]] = {place: [] for place in PLACES}
    for turn in range(settings.rounds + 1):
        for name in crowd.names:
            found["host" if turn else "disk"].append(_one(load, crowd, name, 2 * turn + 1))
            found["device"].append(_one(load, crowd, name, 2 * turn + 2))
    return {"rank": crowd.rank} | {
        f"{place}_ms": round(statistics.median(seconds) * 1e3, 3)
        for place, seconds in found.items()
    }


def _one(load: Load, crowd: Crowd, name: str, repetition: int) -> float:
    """Seconds to the first token, which is the whole reply, of a request that nobody disturbs."""
    workload = Workload(
        num_requests=1,
        adapters=(name,) if name else (),
        popularity=Popularity("identical"),
        base_share=0.0,
        prompt_tokens=PROMPT_TOKENS,
        output_tokens=1,
        vocab_size=crowd.shape.vocab_size,
        seed=repetition,
    )
    outcome = load.run(workload.requests(repetition))[0][0]
    if outcome.failure:
        raise RuntimeError(f"a request for {name or 'the base'} failed: {outcome.failure}")
    return outcome.latency_s
