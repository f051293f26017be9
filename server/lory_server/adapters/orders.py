"""Operators' orders: adapters to find, load, unload, pin and unpin, beside all requests.

    take -> [resolved] -> take_outcome -> ... settle: it has arrived on the device -> drain
    unload, drop: let_go in the next step, or in the one after the last request that holds it

It belongs to the engine's thread and waits for nothing. It must not know requests or sequences.
"""

import logging
from collections.abc import Set
from dataclasses import dataclass, replace

from lory_server.adapters.cache import AdapterCache
from lory_server.adapters.errors import AdapterCapacityError
from lory_server.adapters.outcomes import Resolved, ResolveFailed
from lory_server.messages import AdapterOrder, Failure, FailureCode, Manner, OrderDone
from lory_server.plan import AdapterDemand
from lory_server.recipes import called

_log = logging.getLogger(__name__)

PinKey = tuple[str, str]
"""A name, and the revision it was pinned at; empty: whichever it stands for."""


@dataclass(frozen=True, slots=True)
class _Arrival:
    """An order that is done when a revision, which it holds, is on the device."""

    order: AdapterOrder
    revision: str


class Orders:
    def __init__(self, cache: AdapterCache) -> None:
        self._cache = cache
        self._resolving: dict[int, AdapterOrder] = {}
        self._arriving: list[_Arrival] = []
        self._leaving: set[str] = set()
        self._sent_away: list[AdapterOrder] = []
        self._pins: dict[PinKey, str] = {}
        self._done: list[OrderDone] = []

    def take(self, order: AdapterOrder) -> None:
        match order.kind:
            case "find" | "load" | "pin":
                self._resolving[order.call_id] = order
                self._cache.resolve(
                    order.call_id,
                    order.adapter_id,
                    order.revision,
                    for_device=order.kind != "find",
                )
            case "unload":
                self._unload(order)
            case "unpin" | "drop":
                for key in self._keys(order):
                    self._cache.unpin(self._pins.pop(key))
                if order.kind == "drop":
                    self._send_away(order)
                else:
                    self._finish(order)

    def owns(self, ticket: int) -> bool:
        return ticket in self._resolving

    def take_outcome(self, outcome: Resolved | ResolveFailed) -> None:
        """What came of a ticket that is ours."""
        order = self._resolving.pop(outcome.ticket)
        if isinstance(outcome, ResolveFailed):
            self._refuse(order, outcome.code, outcome.message, outcome.source)
            return
        self.follow(outcome)
        if order.kind == "find":
            self._cache.release(outcome.revision)
            self._finish(order, outcome.revision, outcome.manner)
        elif order.kind == "pin" and not self._pin(order, outcome.revision):
            self._cache.release(outcome.revision)
        else:
            self._leaving.discard(outcome.revision)
            self._arriving.append(_Arrival(order, outcome.revision))

    def follow(self, resolved: Resolved) -> None:
        """A pin of a name moves to the revision that has replaced the one it kept."""
        key = (resolved.adapter_id, "")
        kept = self._pins.get(key, resolved.revision)
        if not resolved.is_latest or kept == resolved.revision:
            return
        self._cache.unpin(self._pins.pop(key))
        try:
            self._cache.pin(resolved.revision)
        except AdapterCapacityError as error:
            _log.warning(
                "adapter %r is not pinned any more: its new revision %s", called(key[0]), error
            )
        else:
            self._pins[key] = resolved.revision

    def added_to(self, demand: AdapterDemand) -> AdapterDemand:
        """What the scheduler wants, and after it what was ordered."""
        device = self._cache.device
        if not (device.pinned or self._arriving):
            return demand
        ordered = [*device.pinned, *(arrival.revision for arrival in self._arriving)]
        more = dict.fromkeys(revision for revision in ordered if revision not in device)
        if not more:
            return demand
        wanted = (*demand.wanted, *(r for r in more if r not in demand.wanted))
        return replace(demand, wanted=wanted)

    def settle(self) -> None:
        """See what has arrived on the device."""
        waiting: list[_Arrival] = []
        for arrival in self._arriving:
            if arrival.revision in self._cache.device:
                self._cache.release(arrival.revision)
                self._finish(arrival.order, arrival.revision)
            else:
                waiting.append(arrival)
        self._arriving = waiting

    def let_go(self, in_use: Set[str]) -> None:
        """Evict what is to go, but for what a request or a pin still holds, or a step reads."""
        if self._leaving:
            leaving, gone = self._leaving, self._cache.let_go
            self._leaving = {r for r in leaving if r in in_use or not gone(r)}
        for order in self._sent_away:
            self._finish(order)
        self._sent_away.clear()

    def drain(self) -> list[OrderDone]:
        """The answers since the last call."""
        done, self._done = self._done, []
        return done

    def _pin(self, order: AdapterOrder, revision: str) -> bool:
        """A pin of the same name and revision takes the place of an earlier one."""
        key = (order.adapter_id, revision if order.revision else "")
        if self._pins.get(key) != revision:
            try:
                self._cache.pin(revision)
            except AdapterCapacityError as error:
                about = f"adapter {called(order.adapter_id)!r} {error}"
                self._refuse(order, error.code, about)
                return False
            self._pins[key] = revision
        return True

    def _unload(self, order: AdapterOrder) -> None:
        revisions = self._revisions(order)
        if any(revision in self._cache.pins for revision in revisions):
            message = f"adapter {called(order.adapter_id)!r} is pinned; unpin it first"
            self._refuse(order, "adapter_pinned", message)
            return
        self._send_away(order)

    def _send_away(self, order: AdapterOrder) -> None:
        """The answer waits for the step that lets go of what can go."""
        self._leaving.update(self._revisions(order))
        self._sent_away.append(order)

    def _revisions(self, order: AdapterOrder) -> list[str]:
        name = order.adapter_id
        found = {*self._cache.known.revisions(name), *self._cache.device.revisions(name)}
        return [revision for revision in found if revision.startswith(order.revision)]

    def _keys(self, order: AdapterOrder) -> list[PinKey]:
        """Without a revision an unpin is of the name alone, a drop of all its pins."""
        of_name = [key for key in self._pins if key[0] == order.adapter_id]
        if order.kind == "drop":
            return of_name
        is_named = bool(order.revision)
        return [k for k in of_name if bool(k[1]) == is_named and k[1].startswith(order.revision)]

    def _finish(
        self, order: AdapterOrder, revision: str = "", manner: Manner | None = None
    ) -> None:
        entry = self._cache.known.entry(order.adapter_id)
        done = OrderDone(call_id=order.call_id, entry=entry, revision=revision, manner=manner)
        self._done.append(done)

    def _refuse(
        self, order: AdapterOrder, code: FailureCode, message: str, source: str = ""
    ) -> None:
        failure = Failure(code=code, message=message, source=source)
        self._done.append(OrderDone(call_id=order.call_id, entry=None, failure=failure))
