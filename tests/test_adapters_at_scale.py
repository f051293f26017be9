"""Thousands of adapters: nothing grows, no step takes longer, warm streams wait for no cold one."""

import gc
import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import tiny_models
from adapter_files import SITES, make_folder, write_adapter
from lory_server.adapters.blob import AdapterBlob
from lory_server.adapters.cache import AdapterCache
from lory_server.adapters.extents import GRAIN_BYTES
from lory_server.adapters.format import AdapterManifest, AdapterSlice, Base, TensorSpec
from lory_server.adapters.outcomes import Listed, Resolved, ResolveFailed
from lory_server.adapters.pool import AdapterPool
from lory_server.adapters.reader import Reader, ThreadReader
from lory_server.adapters.reader_process import Looked, ProcessReader, can_read_apart
from lory_server.adapters.store import SETTLED_NS, AdapterFiles, AdapterStore
from lory_server.blocks import BlockPool
from lory_server.messages import Sampling
from lory_server.plan import AdapterDemand, Residency, ResidentAdapter
from lory_server.scheduler import MAX_PREFETCH, Scheduler, SchedulerLimits
from lory_server.sequence import Sequence
from parity_world import ParityWorld, Reference, Session, compare

SITE = SITES[1:2]
"""One linear: what is measured is how many adapters there are, not how large they are."""
GRAIN = 256
ADAPTER_BYTES = 512
KNOWN = 60
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters that load, one that is refused, and one that needs the base."""
    root = tmp_path_factory.mktemp("crowd")
    for index in range(KNOWN):
        write_adapter(root / f"a{index}", 1 + index % 4, ("o_proj",), seed=index, sites=SITE)
    write_adapter(root / "dora", 2, ("o_proj",), sites=SITE, use_dora=True)
    write_adapter(root / "broken", 2, ("o_proj",), sites=SITE, r=3)
    time.sleep(0.15)
    return root


class Churn:
    """A cache that adapters go through, some at a time, as an engine's loop would have it."""

    def __init__(self, root: Path, make_reader: Callable[..., Reader], in_flight: int = 6) -> None:
        self.news = threading.Event()
        self.pool = AdapterPool(
            8 * ADAPTER_BYTES, torch.float32, torch.device("cpu"), SITE, 6, grain_bytes=GRAIN
        )
        self.cache = AdapterCache(
            AdapterStore(root), self.pool, Base(SITE), 16 * ADAPTER_BYTES, make_folder(SITE),
            make_reader=make_reader, on_ready=self.news.set,
        )  # fmt: skip
        self.shares = make_reader is ProcessReader
        self.rng = random.Random(0)
        self.first = ["broken", "absent", "dora", *(f"a{index}" for index in range(KNOWN))]
        """Each is asked for once before chance has its way, so that all tables have their size."""
        self.in_flight = in_flight
        self.waiting: set[int] = set()
        self.held: dict[str, int] = {}
        self.tickets = 0
        self.loads = {"host": 0, "device": 0}
        self.evictions = {"host": 0, "device": 0}
        self.refused = 0

    def run(self, num_loads: int) -> None:
        """Until so many have come to the device and as many to the host, and nothing is held."""
        target = {tier: count + num_loads for tier, count in self.loads.items()}
        end_s = time.monotonic() + DEADLINE_S + num_loads / 50
        while any(self.loads[tier] < target[tier] for tier in target):
            assert time.monotonic() < end_s, self.loads
            while len(self.waiting) + len(self.held) < self.in_flight:
                self.ask()
            self.turn()
        while self.waiting or self.held or self.cache.residency().loading or self.cache._loads:
            assert time.monotonic() < end_s
            self.turn()

    def ask(self) -> None:
        self.tickets += 1
        self.waiting.add(self.tickets)
        chance = [f"a{self.rng.randrange(KNOWN)}"] * 48 + ["broken", "absent", "dora"]
        name = self.first.pop() if self.first else self.rng.choice(chance)
        self.cache.resolve(self.tickets, name)

    def turn(self) -> None:
        cache = self.cache
        for outcome in cache.poll():
            assert not isinstance(outcome, Listed)
            self.waiting.discard(outcome.ticket)
            if isinstance(outcome, Resolved):
                self.held[outcome.revision] = self.held.get(outcome.revision, 0) + 1
            else:
                assert isinstance(outcome, ResolveFailed)
                assert outcome.adapter_id in ("broken", "absent"), outcome
                self.refused += 1
        resident = cache.residency().resident
        for revision in [revision for revision in self.held if revision in resident]:
            for _ in range(self.held.pop(revision)):
                cache.release(revision)
        cache.demand(AdapterDemand(frozenset(), tuple(self.held)))
        for move in cache.drain_moves():
            if move.kind != "fail":
                counts = self.loads if move.kind == "load" else self.evictions
                counts[move.tier] += 1
        self.news.wait(0.01)
        self.news.clear()

    def check(self) -> None:
        """Free + used = total."""
        self.cache.device.check()
        self.cache.host.check()
        extents = self.pool.extents
        assert extents.free_bytes + extents.used_bytes == extents.total_bytes

    def sizes(self) -> dict[str, int]:
        """Of all that could grow."""
        cache = self.cache
        return {
            "open files": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
            "shared memory": num_shared() - len(cache.host) * self.shares,
            "tickets": len(cache._tickets),
            "expected": len(cache._expected),
            "loads": len(cache._loads),
            "looks": len(cache._lookups),
            "refusals": len(cache._refusals),
            "signatures": len(cache._store._revisions),
            "names": sum(1 for _ in cache.known.names()),
            "waiting": len(cache._waiting_for_room),
            "moves": len(cache.drain_moves()),
            "holds": sum(entry.holds for entry in cache.host._entries.values()),
            "host's places": int(len(cache.host._idle._heap) > 2 * len(cache.host) + 65),
            "device's places": int(len(cache.device._ranking._heap) > 2 * len(cache.device) + 65),
        }


