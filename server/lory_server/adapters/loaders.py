"""The threads that load adapters, and the readers that they take: some for adapters as they are,
one for those that are merged, whose reader starts with the first of them.

A merge may take as long as many loads do, and delays no load that is none; merges wait for each
other. It must not know what the jobs make.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from lory_server.adapters.reader import LateReader, Reader
from lory_server.adapters.workers import Job, Workers


@dataclass(frozen=True, slots=True)
class Lane:
    workers: Workers
    readers: Sequence[Reader]
    """As many as threads."""
    free: "SimpleQueue[Reader]"
    """Those that no load has."""
    spare: Reader
    """For spare threads."""

    @classmethod
    def of(cls, workers: Workers, readers: Sequence[Reader], spare: Reader) -> "Lane":
        free: SimpleQueue[Reader] = SimpleQueue()
        for reader in readers:
            free.put(reader)
        return cls(workers, readers, free, spare)


class Loaders:
    def __init__(
        self,
        make_reader: Callable[[], Reader],
        spare: Reader,
        num_threads: int,
        max_spares: int,
        outcomes: "SimpleQueue[object]",
        on_outcome: Callable[[], None],
    ) -> None:
        readers = [make_reader() for _ in range(num_threads)]
        workers = Workers(
            "lory-adapter-load", num_threads, outcomes, on_outcome, max_spares=max_spares
        )
        self.plain = Lane.of(workers, readers, spare)
        late = LateReader(make_reader)
        merger = Workers("lory-adapter-merge", 1, outcomes, on_outcome)
        self.merges = Lane.of(merger, [late], late)

    def submit(self, job: Job) -> None:
        """Work that needs no reader."""
        self.plain.workers.submit(job)

    def relieve(self) -> None:
        self.plain.workers.relieve()

    def wait_until_ready(self) -> None:
        for reader in self.plain.readers:
            reader.wait_until_ready()

    def stop(self) -> None:
        for lane in (self.plain, self.merges):
            lane.workers.stop()

    def join(self, timeout_s: float) -> None:
        for lane in (self.plain, self.merges):
            lane.workers.join(timeout_s)

    @property
    def threads(self) -> Sequence[threading.Thread]:
        return [*self.plain.workers.threads, *self.merges.workers.threads]

    def close(self) -> None:
        """End the readers."""
        for lane in (self.plain, self.merges):
            for reader in lane.readers:
                reader.close()
