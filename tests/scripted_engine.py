"""An engine that says what a script tells it to, and a front around it, for tests of the routes.

Its vocabulary is bytes: an answer "hi" is the tokens 104, 105 and, unless told otherwise, the end
of sequence (257).
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
from starlette.types import ASGIApp

import tiny_tokenizers
from lory_router.app import create_app
from lory_router.base_check import ServedBase
from lory_router.connection import Connection, HttpServer, http_server
from lory_router.engine import SequenceRequest, StreamEvent, Unavailable
from lory_router.keys import Keyring
from lory_router.listener import listen, url_of
from lory_router.observe import RequestRecord
from lory_router.registry import Registry
from lory_router.settings import RouterSettings
from lory_router.text import TextModel
from lory_server.messages import (
    NO_MANNER,
    AdapterEntry,
    CancelReason,
    EngineInfo,
    Failure,
    FailureCode,
    Finished,
    FinishReason,
    Manner,
    Matched,
    OrderDone,
    OrderKind,
    PromptLogprobs,
    RevisionEntry,
    Token,
    Usage,
)
from lory_server.recipes import MERGED, merged_id, read_recipe

BOS, EOS = 256, 257
VOCAB_SIZE = 258
TEXT = tiny_tokenizers.byte_level()
BASE = "tiny"
REVISION = "0123456789abcdef" * 2
"""Of every adapter, unless a request asks for another."""

INFO = EngineInfo(
    model="tiny",
    architecture="LlamaForCausalLM",
    device="cpu",
    dtype="float32",
    quantize="none",
    vocab_size=VOCAB_SIZE,
    max_model_len=64,
    eos_token_ids=(EOS,),
    num_blocks=32,
    block_size=16,
    max_batch_rows=8,
    max_step_tokens=64,
    pid=1,
    memory_table=(),
    load_seconds=0.5,
)


@dataclass(frozen=True)
class Answer:
    """What one sequence says, if its request lets it."""

    text: bytes = b"hi"
    ends: bool = True
    """Whether end-of-sequence follows the text."""
    batch: int = 1
    """Tokens told at a time."""
    delay_s: float = 0.0
    """Before each batch."""
    first_delay_s: float = 0.0
    logprob: float = -0.5
    fails: FailureCode | None = None
    """Fail so after the text instead of ending."""
    blames: str = ""
    """The source of a merge that fails."""
    tokenizer: str = ""
    """Told with a manner that has changed."""
    hangs: bool = False
    """After the text, say nothing until cancelled."""
    repeats: bool = False
    """Say the text again and again."""


class ScriptedStream:
    def __init__(self, request: SequenceRequest, answer: Answer) -> None:
        self.request = request
        self.answer = answer
        self.cancels: list[CancelReason] = []
        self.num_told = 0
        self.num_gathered = 1
        self.adapter_revision = REVISION if request.adapter_id or request.recipe else ""
        self._cancelled = asyncio.Event()
        self._events = self._script()

    def __aiter__(self) -> "ScriptedStream":
        return self

    async def __anext__(self) -> StreamEvent:
        return await anext(self._events)

    def gather(self, num_tokens: int) -> None:
        self.num_gathered = num_tokens

    def cancel(self, reason: CancelReason = "cancelled") -> None:
        self.cancels.append(reason)
        self._cancelled.set()

    async def _script(self):
        answer, sampling = self.answer, self.request.sampling
        await self._pause(answer.first_delay_s)
        if sampling.prompt_logprobs:
            logprobs = tuple(-0.25 for _ in self.request.prompt_ids[1:])
            best = tuple((i, -0.125 * (i + 1)) for i in range(sampling.num_top_logprobs))
            top = tuple(best for _ in logprobs) if best else ()
            yield PromptLogprobs(request_id=0, logprobs=logprobs, top=top)
        ids = self._ids()
        while batch := [i for _, i in zip(range(answer.batch), ids, strict=False)]:
            await self._pause(answer.delay_s)
            if self._cancelled.is_set():
                break
            self.num_told += len(batch)
            yield tuple(self._token(token_id) for token_id in batch)
            if EOS in batch and not sampling.ignore_eos:
                yield self._finished("eos")
                return
        if answer.fails and not self._cancelled.is_set():
            failure = Failure(
                code=answer.fails,
                message="it broke",
                source=answer.blames,
                tokenizer=answer.tokenizer,
            )
            yield self._finished("error", failure)
            return
        if answer.hangs:
            await self._cancelled.wait()
        is_cut = self._cancelled.is_set() and self.num_told < sampling.max_new_tokens
        yield self._finished(self.cancels[0] if is_cut else "length")

    def _ids(self) -> Iterator[int]:
        wanted = self.request.sampling.max_new_tokens
        text = list(self.answer.text)
        while self.answer.repeats and text and len(text) < wanted:
            text += text
        if self.answer.ends:
            text.append(EOS)
        return iter(text[:wanted])

    def _token(self, token_id: int) -> Token:
        num = self.request.sampling.num_top_logprobs
        top = tuple((token_id + i, self.answer.logprob - i) for i in range(num))
        return Token(request_id=0, token_id=token_id, logprob=self.answer.logprob, top=top)

    async def _pause(self, delay_s: float) -> None:
        if delay_s:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._cancelled.wait(), delay_s)

    def _finished(self, reason: FinishReason, failure: Failure | None = None) -> Finished:
        usage = Usage(
            prompt_tokens=len(self.request.prompt_ids),
            generated_tokens=self.num_told,
            cached_tokens=3,
            queue_seconds=0.25,
            load_seconds=0.0,
            engine_seconds=0.1,
        )
        return Finished(request_id=0, reason=reason, usage=usage, failure=failure)


@dataclass
class ScriptedEngine:
    """`answers` are given in turn, the last one for ever; unknown adapters are not found."""

    answers: list[Answer] = field(default_factory=lambda: [Answer()])
    adapters: tuple[str, ...] = ("french", "org/german")
    info: EngineInfo | None = INFO
    ready: bool = True
    draining: bool = False
    down: Unavailable | None = None
    streams: list[ScriptedStream] = field(default_factory=list)
    orders: list[tuple[OrderKind, str, str]] = field(default_factory=list)
    loaded: set[str] = field(default_factory=set)
    pinned: set[str] = field(default_factory=set)
    refuses: Failure | None = None
    """Every order that would load."""
    refuses_to_pin: Failure | None = None
    manners: dict[str, Manner] = field(default_factory=dict)
    """Of adapters that have one."""

    def is_ready(self) -> bool:
        return self.ready

    def is_draining(self) -> bool:
        return self.draining

    async def submit(self, request: SequenceRequest) -> ScriptedStream:
        if self.down is not None:
            raise self.down
        answer = self.answers[min(len(self.streams), len(self.answers) - 1)]
        named = merged_id(request.recipe) if request.recipe else request.adapter_id
        if named and self._missing(named):
            missing = self._missing(named)[0]
            answer = Answer(text=b"", ends=False, fails="adapter_not_found", blames=missing)
        elif request.manner != (manner := self.manners.get(named, NO_MANNER)).digest:
            told = {"fails": "manner_changed", "tokenizer": manner.tokenizer}
            answer = replace(answer, text=b"", ends=False, **told)
        stream = ScriptedStream(request, answer)
        self.streams.append(stream)
        return stream

    async def list_adapters(self) -> tuple[AdapterEntry, ...]:
        if self.down is not None:
            raise self.down
        return tuple(map(self.entry, self.adapters))

    async def order(self, kind: OrderKind, adapter_id: str, revision: str = "") -> OrderDone:
        if self.down is not None:
            raise self.down
        self.orders.append((kind, adapter_id, revision))
        failure = self._refusal(kind, adapter_id, revision)
        if failure is not None:
            return OrderDone(call_id=0, entry=None, failure=failure)
        if kind in ("load", "pin"):
            self.loaded.add(adapter_id)
        if kind == "pin":
            self.pinned.add(adapter_id)
        if kind in ("unpin", "drop"):
            self.pinned.discard(adapter_id)
        if kind in ("unload", "drop"):
            self.loaded.discard(adapter_id)
        told = REVISION if kind in ("find", "load", "pin") else ""
        manner = self.manners.get(adapter_id, NO_MANNER) if kind == "find" else None
        return OrderDone(call_id=0, entry=self.entry(adapter_id), revision=told, manner=manner)

    def _refusal(self, kind: OrderKind, adapter_id: str, revision: str) -> Failure | None:
        if kind == "unload" and adapter_id in self.pinned:
            return Failure(code="adapter_pinned", message=f"adapter {adapter_id!r} is pinned")
        if kind not in ("find", "load", "pin"):
            return None
        missing = self._missing(adapter_id)
        if missing:
            return Failure(code="adapter_not_found", message="there is none", source=missing[0])
        if not REVISION.startswith(revision):
            return Failure(code="revision_not_found", message="not in memory any more")
        return self.refuses or (self.refuses_to_pin if kind == "pin" else None)

    def _missing(self, adapter_id: str) -> list[str]:
        """Itself, or the sources of a merge."""
        if not adapter_id.startswith(MERGED):
            return [] if adapter_id in self.adapters else [""]
        sources = read_recipe(adapter_id).sources
        return [one.adapter_id for one in sources if one.adapter_id not in self.adapters]

    def entry(self, adapter_id: str) -> AdapterEntry:
        """As the engine tells it: nothing is known of what was never loaded."""
        if adapter_id not in self.loaded:
            return AdapterEntry(adapter_id=adapter_id, tier="disk")
        revision = RevisionEntry(
            revision=REVISION,
            tier="device",
            matched=(Matched("q_proj", 2, (4, 8)),),
            file_bytes=300,
            host_bytes=200,
            device_bytes=100,
            is_pinned=adapter_id in self.pinned,
            invocation_tokens=(7, 8),
        )
        return AdapterEntry(
            adapter_id=adapter_id,
            tier="device",
            revision=REVISION,
            revisions=(revision,),
            idle_seconds=5.0,
        )

    @property
    def last(self) -> SequenceRequest:
        return self.streams[-1].request


@dataclass
class Ledger:
    """A metrics sink that remembers."""

    started: list[str] = field(default_factory=list)
    records: list[RequestRecord] = field(default_factory=list)

    def request_started(self, route: str) -> None:
        self.started.append(route)

    def request_finished(self, record: RequestRecord) -> None:
        self.records.append(record)

    def render(self) -> tuple[bytes, str]:
        return b"lory_up 1\n", "text/plain; version=0.0.4"


class Front:
    """An application around a scripted engine, and what it did."""

    def __init__(
        self,
        *answers: Answer,
        text: TextModel = TEXT,
        engine: ScriptedEngine | None = None,
        registry: Registry | None = None,
        base: ServedBase | None = None,
        keys: Keyring | None = None,
        **settings: Any,
    ) -> None:
        self.engine = engine or ScriptedEngine(list(answers) or [Answer()])
        self.settings = RouterSettings(model_names=(BASE,), **settings)
        self.ledger = Ledger()
        self._server: HttpServer | None = None
        self.registry = registry or Registry()
        self.app: ASGIApp = create_app(
            self.engine, self.settings, text, self.ledger, self.registry, keys=keys, base=base
        )

    def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        """One request through the application, without a network."""

        async def call(client: httpx.AsyncClient) -> httpx.Response:
            return await client.request(method, path, **more)

        return self.run(call)

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        return self.ask("POST", path, json=body, **more)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self.ask("GET", path, **more)

    def run(self, work: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
        async def main() -> Any:
            transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://lory") as client:
                return await work(client)

        return asyncio.run(main())

    @contextlib.contextmanager
    def served(
        self, protocol: type[Connection] = Connection, max_connections: int = 100
    ) -> Iterator[str]:
        """The same on a real socket, served as `lory serve` does, in a thread; its address."""
        listener = listen("127.0.0.1", 0)
        server = http_server(self.app, max_connections, protocol)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        self._server = server
        try:
            wait_until(lambda: server.started)
            yield url_of(listener)
        finally:
            self.stop()
            thread.join(10)
            listener.close()

    def stop(self) -> None:
        """Tell the server to end, which `served` waits for."""
        assert self._server is not None
        self._server.should_exit = True


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def events(response: httpx.Response) -> list[str]:
    """The data of a stream's events, in order; comments left out."""
    assert response.headers["content-type"] == "text/event-stream"
    blocks = [block for block in response.text.split("\n\n") if block]
    assert all(block.startswith(("data:", ":")) and "\n" not in block for block in blocks)
    return [block.removeprefix("data:").strip() for block in blocks if block != ":"]
