"""Why loads failed a moment ago, so that a storm of requests does not read a broken file each time.

Bounded in number and in time. It belongs to the engine's thread. It must not know tickets or files.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from lory_server.adapters.errors import AdapterError
from lory_server.adapters.jobs import LoadKey

REFUSAL_MEMORY_S = 2.0
MAX_REFUSALS = 1024


@dataclass(frozen=True, slots=True)
class _Refusal:
    error: AdapterError
    until_s: float


class Refusals:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._refusals: dict[LoadKey, _Refusal] = {}

    def __len__(self) -> int:
        return len(self._refusals)

    def find(self, key: LoadKey) -> AdapterError | None:
        refusal = self._refusals.get(key)
        return refusal.error if refusal and self._clock() < refusal.until_s else None

    def remember(self, key: LoadKey, error: Exception) -> None:
        """What is no fault of the adapter's may be gone the next moment, and is not remembered."""
        if not isinstance(error, AdapterError):
            return
        now_s = self._clock()
        if len(self._refusals) >= MAX_REFUSALS:
            self._refusals = {k: r for k, r in self._refusals.items() if r.until_s > now_s}
        if len(self._refusals) < MAX_REFUSALS:
            self._refusals[key] = _Refusal(error, now_s + REFUSAL_MEMORY_S)
