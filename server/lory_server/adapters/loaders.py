"""The threads that load adapters, and the reader that each load takes: one set for adapters as they
are, one thread for those that are merged, whose reader starts with the first of them.

A merge may take as long as many loads do, and delays no load that is none. It must not know what
the jobs make.
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
    free: "SimpleQueue[Reader]"
    """Readers that no load has; as many as threads."""
    readers: Sequence[Reader]


class Loaders:
    def __init__(
        self,
        make_reader: Callable[[], Reader],
        num_threads: int,
        outcomes: "SimpleQueue[object]",
        on_outcome: Callable[[], None],
    ) -> None:
        def lane(name: str, readers: Sequence[Reader]) -> Lane:
            free: SimpleQueue[Reader] = SimpleQueue()
            for reader in readers:
                free.put(reader)
            return Lane(Workers(name, len(readers), outcomes, on_outcome), free, readers)

        self.plain = lane("lory-adapter-load", [make_reader() for _ in range(num_threads)])
        self.merges = lane("lory-adapter-merge", [LateReader(make_reader)])

    def submit(self, job: Job) -> None:
        """Work that needs no reader."""
        self.plain.workers.submit(job)

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
