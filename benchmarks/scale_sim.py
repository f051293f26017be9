"""What can be known of thousands of adapters without serving any: places, and who makes room.

    padding     bytes of an exact pool beside slots of the largest rank
    fragments   what a pool loses between adapters of mixed ranks, over a long trace
    evictions   seconds spent on bringing adapters back, beside those of LRU, over a long trace

Deterministic: a seed gives the same figures everywhere. The pool's allocator and the tiers' ranking
are the served ones. It must not know clocks, files or servers.
"""

import random
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

from benchmarks.models import Shape
from lory_server.adapters.extents import GRAIN_BYTES, Allocation, ExtentAllocator
from lory_server.adapters.manifest import CHUNK_ALIGN_BYTES
from lory_server.adapters.ranking import Ranking, worth

LLAMA_8B = Shape("llama-8b", 4096, 32, 32, 8, 14336, 128256)
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ATTENTION = ("q_proj", "v_proj")
DTYPE_BYTES = 2

Mix = Mapping[int, float]
"""Shares of ranks."""
USUAL: Mix = {8: 0.30, 16: 0.40, 32: 0.15, 64: 0.10, 128: 0.04, 256: 0.01}


def chunks_of(shape: Shape, rank: int, only: Sequence[str] = ()) -> list[int]:
    """Bytes of A and B of every projection, as they lie in the pool."""
    step = CHUNK_ALIGN_BYTES
    return [
        -(-DTYPE_BYTES * rank * side // step) * step
        for name, out_features, in_features in shape.modules
        if not only or name.rpartition(".")[2] in only
        for side in (in_features, out_features)
    ]


# -- padding ----------------------------------------------------------------------------------


def padding(shape: Shape, count: int = 64) -> list[dict[str, Any]]:
    """`count` adapters, each in what it needs and each in a slot of the largest rank."""
    draw = random.Random(0)
    usual = draw.choices(list(USUAL), list(USUAL.values()), k=count)
    cases: list[tuple[str, list[int], int, Sequence[str]]] = [
        ("rank 8, slots of rank 8", [8] * count, 8, ()),
        ("rank 8, slots of rank 64", [8] * count, 64, ()),
        ("rank 16 on q and v, slots of rank 16", [16] * count, 16, ATTENTION),
        ("ranks 8 to 256, most 8 and 16, slots of rank 256", usual, 256, ()),
    ]
    return [
        {
            "what": what,
            "count": count,
            "exact_bytes": sum(_needed(shape, rank, only) for rank in ranks),
            "slots_bytes": count * _needed(shape, slot_rank, ()),
        }
        for what, ranks, slot_rank, only in cases
    ]


def _needed(shape: Shape, rank: int, only: Sequence[str]) -> int:
    return -(-sum(chunks_of(shape, rank, only)) // GRAIN_BYTES) * GRAIN_BYTES


# -- fragments --------------------------------------------------------------------------------


def fragments(shape: Shape, num_loads: int, *, pool_of_rank: int = 16, count: int = 256,
              seed: int = 0) -> dict[str, Any]:  # fmt: skip
    """Adapters of any rank come and go in a pool that holds `count` of one rank.

    Whenever one is turned away though its bytes are free, all that is free is lost to it.
    """
    draw = random.Random(seed)
    sizes = {rank: chunks_of(shape, rank) for rank in RANKS}
    pool = ExtentAllocator(count * sum(sizes[pool_of_rank]), GRAIN_BYTES)
    held: list[Allocation] = []
    losses: list[float] = []
    filled: list[float] = []
    split, exact_bytes, taken_bytes = 0, 0, 0
    for _ in range(num_loads):
        rank = draw.choice(RANKS)
        chunks = sizes[rank]
        while (allocation := pool.allocate(chunks)) is None:
            is_free = pool.free_bytes >= pool.padded(sum(chunks))
            losses.append(pool.free_bytes / pool.total_bytes if is_free else 0.0)
            filled.append(pool.used_bytes / pool.total_bytes)
            pool.free(held.pop(draw.randrange(len(held))))
        split += len(allocation.extents) > 1
        exact_bytes += DTYPE_BYTES * rank * sum(n + k for _, n, k in shape.modules)
        taken_bytes += allocation.num_bytes
        held.append(allocation)
    pool.check()
    return {
        "loads": num_loads,
        "ranks": list(RANKS),
        "pool_bytes": pool.total_bytes,
        "turned_away": len(losses),
        "worst_loss": round(max(losses, default=0.0), 5),
        "mean_loss": round(sum(losses) / max(len(losses), 1), 5),
        "mean_filled": round(sum(filled) / max(len(filled), 1), 5),
        "split_share": round(split / num_loads, 5),
        "padding_share": round(1 - exact_bytes / taken_bytes, 5),
    }


# -- evictions --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """An adapter as a tier sees it."""

    num_bytes: int
    load_s: float


class Tier(Protocol):
    """Which adapters are here; bytes are counted by who asks."""

    def __contains__(self, key: str) -> bool: ...

    def used(self, key: str, known: Known) -> None:
        """It was asked for, and is here or comes now."""
        ...

    def evict(self) -> str: ...


class Lru:
    def __init__(self) -> None:
        self._order: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        return key in self._order

    def used(self, key: str, known: Known) -> None:
        self._order[key] = None
        self._order.move_to_end(key)

    def evict(self) -> str:
        return self._order.popitem(last=False)[0]


class ByWorth:
    """As the host tier does it."""

    def __init__(self) -> None:
        self._ranking = Ranking()
        self._uses: dict[str, int] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._ranking

    def used(self, key: str, known: Known) -> None:
        self._uses[key] = self._uses.get(key, 0) + 1
        self._ranking.put(key, worth(self._uses[key], known.load_s, known.num_bytes))

    def evict(self) -> str:
        key = self._ranking.pop()
        assert key is not None
        del self._uses[key]
        return key


@dataclass(frozen=True)
class Trace:
    """Requests for adapters of mixed ranks, some of which are dear to load."""

    shape: Shape
    num_adapters: int
    num_requests: int
    alpha: float
    """Of Zipf's law; 0: uniform."""
    dora_share: float = 0.1
    num_shuffles: int = 1
    """How often all adapters change their popularity, at equal distances."""
    share_in_memory: float = 0.2
    """Of the bytes of all."""
    read_bytes_per_s: float = 1e9
    fold_s: float = 10.5
    """What folding takes beside reading: 1.5 s for each billion weights of the base."""
    seed: int = 0

    def adapters(self) -> list[Known]:
        draw = random.Random(f"adapters/{self.seed}")
        ranks = draw.choices(list(USUAL), list(USUAL.values()), k=self.num_adapters)
        sizes = {rank: sum(chunks_of(self.shape, rank)) for rank in USUAL}
        return [
            Known(sizes[rank], sizes[rank] / self.read_bytes_per_s + self._fold_s(draw))
            for rank in ranks
        ]

    def _fold_s(self, draw: random.Random) -> float:
        return self.fold_s if draw.random() < self.dora_share else 0.0

    def requests(self) -> list[int]:
        """Numbers of adapters."""
        draw = random.Random(f"requests/{self.seed}")
        totals = list(accumulate((i + 1) ** -self.alpha for i in range(self.num_adapters)))
        numbers = list(range(self.num_adapters))
        found: list[int] = []
        for _ in range(self.num_shuffles + 1):
            draw.shuffle(numbers)
            for _ in range(self.num_requests // (self.num_shuffles + 1)):
                found.append(numbers[bisect_left(totals, draw.random() * totals[-1])])
        return found


def replay(trace: Trace, make: Callable[[], Tier]) -> dict[str, float]:
    """Misses once the tier is full, and the seconds that bringing back takes."""
    adapters, tier = trace.adapters(), make()
    free = round(trace.share_in_memory * sum(one.num_bytes for one in adapters))
    seconds, misses, asked, is_full = 0.0, 0, 0, False
    for number in trace.requests():
        key, known = str(number), adapters[number]
        if key not in tier:
            while free < known.num_bytes:
                free += adapters[int(tier.evict())].num_bytes
                is_full = True
            free -= known.num_bytes
            seconds += known.load_s * is_full
            misses += is_full
        tier.used(key, known)
        asked += is_full
    return {"miss_share": round(misses / max(asked, 1), 5), "load_s": round(seconds, 3)}


def evictions(shape: Shape, num_adapters: int, num_requests: int) -> list[dict[str, Any]]:
    """Several traces, each by LRU and by worth."""
    cases = (
        ("Zipf 1.0", Trace(shape, num_adapters, num_requests, 1.0)),
        ("Zipf 1.0, none with DoRA", Trace(shape, num_adapters, num_requests, 1.0, dora_share=0.0)),
        ("Zipf 0.7", Trace(shape, num_adapters, num_requests, 0.7)),
        ("uniform", Trace(shape, num_adapters, num_requests, 0.0)),
        ("Zipf 1.0, other favourites nine times",
         Trace(shape, num_adapters, num_requests, 1.0, num_shuffles=9)),
        ("the same, none with DoRA",
         Trace(shape, num_adapters, num_requests, 1.0, dora_share=0.0, num_shuffles=9)),
    )  # fmt: skip
    found: list[dict[str, Any]] = []
    for what, trace in cases:
        lru, ours = replay(trace, Lru), replay(trace, ByWorth)
        ratio = round(ours["load_s"] / lru["load_s"], 4)
        found.append({"what": what, "lru": lru, "by_worth": ours, "load_s_to_lru": ratio})
    return found
