"""An engine in a child process, as the front sees it: one client over the lives of many children.

A life is one child from spawn to exit; `ChildEngine.live` is one of them, whole. It must not know
HTTP, text, or when another life is due: that is `supervisor`.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from lory_router.engine import SequenceRequest, Unavailable
from lory_router.engine_process import ENGINE_COMMAND, EngineProcess, describe_exit
from lory_router.sequence_stream import SequenceStream
from lory_router.wire import EventDecoder, WireError, encode_frame
from lory_server.messages import (
    PROTOCOL_VERSION,
    AdapterEntry,
    AdapterList,
    AdapterOrder,
    Cancel,
    CancelReason,
    Command,
    EngineInfo,
    EngineOptions,
    Event,
    Fatal,
    Finished,
    ListAdapters,
    OrderDone,
    OrderKind,
    StepEvents,
    StepReport,
    Submit,
)
from lory_server.recipes import MERGED, merged_id

READ_BYTES = 256 * 1024
MAX_UNSENT_BYTES = 64 * 1024 * 1024
EXIT_GRACE_S = 3.0
"""How long an engine that was hung up on may take to leave by itself."""
DEATH_GRACE_S = 0.5
"""How long an engine whose socket closed may take to give its exit status."""
ORDER_TIMEOUT_S = 120.0
LAST_WORDS_S = 0.2
"""How long the socket of a dead engine is read on, for events it sent before."""
SILENCE_MARGIN_S = 1.0
LIST_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class EngineDeath:
    """How a life ended."""

    cause: str
    """One line for a person."""
    is_fatal: bool
    """The engine itself said that it cannot go on."""
    num_served: int
    """Requests that ended well in it."""
    loaded_s: float
    """How long it lived after its base was loaded."""


class _Life:
    """What is known of the child that runs now."""

    def __init__(self, child: EngineProcess) -> None:
        self.child = child
        self.decoder = EventDecoder()
        self.streams: dict[int, SequenceStream] = {}
        self.calls: dict[int, asyncio.Future[Any]] = {}
        """Those that wait for the event with their number."""
        self.loaded_at: float | None = None
        self.fatal: str | None = None
        self.num_heard = 0
        self.num_served = 0

    @property
    def is_loaded(self) -> bool:
        return self.loaded_at is not None

    @property
    def loaded_s(self) -> float:
        return 0.0 if self.loaded_at is None else time.monotonic() - self.loaded_at

    def send(self, command: Command) -> None:
        self.child.writer.write(encode_frame(command))

    def send_cancel(self, request_id: int, reason: CancelReason) -> None:
        if request_id in self.streams:
            self.send(Cancel(request_id=request_id, reason=reason))


class ChildEngine:
    """An `engine.EngineClient` whose engine is a child process, when there is one."""

    def __init__(
        self,
        options: EngineOptions,
        *,
        environment: Mapping[str, str],
        on_info: Callable[[EngineInfo], None],
        on_report: Callable[[StepReport], None],
        step_timeout_s: float = 30.0,
        command: tuple[str, ...] = ENGINE_COMMAND,
    ) -> None:
        self._options = options
        self._environment = environment
        self._on_info = on_info
        self._on_report = on_report
        self._silence_s = step_timeout_s + SILENCE_MARGIN_S
        self._command = command
        self._numbers = itertools.count(1)
        self._life: _Life | None = None
        self._info: EngineInfo | None = None
        self._has_been_loaded = False
        self._is_draining = False
        self._stop = asyncio.Event()
        self.serving = asyncio.Event()
        """Set while sequences are in flight."""

    # -- what the routes ask ----------------------------------------------------------------

    @property
    def info(self) -> EngineInfo | None:
        return self._info

    @property
    def num_in_flight(self) -> int:
        return len(self._life.streams) if self._life else 0

    @property
    def pid(self) -> int | None:
        """The running child's process id."""
        return self._life.child.process.pid if self._life else None

    def is_ready(self) -> bool:
        return self._life is not None and self._life.is_loaded and not self._is_draining

    def is_draining(self) -> bool:
        return self._is_draining

    async def submit(self, request: SequenceRequest) -> SequenceStream:
        """Start one sequence; waits for nothing."""
        life = self._require_life()
        if life.child.writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            raise Unavailable("down", "the engine does not read its requests; try again shortly")
        number, recipe = next(self._numbers), request.recipe
        command = Submit(
            request_id=number,
            prompt_ids=request.prompt_ids,
            sampling=request.sampling,
            adapter_id=merged_id(recipe) if recipe else request.adapter_id,
            adapter_revision=request.adapter_revision,
            manner=request.manner,
            charged_as=request.adapter_id or MERGED if recipe else "",
            tenant=request.caller.tenant,
        )
        life.send(command)
        stream = SequenceStream(number, len(request.prompt_ids), request.room, life.send_cancel)
        life.streams[number] = stream
        self.serving.set()
        return stream

    async def list_adapters(self) -> tuple[AdapterEntry, ...]:
        life, command = self._require_life(), ListAdapters(call_id=next(self._numbers))
        late = "the engine did not list its adapters in time"
        answer: AdapterList = await _call(life, command, LIST_TIMEOUT_S, Unavailable("down", late))
        return answer.adapters

    async def order(self, kind: OrderKind, adapter_id: str, revision: str = "") -> OrderDone:
        life, number = self._require_life(), next(self._numbers)
        command = AdapterOrder(call_id=number, kind=kind, adapter_id=adapter_id, revision=revision)
        late = "the adapter is still on its way; it waits for room, or for a slow disk"
        return await _call(life, command, ORDER_TIMEOUT_S, Unavailable("loading", late))

    def _require_life(self) -> _Life:
        if self._is_draining:
            raise Unavailable("draining", "the server is shutting down")
        if self._life is not None and self._life.is_loaded:
            return self._life
        if self._has_been_loaded:
            raise Unavailable("down", "the engine has ended and is being restarted")
        raise Unavailable("loading", "the model is being loaded")

    # -- what the supervisor asks -----------------------------------------------------------

    def start_draining(self) -> None:
        """Refuse new requests from now on; running ones go on."""
        self._is_draining = True

    def cancel_all(self) -> None:
        for stream in list(self._life.streams.values()) if self._life else ():
            stream.cancel()

    def stop(self) -> None:
        """End the current life and make any later one end at once."""
        self._stop.set()

    def kill(self) -> None:
        """End the child now, without a word."""
        if self._life is not None:
            self._life.child.kill()

    async def live(self) -> EngineDeath:
        """Start a child and serve with it until it is gone; no stream outlives it."""
        try:
            child = await EngineProcess.spawn(self._command, self._environment)
        except OSError as error:
            return EngineDeath(f"the engine could not be started: {error}", False, 0, 0.0)
        life = self._life = _Life(child)
        reason = "the router failed"
        grace_s = 0.0
        try:
            life.send(self._options)
            reason, grace_s = await self._watch(life)
        finally:
            self._life = None
            _abandon(life, reason, self._is_draining)
            self.serving.clear()
            loaded_s = life.loaded_s
            status = await child.end(grace_s)
        cause = life.fatal or reason or f"the engine {describe_exit(status)}"
        return EngineDeath(cause, life.fatal is not None, life.num_served, loaded_s)

    # -- one life ---------------------------------------------------------------------------

    async def _watch(self, life: _Life) -> tuple[str, float]:
        """Serve until the first sign of the end: why (empty: see its status), and the grace due."""
        reading = asyncio.ensure_future(self._read(life))
        endings: dict[asyncio.Future[Any], tuple[str, float]] = {
            reading: ("", DEATH_GRACE_S),
            _task(life.child.process.wait()): ("", 0.0),
            _task(self._stay_until_silent(life)): (
                f"the engine was silent for {self._silence_s:g} s and was killed", 0.0
            ),
            _task(self._stop.wait()): ("the server is shutting down", EXIT_GRACE_S),
        }  # fmt: skip
        try:
            done, _ = await asyncio.wait(endings, return_when=asyncio.FIRST_COMPLETED)
            if reading not in done:
                done |= (await asyncio.wait({reading}, timeout=LAST_WORDS_S))[0]
            return _first_ending(reading, done, endings)
        finally:
            await _cancel(endings)

    async def _read(self, life: _Life) -> None:
        """Take in events until the engine hangs up."""
        with contextlib.suppress(ConnectionError):
            while data := await life.child.reader.read(READ_BYTES):
                for event in life.decoder.feed(data):
                    life.num_heard += 1
                    self._take(life, event)

    def _take(self, life: _Life, event: Event) -> None:
        match event:
            case StepEvents():
                _deliver(life, event)
                if not life.streams:
                    self.serving.clear()
                self._on_report(event.report)
            case EngineInfo():
                self._take_info(life, event)
            case AdapterList() | OrderDone():
                answer = life.calls.pop(event.call_id, None)
                if answer is not None and not answer.done():
                    answer.set_result(event)
            case Fatal():
                life.fatal = event.message

    def _take_info(self, life: _Life, info: EngineInfo) -> None:
        if info.protocol != PROTOCOL_VERSION:
            raise WireError(f"the engine speaks protocol {info.protocol}, not {PROTOCOL_VERSION}")
        self._info = info
        self._has_been_loaded = True
        life.loaded_at = time.monotonic()
        self._on_info(info)

    async def _stay_until_silent(self, life: _Life) -> None:
        """Return once a loaded engine has said nothing for too long.

        Only time seen to pass counts, so that a router that was itself held up kills nobody.
        """
        tick_s = min(0.25, self._silence_s / 8)
        quiet_s = 0.0
        while quiet_s < self._silence_s:
            num_heard = life.num_heard
            await asyncio.sleep(tick_s)
            heard = life.num_heard != num_heard or not life.is_loaded
            quiet_s = 0.0 if heard else quiet_s + tick_s


