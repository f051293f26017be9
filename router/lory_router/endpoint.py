"""A generation route as an ASGI application: admission, body, work, one reply, one record.

It must not know dialects' fields: `handle` does the work.
"""

import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass

from starlette.types import Receive, Scope, Send

from lory_router import validate
from lory_router.engine import EngineClient, Unavailable
from lory_router.errors import (
    AdapterReplaced,
    ApiError,
    ClientGone,
    Dialect,
    ReaderTooSlow,
    TimedOut,
)
from lory_router.exchange import Exchange
from lory_router.gate import Gate
from lory_router.hints import Hints
from lory_router.manners import Manners
from lory_router.observe import MetricsSink, Outcome
from lory_router.registry import Registry
from lory_router.rights import Rights
from lory_router.settings import RouterSettings
from lory_router.sse import shown_error
from lory_router.text import TextModel
from lory_server.messages import EngineInfo

MAX_TRIES = 3
"""Of a request whose adapter is replaced while it comes in."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Front:
    """All that a route works with."""

    engine: EngineClient
    settings: RouterSettings
    text: TextModel
    metrics: MetricsSink
    gate: Gate
    registry: Registry
    rights: Rights
    manners: Manners
    hints: Hints

    def require_ready(self) -> EngineInfo:
        """What the engine is, if a request may come in now."""
        self.require_open()
        return validate.engine_info(self.engine.info)

    def require_open(self) -> None:
        """Whether what needs no engine may come in now."""
        if self.engine.is_draining():
            wait = self.settings.retry_after_s
            raise Unavailable("draining", "The server is shutting down", wait)

    def served_as(self, name: str) -> str:
        """The adapter behind a name: what is counted is counted under it. One with a colon is from
        a source, and no name of ours."""
        target = self.registry.target(name) if name and ":" not in name else None
        return target.adapter_id if target else name


Handler = Callable[[Front, Exchange, bytes], Coroutine[None, None, None]]


class Endpoint:
    """One route. `handle` answers through the exchange or raises; it is asked while the engine
    loads, too, if it does without."""

    def __init__(
        self,
        front: Front,
        route: str,
        dialect: Dialect,
        handle: Handler,
        *,
        needs_engine: bool = True,
    ) -> None:
        self._front = front
        self._route = route
        self._dialect: Dialect = dialect
        self._handle = handle
        self._check = front.require_ready if needs_engine else front.require_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, self._dialect, self._front.settings)
        self._front.metrics.request_started(self._route)
        try:
            await self._answer(exchange)
        finally:
            self._front.metrics.request_finished(exchange.record(self._route))

    async def _answer(self, exchange: Exchange) -> None:
        try:
            await self._serve(exchange)
            exchange.outcome = _good_outcome(exchange)
        except ClientGone:
            exchange.outcome = "cancelled"
        except Exception as error:
            exchange.outcome = _bad_outcome(exchange, error)
            if not isinstance(error, ApiError | Unavailable):
                logger.exception("request %s failed", exchange.request_id)
            if not exchange.status:
                told = await self._front.hints.told(shown_error(error), exchange.caller)
                await _unless_gone(exchange.reply_error(told))

    async def _serve(self, exchange: Exchange) -> None:
        self._check()
        gate = self._front.gate
        with gate.holding() as hold:
            body = await exchange.read_body(hold)
            with gate.enter():
                await exchange.until_disconnect(self._handled(exchange, body))

    async def _handled(self, exchange: Exchange, body: bytes) -> None:
        """Made again where the adapter was replaced on the way, if nothing has been said yet."""
        for num_tries in range(1, MAX_TRIES + 1):
            try:
                return await self._handle(self._front, exchange, body)
            except AdapterReplaced as error:
                self._front.manners.replaced(exchange.caller, error)
                if exchange.status or num_tries == MAX_TRIES:
                    raise


async def _unless_gone(reply: Awaitable[None]) -> None:
    try:
        await reply
    except ClientGone:
        return


def _good_outcome(exchange: Exchange) -> Outcome:
    ends = {sequence.transcript.end for sequence in exchange.sequences}
    return "length" if ends == {"length"} else "stop"


def _bad_outcome(exchange: Exchange, error: Exception) -> Outcome:
    if isinstance(error, TimedOut):
        return "timeout"
    if isinstance(error, ReaderTooSlow):
        return "cancelled"
    if isinstance(error, Unavailable) or (isinstance(error, ApiError) and _is_refusal(error)):
        return "refused"
    return "error"


def _is_refusal(error: ApiError) -> bool:
    return error.status < 500 and error.status != 424