def num_shared() -> int:
    """Shared memory of blobs that is mapped here."""
    return Path("/proc/self/maps").read_text().count("memfd:lory-adapter")


def private_bytes() -> int:
    """Of this process alone; blobs in shared memory are counted by their number."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Private_Dirty")


READERS = [
    pytest.param(ThreadReader, 2_000, id="threads"),
    pytest.param(
        ThreadReader, 50_000, id="threads-50000", marks=[pytest.mark.full, pytest.mark.timeout(900)]
    ),
    pytest.param(
        ProcessReader, 5_000, id="process-5000", marks=[pytest.mark.full, pytest.mark.timeout(900)]
    ),
]


@pytest.mark.skipif(not can_read_apart(), reason="needs Linux")
@pytest.mark.parametrize(("make_reader", "num_loads"), READERS)
def test_loads_and_evictions_leave_nothing_behind(
    root: Path, make_reader: Callable[..., Reader], num_loads: int
) -> None:
    churn = Churn(root, make_reader)
    try:
        churn.cache.wait_until_ready()
        churn.run(min(num_loads, 1_000) // 2)
        before, sizes = private_bytes(), churn.sizes()
        for _ in range(10):
            churn.run(num_loads // 10)
            churn.check()
        assert churn.sizes() == sizes
        assert private_bytes() - before < 2 * 2**20 + 16 * num_loads, "a few bytes a load at most"
        assert churn.refused > num_loads // 100
        assert min(churn.evictions.values()) > num_loads // 2
        let_all_go(churn)
    finally:
        churn.cache.close()


def let_all_go(churn: Churn) -> None:
    for revision in list(churn.cache.host._entries):
        assert churn.cache.let_go(revision)
    for revision in list(churn.cache.residency().resident):
        churn.cache.device.drop(revision)
    churn.check()
    assert churn.pool.used_bytes == churn.cache.budget.used_bytes == 0
    assert num_shared() == 0


# -- what a step costs ------------------------------------------------------------------------


class Standing:
    """A device full of equal adapters, eight of which have a running request."""

    def __init__(self, root: Path, num_resident: int) -> None:
        device = torch.device("cpu")
        self.pool = AdapterPool(
            num_resident * GRAIN_BYTES, torch.float32, device, SITE, num_resident
        )
        self.news = threading.Event()
        self.cache = AdapterCache(
            AdapterStore(root), self.pool, Base(SITE), 1 << 30, make_folder(SITE), num_loaders=1,
            on_ready=self.news.set,
        )  # fmt: skip
        self.scheduler = Scheduler(BlockPool(64, 16), SchedulerLimits(32, 64), [0])
        self.num_put = 0
        self.blob = self._load()
        for _ in range(num_resident):
            self.put()
        for index in range(8):
            self._start(f"{index:032x}", index)

    def put(self) -> float:
        """One adapter more, as if it had been loaded; seconds of the step's work to bring it."""
        revision, blob, cache = f"{self.num_put:032x}", self.blob, self.cache
        self.num_put += 1
        copy = replace(blob, revision=revision)
        assert cache.budget.try_reserve(blob.num_bytes)
        cache.host.put(revision, copy, 0.01, self.pool.footprint(blob.manifest))
        cache.host.use(revision)
        began_s = time.perf_counter()
        cache.demand(AdapterDemand(frozenset(), (revision,)))
        taken_s = time.perf_counter() - began_s
        while revision not in cache.device:
            self.news.wait(0.01)
            cache.residency()
        self.news.clear()
        cache.drain_moves()
        return taken_s

    def step(self) -> float:
        """Seconds of a step's work around the model's, when the device's adapters have changed."""
        cache, scheduler = self.cache, self.scheduler
        cache.device._picture = None
        began_s = time.perf_counter()
        cache.poll()
        plan, demand = scheduler.plan(cache.residency())
        cache.demand(demand)
        cache.counts()
        taken_s = time.perf_counter() - began_s
        scheduler._in_flight.pop(plan.step, None)
        return taken_s

    def _load(self) -> AdapterBlob:
        self.cache.resolve(1, "a3")
        while not len(self.cache.host):
            self.cache.poll()
            time.sleep(0.001)
        (entry,) = self.cache.host._entries.values()
        return entry.blob

    def _start(self, revision: str, index: int) -> None:
        sampling = Sampling(max_new_tokens=8, seed=0)
        self.scheduler.add(Sequence(index, sampling, [1, 2, 3], "", revision, revision=revision))