async def _call(
    life: _Life, command: ListAdapters | AdapterOrder, timeout_s: float, late: Unavailable
) -> Any:
    """The event that answers a command."""
    answer = asyncio.get_running_loop().create_future()
    life.calls[command.call_id] = answer
    life.send(command)
    try:
        return await asyncio.wait_for(answer, timeout_s)
    except TimeoutError:
        raise late from None
    finally:
        life.calls.pop(command.call_id, None)


def _task(work: Coroutine[Any, Any, Any]) -> asyncio.Future[Any]:
    return asyncio.ensure_future(work)


def _first_ending(
    reading: asyncio.Future[Any],
    done: set[asyncio.Future[Any]],
    endings: Mapping[asyncio.Future[Any], tuple[str, float]],
) -> tuple[str, float]:
    """The reason that says most: a named one before "see the exit status"."""
    if reading in done and isinstance(error := reading.exception(), WireError):
        return f"the engine broke the protocol: {error}", 0.0
    for ending in done:
        ending.result()
    return max((endings[ending] for ending in done), key=lambda found: bool(found[0]))


async def _cancel(tasks: Mapping[asyncio.Future[Any], Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _deliver(life: _Life, events: StepEvents) -> None:
    """Hand every event to its stream; those of streams that are over have nobody to go to."""
    streams = life.streams
    for held in events.resolved:
        if stream := streams.get(held.request_id):
            stream.adapter_revision = held.adapter_revision
    for prompt in events.prompts:
        if stream := streams.get(prompt.request_id):
            stream.push_prompt(prompt)
    for token in events.tokens:
        if stream := streams.get(token.request_id):
            stream.push_token(token)
    for finished in events.finished:
        if stream := streams.pop(finished.request_id, None):
            life.num_served += _ended_well(finished)
            stream.finish(finished)


def _ended_well(finished: Finished) -> bool:
    return finished.reason != "error"


def _abandon(life: _Life, reason: str, is_draining: bool) -> None:
    """End everything that waited for this engine."""
    message = f"the engine ended while the request ran ({reason or 'it died'}); send it again"
    for stream in life.streams.values():
        if is_draining and not life.fatal:
            stream.end_cancelled()
        else:
            stream.fail("engine_died", message)
    for answer in life.calls.values():
        if not answer.done():
            answer.set_exception(Unavailable("down", "the engine has ended"))
    life.streams.clear()
    life.calls.clear()
