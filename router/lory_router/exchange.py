"""One HTTP request and its reply: reading the body, answering once, noticing that the client left.

It must not know what a request means.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from lory_router.errors import (
    AdapterNotFound,
    ApiError,
    BodyTimeout,
    BodyTooLarge,
    ClientGone,
    Conflict,
    Dialect,
    DiskFull,
    Overloaded,
    WrongMediaType,
)
from lory_router.gate import caller_of
from lory_router.keys import Caller
from lory_router.observe import Outcome, RequestRecord
from lory_router.running import LiveSequence
from lory_router.settings import RouterSettings
from lory_server.messages import Usage

DISCARD_FACTOR = 16
"""An oversized body is read on and dropped up to this many limits, so that its sender, who may not
read before having written everything, sees the reply and not a broken connection."""
DISCARD_S = 2.0

REQUEST_ID = "lory.request_id"
"""Where a scope holds it."""

Headers = Mapping[str, str]
NO_HEADERS: Headers = MappingProxyType({})


@dataclass(slots=True)
class Exchange:
    """A request being answered. The only place that reads from or writes to the connection."""

    scope: Scope
    receive: Receive
    send: Send
    dialect: Dialect
    settings: RouterSettings
    started_at: float = field(default_factory=time.perf_counter)
    ready_at: float | None = None
    """When the request was validated and tokenised."""
    status: int = 0
    """Of the reply; 0 until one has begun."""
    outcome: Outcome = "refused"
    adapter_id: str = ""
    sequences: Sequence[LiveSequence] = ()
    sequences_per_prompt: int = 1
    """Of so many in a row the prompt is the same, and counts once."""
    extra_headers: dict[str, str] = field(default_factory=dict)

    @property
    def request_id(self) -> str:
        return self.scope[REQUEST_ID]

    @property
    def caller(self) -> Caller:
        return caller_of(self.scope)

    async def read_body(self, hold: Callable[[int], None]) -> bytes:
        """The body, no larger and no later than allowed. `hold` is told its size as it grows."""
        self._check_media_type()
        try:
            async with asyncio.timeout(self.settings.body_timeout_s):
                return await self._read_limited(hold)
        except TimeoutError as error:
            seconds = self.settings.body_timeout_s
            raise BodyTimeout(f"The body did not arrive within {seconds:g} s") from error

    def _header(self, name: bytes) -> bytes:
        return next((value for key, value in self.scope["headers"] if key == name), b"")

    def _check_media_type(self) -> None:
        kind = self._header(b"content-type").split(b";")[0].strip().lower()
        if kind and kind != b"application/json" and not kind.endswith(b"+json"):
            raise WrongMediaType("Send JSON: `Content-Type: application/json`")
        if self._header(b"content-encoding") not in (b"", b"identity"):
            raise WrongMediaType("Compressed bodies are not accepted")

    async def _read_limited(self, hold: Callable[[int], None]) -> bytes:
        most = self.settings.max_body_bytes
        declared = self._header(b"content-length")
        if declared.isdigit() and int(declared[:19]) > most * DISCARD_FACTOR:
            raise self._too_large()
        arriving = self._chunks()
        kept: list[bytes] = []
        size = 0
        try:
            async for chunk in arriving:
                size += len(chunk)
                if size > most:
                    raise self._too_large()
                hold(size)
                kept.append(chunk)
        except (BodyTooLarge, Overloaded):
            kept.clear()
            await _discard(arriving, most * DISCARD_FACTOR)
            raise
        return b"".join(kept)

    async def _chunks(self) -> AsyncIterator[bytes]:
        more = True
        while more:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone("The client left while sending")
            more = message.get("more_body", False)
            yield message.get("body", b"")

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"The body is larger than {self.settings.max_body_bytes} bytes")

    async def until_disconnect(self, work: Coroutine[None, None, None]) -> None:
        """Do `work`; cancel it and raise `ClientGone` when the client leaves first."""
        task = asyncio.ensure_future(work)
        watch = asyncio.ensure_future(self._disconnected())
        try:
            await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
                return
            raise ClientGone("The client left")
        finally:
            await end_task(watch)
            await end_task(task)

    async def _disconnected(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def start(self, status: int, content_type: str, headers: Headers) -> None:
        self.status = status
        named = {"content-type": content_type, **self.extra_headers, **headers}
        if revision := self.adapter_revision:
            named["x-adapter-revision"] = revision
        raw = [(name.encode(), value.encode("latin-1")) for name, value in named.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": raw})

    async def write(self, body: bytes, more: bool) -> None:
        """Send a part of the body, once the client has read what was sent before."""
        await self.send({"type": "http.response.body", "body": body, "more_body": more})

    async def reply_json(
        self, value: object, status: int = 200, headers: Headers = NO_HEADERS
    ) -> None:
        body = msgspec.json.encode(value) + b"\n"
        sized = {"content-length": str(len(body)), **headers}
        await self.start(status, "application/json", sized)
        await self.write(body, more=False)

    async def reply_error(self, error: ApiError) -> None:
        if isinstance(error, AdapterNotFound):
            error.base_name = self.settings.model_names[0]
        headers = error_headers(error)
        await self.reply_json(error.body_for(self.dialect), error.status_for(self.dialect), headers)

    @property
    def adapter_revision(self) -> str:
        """What the sequences hold, as far as it is known; of a replaced adapter maybe two."""
        held = dict.fromkeys(sequence.adapter_revision for sequence in self.sequences)
        return ", ".join(filter(None, held))

    @property
    def first_token_at(self) -> float | None:
        return min((s.first_token_at for s in self.sequences if s.first_token_at), default=None)

    @property
    def time_per_token_s(self) -> float | None:
        """Mean gap between tokens after the first, of the longest sequence."""
        longest = max(self.sequences, key=lambda s: len(s.transcript.pieces), default=None)
        if longest is None or longest.first_token_at is None or longest.last_token_at is None:
            return None
        num_gaps = len(longest.transcript.pieces) - 1
        return (longest.last_token_at - longest.first_token_at) / num_gaps if num_gaps else None

    @property
    def usages(self) -> list[Usage]:
        return [sequence.transcript.usage for sequence in self.sequences]

    def record(self, route: str) -> RequestRecord:
        usages = self.usages
        firsts = usages[:: self.sequences_per_prompt]
        first = self.first_token_at
        return RequestRecord(
            route=route,
            tenant=self.caller.tenant,
            adapter_id=None if first is None else self.adapter_id,
            status=self.status or 499,
            outcome=self.outcome,
            duration_s=time.perf_counter() - self.started_at,
            queue_s=max((usage.queue_seconds for usage in usages), default=0.0),
            time_to_first_token_s=None if first is None else first - self.started_at,
            time_per_token_s=self.time_per_token_s,
            prompt_tokens=sum(usage.prompt_tokens for usage in firsts),
            generated_tokens=sum(usage.generated_tokens for usage in usages),
            cached_tokens=sum(usage.cached_tokens for usage in firsts),
        )


async def _discard(arriving: AsyncIterator[bytes], most: int) -> None:
    size = 0
    try:
        async with asyncio.timeout(DISCARD_S):
            async for chunk in arriving:
                size += len(chunk)
                if size > most:
                    return
    except TimeoutError:
        return


def error_headers(error: ApiError) -> dict[str, str]:
    if error.status == 401:
        return {"www-authenticate": "Bearer"}
    if error.retry_after_s is not None:
        return {"retry-after": str(error.retry_after_s)}
    if isinstance(error, Conflict | DiskFull):
        return {"x-should-retry": "false"}  # OpenAI's clients would send it all twice again
    return {}


async def end_task(task: "asyncio.Future[Any]") -> None:
    """Cancel `task` if it still runs, and wait until it has cleaned up."""
    if not task.done():
        task.cancel()
        await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()
