"""Looks at what names stand for: one at a time for each, shared by all who asked before it began.

So a name whose files stall has one thread, and a herd of first requests makes two looks. It
belongs to the engine's thread. It must not know what a look finds.
"""

from collections.abc import Callable

Tickets = tuple[int, ...]


class Lookups:
    def __init__(self, start: Callable[[Tickets, str], None]) -> None:
        """`start` begins a look for some tickets; `ended` must follow it."""
        self._start = start
        self._next: dict[str, list[int]] = {}
        """Names that are looked at now, and who has asked since."""

    def __len__(self) -> int:
        return len(self._next)

    def ask(self, ticket: int, adapter_id: str) -> None:
        if adapter_id in self._next:
            self._next[adapter_id].append(ticket)
        else:
            self._next[adapter_id] = []
            self._start((ticket,), adapter_id)

    def ended(self, adapter_id: str) -> None:
        """Those who asked meanwhile share the next."""
        tickets = self._next.pop(adapter_id)
        if tickets:
            self._next[adapter_id] = []
            self._start(tuple(tickets), adapter_id)
