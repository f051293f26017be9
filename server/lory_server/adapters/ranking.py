"""Who goes first when a tier is full: GreedyDual-Size-Frequency.

    worth = uses x cost of bringing it back / bytes it takes       place = age + worth, lowest first

What is asked for often, dear to bring back or small stays longer. The age is the place of the last
one that went, so what is used now is placed above all that had its worth and has not been used
since: among equals this is the least recently used, and nobody's past lasts for ever. Every call is
a few steps down a heap, however many there are. It must not know tiers or adapters.
"""

from collections.abc import Collection
from heapq import heapify, heappop, heappush

MAX_USES = 8
"""More of them count no more: they keep an adapter that nobody asks for any longer through as many
turnovers of its tier. Of 4 to 64, 8 loads least on the traces of benchmarks/scale_sim."""

SLACK = 64
"""Outdated places that the heap may hold beside as many as there are valid ones."""


def worth(uses: int, cost: float, num_bytes: int) -> float:
    """`cost` in any unit that is the same for all of a tier."""
    return min(uses, MAX_USES) * cost / num_bytes


class Ranking:
    def __init__(self) -> None:
        self._age = 0.0
        self._clock = 0
        self._places: dict[str, tuple[float, int]] = {}
        """The later of equals comes after."""
        self._heap: list[tuple[float, int, str]] = []

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def put(self, key: str, worth: float) -> None:
        """Place one anew: it has just been used, or come."""
        self._clock += 1
        self._places[key] = (self._age + worth, self._clock)
        heappush(self._heap, (self._age + worth, self._clock, key))
        if len(self._heap) > 2 * len(self._places) + SLACK:
            self._heap = [(*place, key) for key, place in self._places.items()]
            heapify(self._heap)

    def discard(self, key: str) -> None:
        """It went for reasons of its own, or may not go now."""
        self._places.pop(key, None)

    def pop(self, kept: Collection[str] = ()) -> str | None:
        """Take out the least of those that are not kept: it goes, and the others have aged."""
        passed: list[tuple[float, int, str]] = []
        found = None
        while self._heap and found is None:
            place = heappop(self._heap)
            if self._places.get(place[2]) != place[:2]:
                continue
            if place[2] in kept:
                passed.append(place)
            else:
                found = place
        for place in passed:
            heappush(self._heap, place)
        if found is None:
            return None
        self._age = max(self._age, found[0])
        del self._places[found[2]]
        return found[2]
