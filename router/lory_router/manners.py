"""How adapters want to be asked: their manners, learnt once from the engine and kept by name.

A request is made by what is known here and says so: a revision with another manner fails it in
the engine, `replaced` drops what is known, and the request is made again (`endpoint`). So no
request waits for a look at a file, and none is made by the template of a revision it does not get.
What comes from a source is fetched first, if the source lets who asks. It must not know HTTP or
dialects.
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from lory_router.base_check import OtherPart, ServedBase
from lory_router.engine import EngineClient, Unavailable
from lory_router.errors import (
    AdapterInvalid,
    AdapterReplaced,
    TimedOut,
    adapter_not_found,
    from_failure,
    shown,
)
from lory_router.keys import Caller
from lory_router.merging import MergeNamed
from lory_router.names import Target
from lory_router.own_texts import OwnTexts
from lory_router.registry import Registry
from lory_router.rights import Rights
from lory_router.settings import RouterSettings
from lory_router.sourced_engine import SourcedEngine
from lory_router.sources.flight import Flights
from lory_router.sources.memory import Memory
from lory_router.sources.reference import is_from_source, reference_of
from lory_router.text import TextModel
from lory_router.validate import Named, check_source, token_without_source
from lory_server.adapters.manner import with_tokenizer
from lory_server.messages import NO_MANNER, Manner, OrderDone
from lory_server.recipes import Recipe

MAX_KNOWN = 65_536
MAX_MERGED = 1024
"""Merges of requests that are asked by another tokenizer than the base's."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Known:
    manner: Manner
    other_parts: tuple[OtherPart, ...] | None
    """Of the base that differ from the one it was trained on; None: that cannot be told."""

    @property
    def base_matches(self) -> bool | None:
        return None if self.other_parts is None else not self.other_parts