@pytest.fixture(scope="module")
def few_and_many(root: Path) -> Iterator[tuple[Standing, Standing]]:
    standing = Standing(root, 10), Standing(root, 2_000)
    yield standing
    for one in standing:
        one.cache.close()


def test_a_step_does_not_take_longer_with_thousands_resident(
    few_and_many: tuple[Standing, Standing],
) -> None:
    """The shortest of many, in turn: the machine may have other work."""
    few, many = few_and_many
    times = [(few.step(), many.step()) for _ in range(200)]
    few_s, many_s = (min(column) for column in zip(*times, strict=True))
    print(f"\na step's work: {few_s * 1e6:.0f} us beside 10, {many_s * 1e6:.0f} us beside 2,000")
    assert many_s < 2 * few_s + 100e-6


def test_one_of_thousands_is_evicted_as_quickly_as_one_of_ten(
    few_and_many: tuple[Standing, Standing],
) -> None:
    few, many = few_and_many
    times = [(few.put(), many.put()) for _ in range(50)]
    few_s, many_s = (min(column) for column in zip(*times, strict=True))
    print(f"\nanother's place: {few_s * 1e6:.0f} us beside 10, {many_s * 1e6:.0f} us beside 2,000")
    assert (len(few.cache.device), len(many.cache.device)) == (10, 2_000)
    assert many_s < 2 * few_s + 100e-6


