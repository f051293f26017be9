"""What is remembered for a while: a bounded number of answers, each with an end.

It must not know what they answer.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Memory(Generic[K, V]):
    """Least recently learnt first out."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._kept: OrderedDict[K, tuple[float, V]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: K) -> V | None:
        until, value = self._kept.get(key, (float("-inf"), None))
        if self._clock() < until:
            return value
        self._kept.pop(key, None)
        return None

    def put(self, key: K, value: V, seconds: float) -> None:
        self._kept.pop(key, None)
        if seconds <= 0:
            return
        self._kept[key] = (self._clock() + seconds, value)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def forget(self, key: K) -> None:
        self._kept.pop(key, None)