class Manners:
    def __init__(
        self,
        engine: EngineClient,
        registry: Registry,
        rights: Rights,
        settings: RouterSettings,
        base: ServedBase,
        texts: OwnTexts,
        sourced: SourcedEngine | None = None,
    ) -> None:
        """`sourced` has adapters from sources."""
        self._engine = engine
        self._sourced = sourced
        self._registry = registry
        self._rights = rights
        self._settings = settings
        self._base = base
        self._texts = texts
        self._known: Memory[Target, Known] = Memory(MAX_KNOWN)
        self._merged: Memory[tuple[str, Recipe], Manner] = Memory(MAX_MERGED)
        self._flights: Flights[Target, OrderDone | Known] = Flights()

    async def of(self, named: Named | MergeNamed, caller: Caller) -> Manner:
        """Of the adapter that a request names. Raises an ApiError where there is none, or where it
        is for another base and that is refused."""
        if isinstance(named, MergeNamed):
            return self._merged.get((caller.tenant, named.recipe)) or NO_MANNER
        if not named.adapter_id:
            return NO_MANNER
        known = await self.known(caller, named.adapter_id, named.token)
        if self._settings.strict_base and known.other_parts:
            raise AdapterInvalid(
                f"adapter {shown(named.adapter_id)} was trained on another base: {_differs(known)};"
                " serve it on that one, or start without --strict-base",
                param="model",
            )
        return known.manner

    async def text(self, named: Named | MergeNamed, caller: Caller, manner: Manner) -> TextModel:
        """The tokenizer of what a request names: the base's, but for an adapter that brings one of
        its own, and merges of such. Raises an ApiError."""
        if not manner.tokenizer:
            return self._texts.base
        is_merge = isinstance(named, MergeNamed)
        name = named.recipe.sources[0].adapter_id if is_merge else named.adapter_id
        target = self._rights.find_target(caller, name)
        merge = self._registry.state.merges.get(target.adapter_id)
        if merge is not None:  # all sources of a merge have one tokenizer
            target = Target(merge.sources[0].adapter_id)
        token = named.token if is_from_source(target.adapter_id) else ""
        try:
            async with self._held(target, token) as engine_name:
                is_trusted = self._is_trusted(target.adapter_id)
                return await self._texts.of(engine_name, manner, is_trusted, name)
        except AdapterReplaced as error:
            error.adapter_id = named.adapter_id
            error.recipe = named.recipe if is_merge else None
            raise

    async def known(self, caller: Caller, name: str, token: str = "") -> Known:
        """Of an adapter that the caller sees, by any of its names; the first time the engine reads
        it for that, and what is not here is fetched, if its source lets who has `token`."""
        target = self._rights.find_target(caller, name)
        async with self._held(target, token) as engine_name:
            return await self._known_as(name, target, engine_name)

    async def shown(self, caller: Caller, name: str) -> Known:
        """As its files are now, of a source's adapter those that were fetched last; for those who
        may know of it."""
        target = self._rights.find_target(caller, name)
        self._known.forget(target)
        if self._sourced is None or not is_from_source(target.adapter_id):
            return await self._known_as(name, target, target.adapter_id)
        sources, reference = self._sourced.sources, reference_of(target.adapter_id)
        engine_name = sources.hold_kept(reference)
        if not engine_name:
            raise adapter_not_found(name)
        try:
            return await self._known_as(name, target, engine_name)
        finally:
            sources.release(engine_name)

    def replaced(self, caller: Caller, error: AdapterReplaced) -> None:
        """What a request was made for was replaced; of a request's merge the engine says by which
        tokenizer it is asked, so that most are sent without a word before."""
        if error.recipe is not None:
            manner = with_tokenizer(NO_MANNER, error.tokenizer, 0)
            self._merged.put((caller.tenant, error.recipe), manner, math.inf)
        else:
            self._known.forget(self._rights.find_target(caller, error.adapter_id))

    @asynccontextmanager
    async def _held(self, target: Target, token: str) -> AsyncIterator[str]:
        """The engine's name for it, whose bytes stay the same within the block if it comes from a
        source."""
        if self._sourced is None or not is_from_source(target.adapter_id):
            if token:
                raise token_without_source()
            yield target.adapter_id
            return
        reference = reference_of(target.adapter_id)
        check_source(reference, token, self._settings)
        async with self._sourced.sources.using(reference, token) as engine_name:
            yield engine_name

    def _is_trusted(self, adapter_id: str) -> bool:
        """Whether its chat template is run."""
        if not is_from_source(adapter_id):
            return True
        return reference_of(adapter_id).kind in self._settings.trusted_templates

    async def _known_as(self, name: str, target: Target, engine_name: str) -> Known:
        """What the engine calls a fetched adapter never stands for other bytes."""
        key = replace(target, adapter_id=engine_name)
        known = self._known.get(key)
        if known is not None:
            return known
        found = await self._flights.join(key, lambda: self._learn(target, key))
        if isinstance(found, Known):
            return found
        assert found.failure is not None
        raise from_failure(found.failure, self._settings.retry_after_s, name)

    async def _learn(self, target: Target, key: Target) -> OrderDone | Known:
        done = await self._find(target, key.adapter_id)
        if done.failure is not None:
            return done
        manner = done.manner or NO_MANNER
        known = Known(manner, await self._base.other_parts(manner.base))
        if known.other_parts:
            log.warning("adapter %r: %s", target.adapter_id, _differs(known))
        self._compare_quantization(target, manner)
        self._known.put(key, known, math.inf)
        return known

    def _compare_quantization(self, target: Target, manner: Manner) -> None:
        """Other numbers of the same base cost a little; that is told, and no reason to refuse."""
        info, trained = self._engine.info, manner.base and manner.base.is_quantized
        if info is not None and trained is not None and trained != (info.quantize != "none"):
            how = "quantized" if trained else "full-precision"
            log.warning("adapter %r was trained on a %s base", target.adapter_id, how)

    async def _find(self, target: Target, engine_name: str) -> OrderDone:
        """However long the adapter is on its way, as far as a request would wait."""
        try:
            async with asyncio.timeout(self._settings.request_timeout_s):
                while True:
                    try:
                        return await self._order_find(target, engine_name)
                    except Unavailable as error:
                        if error.reason != "loading" or not self._engine.is_ready():
                            raise
        except TimeoutError as error:
            text = f"adapter {shown(target.adapter_id)} could not be read in time; try later"
            raise TimedOut(text) from error

    async def _order_find(self, target: Target, engine_name: str) -> OrderDone:
        if self._sourced is not None and is_from_source(target.adapter_id):
            reference = reference_of(target.adapter_id)
            return await self._sourced.orders.tell("find", reference, engine_name, target.revision)
        return await self._engine.order("find", engine_name, target.revision)


def _differs(known: Known) -> str:
    parts = " and ".join(map(str, known.other_parts or ()))
    return f"the base it was trained on has another {parts}"