def test_a_list_of_thousands_is_made_in_parts(tmp_path: Path) -> None:
    """A step passes between two parts, and each folder costs no more than a look."""
    for index in range(700):
        folder = tmp_path / f"a{index:04d}"
        folder.mkdir()
        (folder / "adapter_config.json").touch()
    (tmp_path / "elsewhere").mkdir()
    cache = AdapterCache(
        AdapterStore(tmp_path),
        AdapterPool(GRAIN_BYTES, torch.float32, torch.device("cpu"), SITE, 1),
        Base(SITE),
        GRAIN_BYTES,
        make_folder(SITE),
    )
    try:
        for index in range(700):
            cache.known.asked_for(f"a{index:04d}")
        cache.request_list(1)
        cache.request_list(2)
        turns, listed = 0, dict[int, Listed]()
        end_s = time.monotonic() + DEADLINE_S
        while len(listed) < 2:
            assert time.monotonic() < end_s
            turns += cache._listing is not None
            listed |= {one.call_id: one for one in cache.poll() if isinstance(one, Listed)}
    finally:
        cache.close()
    assert turns >= 2 * (700 // 64)
    for one in listed.values():
        assert len(one.adapters) == 700
        assert all(entry.idle_seconds is not None for entry in one.adapters)


# -- cold adapters beside warm ones -------------------------------------------------------------

NUM_COLD = 64
NUM_WARM = 8
STREAM_TOKENS = 40


@pytest.fixture(scope="module")
def parity(tmp_path_factory: pytest.TempPathFactory) -> ParityWorld:
    folder = tmp_path_factory.mktemp("cold")
    base = tiny_models.build("llama", folder / "base", tie_word_embeddings=False)
    root, targets = folder / "adapters", ["q_proj", "down_proj"]
    adapters = {
        f"a{index:02d}": tiny_models.save_adapter(
            root / f"a{index:02d}", base, 1 + index, 8, targets, index
        )
        for index in range(NUM_WARM)
    }
    for index in range(NUM_WARM, NUM_WARM + NUM_COLD):
        name, like = f"a{index:02d}", root / f"a{index % NUM_WARM:02d}"
        adapters[name] = Path(shutil.copytree(like, root / name))
        config = json.loads((root / name / "adapter_config.json").read_text())
        (root / name / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": index}))
    time.sleep(0.15)  # old enough that their signatures are remembered, and none is read again
    return ParityWorld("llama", base, root, adapters)


def test_64_cold_adapters_at_once_hold_up_no_warm_stream_and_are_exact(
    parity: ParityWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams go on to their end while not one of the cold can be read; then all are answered."""
    names = list(parity.adapters)
    warm, cold = names[:NUM_WARM], names[NUM_WARM:]
    # Files written a moment ago are read again at the next request, which is what is held up here.
    time.sleep(2 * SETTLED_NS / 1e9)
    session = Session(parity.options(max_resident_adapters=12, max_queued=200))
    for index, name in enumerate(warm):
        session.submit(index, [3 + index, 5, 7], name, max_new_tokens=2)
    session.run()
    may_read, read = threading.Event(), ThreadReader.blob
    reads: list[str] = []

    def held_up(reader: ThreadReader, files: AdapterFiles, manifest: Any) -> AdapterBlob:
        reads.append(files.adapter_id)
        assert may_read.wait(DEADLINE_S)
        return read(reader, files, manifest)

    monkeypatch.setattr(ThreadReader, "blob", held_up)
    streams = [100 + index for index in range(NUM_WARM)]
    for index, name in zip(streams, warm, strict=True):
        session.submit(index, [3 + index % 90, 5], name, max_new_tokens=STREAM_TOKENS,
                       ignore_eos=True)  # fmt: skip
    session.run(until=lambda: all(session.answers[index].tokens for index in streams))
    arrivals = [1000 + index for index in range(NUM_COLD)]
    for index, name in zip(arrivals, cold, strict=True):
        session.submit(index, [3 + index % 90, 9, 11], name, max_new_tokens=4, ignore_eos=True)
    session.run(until=lambda: all(session.answers[index].finished for index in streams))
    assert reads
    assert not any(session.answers[index].tokens for index in arrivals)
    may_read.set()
    session.run()
    assert sorted(reads) == sorted(cold), "each is read once"
    assert all(len(session.answers[index].tokens) == 4 for index in arrivals)
    compare(session, Reference(parity.base), parity.adapters).check()
    assert session.moves("load", "host") == len(names)
    session.close()


def test_the_collector_does_not_walk_what_is_known_of_thousands() -> None:
    """A full collection held the interpreter for 370 ms with a thousand adapters of an 8B model."""
    manifest = AdapterManifest(
        tuple(
            AdapterSlice(
                index, 0, 4, 1.0,
                TensorSpec(f"{index}.a", "F32", (4, 16), index, 256),
                TensorSpec(f"{index}.b", "F32", (4, 16), index, 256),
            )
            for index in range(224)
        ),
        "", 0, b"",
    )  # fmt: skip
    raw = msgspec.msgpack.encode(Looked(manifest))
    gc.collect()
    before = len(gc.get_objects())
    kept = [msgspec.msgpack.decode(raw, type=Looked).manifest for _ in range(50)]
    gc.collect()
    assert len(gc.get_objects()) - before < 10 * len(kept)
    assert kept[0] == manifest


# -- ahead of their turn --------------------------------------------------------------------------


def test_adapters_are_asked_for_in_the_order_of_the_line() -> None:
    """Those who could run now keep theirs; from the first that needs a load on, all stand in line,
    a bounded number of loads among them."""
    scheduler = Scheduler(BlockPool(64, 16), SchedulerLimits(1, 64), [0])
    loads = [f"load{index:02d}" for index in range(MAX_PREFETCH + 4)]
    line = ["runs", "next", loads[0], "behind", "", *loads[1:], "behind", "last"]
    for index, revision in enumerate(line):
        sampling = Sampling(max_new_tokens=8, seed=0)
        scheduler.add(Sequence(index, sampling, [1, 2, 3], "", "w", revision=revision))
    resident = {
        r: ResidentAdapter(i, 1, 1) for i, r in enumerate(("runs", "next", "behind", "last"))
    }
    plan, demand = scheduler.plan(Residency(resident=resident))
    assert [row.sequence_id for row in plan.rows] == [0]
    assert demand.in_use == {"runs", "next"}
    assert demand.wanted == (loads[0], "behind", *loads[1:MAX_PREFETCH], "last")
