"""The seam between the front and an engine: what the routes ask, and what comes back.

Two implementations: a child process (`engine_client`) and scripted engines in tests. This module
must not know HTTP, text, sockets or processes.

The contract of a stream, which implementations keep and the routes rely on:
  - at most one `PromptLogprobs` first, then batches of tokens (never an empty one), then exactly
    one `Finished`, after which iteration stops; also when the engine dies, hangs or drains;
  - what it holds for its reader it takes from its request's `BufferRoom`. When the reader is
    slower than that has room for, the sequence is cancelled and the stream ends, after what it
    holds, in a `Finished` with reason "error" and the failure `reader_too_slow`;
  - a sequence that the drain cut short ends in a `Finished` with reason "cancelled";
  - `cancel` returns at once, may be called at any time and any number of times, and is not an
    error after the end. The engine's own `Finished` still follows.
"""

from dataclasses import dataclass, field
from typing import Literal, Protocol

from lory_router.keys import Caller
from lory_router.sources.reference import Reference
from lory_server.messages import (
    AdapterEntry,
    CancelReason,
    EngineInfo,
    Finished,
    OrderDone,
    OrderKind,
    PromptLogprobs,
    Sampling,
    Token,
)
from lory_server.recipes import Recipe

StreamEvent = PromptLogprobs | tuple[Token, ...] | Finished
UnavailableReason = Literal["loading", "draining", "down"]


class BufferRoom:
    """What one request's streams may hold together, in tokens and their alternatives."""

    def __init__(self, most: int = 65536) -> None:
        self.most = most
        self.left = most


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One sequence to generate: `messages.Submit` without the number, which the client assigns."""

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    adapter_id: str = ""
    """Empty: the base."""
    adapter_revision: str = ""
    """Or its beginning; empty: the one on disk."""
    source: Reference | None = None
    """Where the adapter comes from; None: the engine's own folder."""
    recipe: Recipe | None = None
    """A merge in place of one adapter; with `adapter_id`, if it was saved under that name."""
    references: tuple[Reference | None, ...] = ()
    """Where each of its sources comes from, as `source` says it of one adapter."""
    token: str = field(default="", repr=False)
    """The caller's, for that source."""
    manner: str = ""
    """Digest of the manner that the prompt was made by; see `manners`."""
    caller: Caller = Caller()  # noqa: RUF009 - never changes
    """Whose request it is; its tenant pays."""
    room: BufferRoom = field(default_factory=BufferRoom, compare=False, repr=False)
    """Shared by the sequences of one request."""


class Unavailable(Exception):  # noqa: N818 - a state of the engine, told as it is
    """No engine can take a request now; the caller may try again in `retry_after_s`."""

    def __init__(self, reason: UnavailableReason, message: str, retry_after_s: int = 2) -> None:
        super().__init__(message)
        self.reason: UnavailableReason = reason
        self.message = message
        self.retry_after_s = retry_after_s


class EngineStream(Protocol):
    """The events of one sequence, in order; see the module's contract."""

    @property
    def adapter_revision(self) -> str:
        """Of the adapter it holds; known with the first token at the latest, empty for the base."""
        ...

    def __aiter__(self) -> "EngineStream": ...

    async def __anext__(self) -> StreamEvent: ...

    def gather(self, num_tokens: int) -> None:
        """Tokens may come in batches of that many, but for the first and when room gets scarce:
        for a reader who waits for the end."""
        ...

    def cancel(self, reason: CancelReason = "cancelled") -> None: ...


class EngineClient(Protocol):
    """An engine, or several that look like one."""

    @property
    def info(self) -> EngineInfo | None:
        """What the engine said when its base was loaded; None until then. Kept over a restart."""
        ...

    def is_ready(self) -> bool:
        """Whether a request sent now would be taken."""
        ...

    def is_draining(self) -> bool:
        """Whether the server is shutting down: running requests finish, new ones are refused."""
        ...

    async def submit(self, request: SequenceRequest) -> EngineStream:
        """Start one sequence. Raises `Unavailable` when the engine is loading, draining, down."""
        ...

    async def list_adapters(self) -> tuple[AdapterEntry, ...]:
        """All adapters that can be named. Raises `Unavailable` as `submit` does."""
        ...

    async def order(self, kind: OrderKind, adapter_id: str, revision: str = "") -> OrderDone:
        """What came of an order about one adapter, a refusal included; see `AdapterOrder`.

        Raises `Unavailable`, also when it takes too long; the engine goes on with it then.
        """
        ...
