"""How adapters want to be asked: their manners, learnt once from the engine and kept by name.

A request is made by what is known here and says so: a revision with another manner fails it in
the engine, `forget` drops what is known, and the request is made again (`endpoint`). So no request
waits for a look at a file, and none is made by the template of a revision it does not get. It must
not know HTTP or dialects.
"""

import asyncio
import logging
import math
from dataclasses import dataclass

from lory_router.base_check import OtherPart, ServedBase
from lory_router.engine import EngineClient, Unavailable
from lory_router.errors import AdapterInvalid, AdapterReplaced, TimedOut, from_failure, shown
from lory_router.keys import Caller
from lory_router.merging import MergeNamed
from lory_router.names import Target
from lory_router.own_texts import OwnTexts
from lory_router.rights import Rights
from lory_router.settings import RouterSettings
from lory_router.sourced_orders import SourcedOrders
from lory_router.sources.flight import Flights
from lory_router.sources.memory import Memory
from lory_router.sources.reference import UPLOAD, is_from_source, reference_of
from lory_router.text import TextModel
from lory_router.validate import Named
from lory_server.messages import NO_MANNER, Manner, OrderDone

MAX_KNOWN = 65_536

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Known:
    manner: Manner
    other_parts: tuple[OtherPart, ...] | None
    """Of the base that differ from the one it was trained on; None: that cannot be told."""

    @property
    def base_matches(self) -> bool | None:
        return None if self.other_parts is None else not self.other_parts


UNTOLD = Known(NO_MANNER, None)


class Manners:
    def __init__(
        self,
        engine: EngineClient,
        rights: Rights,
        settings: RouterSettings,
        base: ServedBase,
        texts: OwnTexts,
        sourced: SourcedOrders | None = None,
    ) -> None:
        """`sourced` takes orders about uploads."""
        self._engine = engine
        self._sourced = sourced
        self._rights = rights
        self._settings = settings
        self._base = base
        self._texts = texts
        self._known: Memory[Target, Known] = Memory(MAX_KNOWN)
        self._flights: Flights[Target, OrderDone | Known] = Flights()

    async def of(self, named: Named | MergeNamed, caller: Caller) -> Manner:
        """Of the adapter that a request names. Raises an ApiError where there is none, or where it
        is for another base and that is refused."""
        if not named.adapter_id or isinstance(named, MergeNamed):
            return NO_MANNER
        known = await self.known(caller, named.adapter_id)
        if self._settings.strict_base and known.other_parts:
            raise AdapterInvalid(
                f"adapter {shown(named.adapter_id)} was trained on another base: {_differs(known)};"
                " serve it on that one, or start without --strict-base",
                param="model",
            )
        return known.manner

    async def text(self, named: Named | MergeNamed, caller: Caller, manner: Manner) -> TextModel:
        """The tokenizer of what a request names: the base's, but for an adapter that brings one of
        its own. Raises an ApiError."""
        if not manner.tokenizer:
            return self._texts.base
        target = self._rights.find_target(caller, named.adapter_id)
        try:
            return await self._texts.of(target.adapter_id, manner)
        except AdapterReplaced as error:
            error.adapter_id = named.adapter_id
            raise

    async def known(self, caller: Caller, name: str) -> Known:
        """Of an adapter that the caller sees, by any of its names; the first time the engine reads
        it for that. What is fetched comes without its manifest; an upload may bring it."""
        target = self._rights.find_target(caller, name)
        if is_from_source(target.adapter_id) and not target.adapter_id.startswith(UPLOAD):
            return UNTOLD
        known = self._known.get(target)
        if known is not None:
            return known
        found = await self._flights.join(target, lambda: self._learn(target))
        if isinstance(found, Known):
            return found
        assert found.failure is not None
        raise from_failure(found.failure, self._settings.retry_after_s, name)

    def forget(self, caller: Caller, name: str) -> None:
        """What its name stands for was replaced."""
        self._known.forget(self._rights.find_target(caller, name))

    async def _learn(self, target: Target) -> OrderDone | Known:
        done = await self._find(target)
        if done.failure is not None:
            return done
        manner = done.manner or NO_MANNER
        known = Known(manner, await self._base.other_parts(manner.base))
        if known.other_parts:
            log.warning("adapter %r: %s", target.adapter_id, _differs(known))
        self._compare_quantization(target, manner)
        self._known.put(target, known, math.inf)
        return known

    def _compare_quantization(self, target: Target, manner: Manner) -> None:
        """Other numbers of the same base cost a little; that is told, and no reason to refuse."""
        info, trained = self._engine.info, manner.base and manner.base.is_quantized
        if info is not None and trained is not None and trained != (info.quantize != "none"):
            how = "quantized" if trained else "full-precision"
            log.warning("adapter %r was trained on a %s base", target.adapter_id, how)

    async def _find(self, target: Target) -> OrderDone:
        """However long the adapter is on its way, as far as a request would wait."""
        try:
            async with asyncio.timeout(self._settings.request_timeout_s):
                while True:
                    try:
                        return await self._order_find(target)
                    except Unavailable as error:
                        if error.reason != "loading" or not self._engine.is_ready():
                            raise
        except TimeoutError as error:
            text = f"adapter {shown(target.adapter_id)} could not be read in time; try later"
            raise TimedOut(text) from error

    async def _order_find(self, target: Target) -> OrderDone:
        if self._sourced is not None and is_from_source(target.adapter_id):
            reference = reference_of(target.adapter_id)
            return await self._sourced.order("find", reference, target.revision)
        return await self._engine.order("find", target.adapter_id, target.revision)


def _differs(known: Known) -> str:
    parts = " and ".join(map(str, known.other_parts or ()))
    return f"the base it was trained on has another {parts}"
