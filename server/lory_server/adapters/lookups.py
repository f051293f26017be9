"""Looks at what names stand for: one at a time for each, shared by all who asked before it began.

So a name whose files stall has one thread. The next look begins where the last one ends, on its
thread: the engine's would come to it a step later. It must not know what a look finds.
"""

import threading
from collections.abc import Callable

Tickets = tuple[int, ...]


class Lookups:
    """Any thread may call it."""

    def __init__(self, start: Callable[[Tickets, str], None]) -> None:
        """`start` begins a look for some tickets; `ended` must follow it."""
        self._start = start
        self._lock = threading.Lock()
        self._next: dict[str, list[int]] = {}
        """Names that are looked at now, and who has asked since."""

    def __len__(self) -> int:
        return len(self._next)

    def ask(self, ticket: int, adapter_id: str) -> None:
        with self._lock:
            if adapter_id in self._next:
                self._next[adapter_id].append(ticket)
                return
            self._next[adapter_id] = []
        self._start((ticket,), adapter_id)

    def ended(self, adapter_id: str) -> None:
        """Those who asked meanwhile share the next."""
        with self._lock:
            tickets = self._next.pop(adapter_id)
            if not tickets:
                return
            self._next[adapter_id] = []
        self._start(tuple(tickets), adapter_id)
