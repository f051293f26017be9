"""Puts a stream together again: its bytes in, items out as they come, one result at the end.

An error event is raised as what it is; a stream that ends before its final event is an
`IncompleteStreamError`. This module must not know httpx, sockets or routes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from . import replies
from .errors import IncompleteStreamError, ProtocolError
from .fields import Fields, parse_json
from .replies import Head
from .sse import SSEDecoder
from .types import ChatChoice, ChatCompletion, ChatDelta, Generation, Token, TokenLogprob, Usage

Item = TypeVar("Item")
Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class Assembler(Protocol[Item, Result_co]):
    """What both kinds of stream have in common."""

    def feed(self, data: str) -> list[Item]:
        """Items of one event."""
        ...

    @property
    def is_complete(self) -> bool: ...

    def result(self) -> Result_co:
        """The whole; raises if the final event has not come."""
        ...


class StreamReader(Generic[Item, Result]):
    """Decodes and assembles one reply; the same for blocking and async drivers."""

    def __init__(self, assemble: Callable[[Head], Assembler[Item, Result]]) -> None:
        self._assemble = assemble
        self._decoder = SSEDecoder()
        self._head: Head | None = None
        self._assembler: Assembler[Item, Result] | None = None

    def start(self, head: Head) -> None:
        kind = head.headers.get("content-type", "")
        if not kind.startswith("text/event-stream"):
            raise ProtocolError(
                f"expected an event stream, got {kind or 'no type'}: is this a Lory server?",
                status=head.status,
                request_id=head.request_id,
            )
        self._head = head
        self._assembler = self._assemble(head)

    @property
    def is_complete(self) -> bool:
        """The final event has come; nothing behind it counts."""
        return self._assembler is not None and self._assembler.is_complete

    @property
    def request_id(self) -> str | None:
        return self._head.request_id if self._head else None

    def feed(self, chunk: bytes) -> Iterator[Item]:
        """Items one by one, so that those before an error event are not lost with it."""
        assert self._head is not None
        assert self._assembler is not None
        for data in self._decoder.feed(chunk):
            if self._assembler.is_complete:
                return
            with replies.named(self._head):
                items = self._assembler.feed(data)
            yield from items

    def result(self) -> Result:
        if self._assembler is None:
            raise IncompleteStreamError("the stream has not been read yet")
        return self._assembler.result()


class GenerationAssembler:
    """Events of /generate_stream: one token each; the last carries the text and the details."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._tokens: list[Token] = []
        self._generation: Generation | None = None

    def feed(self, data: str) -> list[Token]:
        event = _event(self._head, data)
        tokens = [replies.token(event.object("token"))] if event.has("token") else []
        self._tokens += tokens
        if event.has("generated_text"):
            self._generation = self._whole(event)
        return tokens

    @property
    def is_complete(self) -> bool:
        return self._generation is not None

    def result(self) -> Generation:
        if self._generation is None:
            raise _incomplete(self._head, f"{len(self._tokens)} tokens")
        return self._generation

    def _whole(self, event: Fields) -> Generation:
        details = event.object("details") if event.has("details") else None
        return Generation(
            text=event.text("generated_text"),
            finish_reason=details.text("finish_reason") if details else None,
            tokens=tuple(self._tokens),
            usage=replies.native_usage(details) if details else None,
            seed=details.integer_or_none("seed") if details else None,
            adapter_id=self._head.adapter_id,
            adapter_revision=self._head.adapter_revision,
            request_id=self._head.request_id,
        )


@dataclass
class _Choice:
    """One choice of a chat as it grows."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None

    def whole(self, index: int) -> ChatChoice:
        text = "".join(self.text)
        return ChatChoice(index, text, self.finish_reason, logprobs=tuple(self.logprobs))


class ChatAssembler:
    """Chunks of /v1/chat/completions, and `[DONE]` behind the last."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._id = ""
        self._model = ""
        self._choices: dict[int, _Choice] = {}
        self._usage: Usage | None = None
        self._is_done = False

    def feed(self, data: str) -> list[ChatDelta]:
        if data.strip() == "[DONE]":
            self._is_done = True
            return []
        chunk = _event(self._head, data)
        self._id, self._model = chunk.text("id"), chunk.text("model")
        self._usage = replies.openai_usage(chunk) or self._usage
        return [self._delta(choice) for choice in chunk.objects("choices")]

    @property
    def is_complete(self) -> bool:
        return self._is_done

    def result(self) -> ChatCompletion:
        if not self._is_done:
            raise _incomplete(self._head, "no [DONE]")
        choices = tuple(self._choices[i].whole(i) for i in sorted(self._choices))
        if not choices:
            raise ProtocolError("the stream had no choices", request_id=self._head.request_id)
        return ChatCompletion(self._id, self._model, choices, self._usage, self._head.request_id)

    def _delta(self, item: Fields) -> ChatDelta:
        delta = ChatDelta(
            index=item.integer("index"),
            text=item.object("delta").text_or_none("content") or "",
            finish_reason=item.text_or_none("finish_reason"),
            logprobs=replies.logprobs(item),
        )
        choice = self._choices.setdefault(delta.index, _Choice())
        choice.text.append(delta.text)
        choice.logprobs += delta.logprobs
        choice.finish_reason = delta.finish_reason or choice.finish_reason
        return delta


def _event(head: Head, data: str) -> Fields:
    event = Fields(parse_json(data, "an event of the stream"), "event")
    if event.has("error"):
        raise replies.stream_error(head, event.value)
    return event


def _incomplete(head: Head, what: str) -> IncompleteStreamError:
    return IncompleteStreamError(
        f"the stream ended without its final event ({what})", request_id=head.request_id
    )
