"""Requests of each route, as data: method, path, body, and who reads the reply.

Nothing here does I/O: `lory_client.client` sends a `Call`, in blocking or async style, and hands
the reply back to it. This module must not know httpx, sockets, retries or time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, Union

from . import replies
from .replies import Head
from .streams import Assembler, ChatAssembler, GenerationAssembler
from .types import (
    ChatCompletion,
    ChatDelta,
    ChatMessage,
    ChatParameters,
    GenerateParameters,
    Generation,
    MergedAdapters,
    Model,
    Prompt,
    ServerInfo,
    TextToken,
    Token,
)

Result = TypeVar("Result")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Call(Generic[Result]):
    """A request answered by one body."""

    method: str
    path: str
    body: bytes | None
    parse: Callable[[Head, bytes], Result]
    content_type: str = "application/json"


@dataclass(frozen=True)
class StreamCall(Generic[Item, Result]):
    """A request answered by server-sent events."""

    method: str
    path: str
    body: bytes
    assemble: Callable[[Head], Assembler[Item, Result]]
    content_type: str = "application/json"


AnyCall = Union[Call[Any], StreamCall[Any, Any]]


def generate(
    prompt: Prompt, adapter_id: str | None, parameters: GenerateParameters
) -> Call[Generation]:
    body = _native_body(prompt, adapter_id, parameters)
    return Call("POST", "/generate", body, replies.generation)


def generate_stream(
    prompt: Prompt, adapter_id: str | None, parameters: GenerateParameters
) -> StreamCall[Token, Generation]:
    body = _native_body(prompt, adapter_id, parameters)
    return StreamCall("POST", "/generate_stream", body, GenerationAssembler)


def chat(
    messages: Iterable[ChatMessage], adapter_id: str | None, parameters: ChatParameters
) -> Call[ChatCompletion]:
    body = _chat_body(messages, adapter_id, parameters)
    return Call("POST", "/v1/chat/completions", _encode(body), replies.chat_completion)


def chat_stream(
    messages: Iterable[ChatMessage], adapter_id: str | None, parameters: ChatParameters
) -> StreamCall[ChatDelta, ChatCompletion]:
    body = _chat_body(messages, adapter_id, parameters)
    streamed = {"stream_options": {"include_usage": True}, **body, "stream": True}
    return StreamCall("POST", "/v1/chat/completions", _encode(streamed), ChatAssembler)


def models() -> Call[tuple[Model, ...]]:
    return Call("GET", "/v1/models", None, replies.models)


def health() -> Call[bool]:
    return Call("GET", "/health", None, replies.ready)


def info() -> Call[ServerInfo]:
    return Call("GET", "/info", None, replies.info)


def tokenize(
    text: str, add_special_tokens: bool, adapter_id: str | None = None
) -> Call[tuple[TextToken, ...]]:
    told = {"inputs": text, "add_special_tokens": add_special_tokens}
    whose = {} if adapter_id is None else {"adapter_id": adapter_id}
    return Call("POST", "/tokenize", _encode({**told, **whose}), replies.text_tokens)


def _native_body(prompt: Prompt, adapter_id: str | None, parameters: GenerateParameters) -> bytes:
    given = _given(parameters, GenerateParameters.__annotations__)
    given.setdefault("details", True)
    if adapter_id is not None:
        given["adapter_id"] = adapter_id
    return _encode({"inputs": _plain(prompt), "parameters": given})


def _chat_body(
    messages: Iterable[ChatMessage], adapter_id: str | None, parameters: ChatParameters
) -> dict[str, Any]:
    # OpenAI's `model` names the adapter; an empty one is the base.
    given = _given(parameters, ChatParameters.__annotations__)
    return {"model": adapter_id or "", "messages": [dict(m) for m in messages], **given}


def _given(parameters: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters that were given, `extra` merged in; a misspelt name is an error, not a no-op."""
    unknown = sorted(parameters.keys() - known.keys())
    if unknown:
        raise TypeError(
            f"unknown parameter {unknown[0]!r}; known: {', '.join(sorted(known))}"
            " (what a newer server knows goes into extra={...})"
        )
    given = {name: _plain(value) for name, value in parameters.items() if value is not None}
    extra = given.pop("extra", {})
    return {**given, **extra}


def _plain(value: Any) -> Any:
    if isinstance(value, MergedAdapters):
        value = {name: _plain(one) for name, one in vars(value).items() if one is not None}
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _encode(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, allow_nan=False, separators=(",", ":")).encode("ascii")
