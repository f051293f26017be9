"""Which sequences with a head of their own a step computes: a few heads at a time, by turns.

Each full head that a step uses is read whole, a gigabyte on an 8B model, so a step has at most
`limit` distinct ones and the other sequences wait for their turn. The heads planned longest ago go
first, so none waits for ever, and as soon as one in turn has given way (its blocks went to another)
the next may have its place. It must not know budgets, blocks or adapters.
"""

from collections.abc import Iterable

from lory_server.sequence import Sequence


class HeadTurns:
    def __init__(self, limit: int) -> None:
        """`limit`: most heads in a step, at least 1."""
        self._limit = limit
        self._step = 0
        self._places: dict[str, int] = {}
        """Of the heads that want this step, in the order of their turns."""
        self._last_turn: dict[str, tuple[int, int]] = {}
        """Step and place."""
        self._planned: set[str] = set()

    def begin(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """A new step of these; in their order, but those last whose head is not in turn."""
        sequences = list(sequences)
        self._step += 1
        self._planned.clear()
        with_head = [s for s in sequences if s.has_own_head]
        self._last_turn = {s.revision: self._last_turn.get(s.revision, (0, 0)) for s in with_head}
        heads = {s.revision for s in with_head if s.num_wanted > 0}
        in_order = sorted(heads, key=lambda head: (self._last_turn[head], head))
        self._places = {head: place for place, head in enumerate(in_order)}
        if len(heads) <= self._limit:
            return sequences
        waiting = frozenset(in_order[self._limit :])
        return sorted(sequences, key=lambda s: s.revision in waiting)

    def admits(self, sequence: Sequence) -> bool:
        """Whether the step may have a row of it."""
        return (
            not sequence.has_own_head
            or sequence.revision in self._planned
            or len(self._planned) < self._limit
        )

    def note(self, sequence: Sequence) -> None:
        """The step has a row of it."""
        if sequence.has_own_head:
            self._planned.add(sequence.revision)
            place = self._places.get(sequence.revision, 0)
            self._last_turn[sequence.revision] = self._step, place
