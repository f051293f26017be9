"""Replies of the server, as values or as errors: status, headers and bytes in, types out.

The native routes speak LoRAX's JSON, `/v1/*` OpenAI's; an error may come in either shape.
This module must not know httpx, sockets, retries or time zones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any

from .errors import ProtocolError, StatusError, class_for
from .fields import Fields, parse_json
from .retry import parse_retry_after
from .types import (
    Candidate,
    ChatChoice,
    ChatCompletion,
    Generation,
    Model,
    PromptToken,
    ServerInfo,
    TextToken,
    Token,
    TokenLogprob,
    Usage,
)

RETRYABLE_STATUSES = frozenset({429, 503})

# An error inside a stream comes under status 200: its code says what it would have been.
_STATUS_OF_CODE = {
    "invalid_value": 400,
    "context_length_exceeded": 400,
    "adapter_invalid": 400,
    "adapter_capacity": 400,
    "source_forbidden": 403,
    "adapter_not_found": 404,
    "model_not_found": 404,
    "revision_not_found": 404,
    "reader_too_slow": 408,
    "conflict": 409,
    "adapter_too_large": 413,
    "validation": 422,
    "generation": 424,
    "overloaded": 429,
    "incomplete_generation": 500,
    "internal": 500,
    "registry": 500,
    "fine_tuning": 500,
    "adapter_replaced": 503,
    "healthcheck": 503,
    "source_unavailable": 503,
    "unavailable": 503,
    "too_many_connections": 503,
    "timeout": 504,
    "disk_full": 507,
}


@dataclass(frozen=True)
class Head:
    """Status and headers of a reply; header names in lower case."""

    status: int
    headers: Mapping[str, str]

    @property
    def request_id(self) -> str | None:
        return self.headers.get("x-request-id")

    @property
    def adapter_id(self) -> str | None:
        return self.headers.get("x-adapter-id") or None

    @property
    def adapter_revision(self) -> str | None:
        return self.headers.get("x-adapter-revision") or None


# -- errors ---------------------------------------------------------------------------------


def status_error(head: Head, body: bytes, now: datetime) -> StatusError:
    """The error of a reply whose status is not a success."""
    message, code = _described(body)
    retry_after_s = parse_retry_after(head.headers.get("retry-after"), now)
    refused_for_good = head.headers.get("x-should-retry", "").lower() == "false"
    return class_for(head.status, code)(
        message or f"the server answered {head.status} without a reason",
        status=head.status,
        code=code,
        request_id=head.request_id,
        retry_after_s=retry_after_s,
        retryable=head.status in RETRYABLE_STATUSES and not refused_for_good,
    )


def stream_error(head: Head, event: Mapping[str, Any]) -> StatusError:
    """The error of an event inside a stream. Never retryable: the answer has begun."""
    message, code = _reason(event)
    status = _STATUS_OF_CODE.get(code or "", 424)
    return class_for(status, code)(
        message or "the server broke the stream off without a reason",
        status=status,
        code=code,
        request_id=head.request_id,
    )


@contextmanager
def named(head: Head) -> Iterator[None]:
    """Tells a `ProtocolError` raised inside which reply it is about."""
    try:
        yield
    except ProtocolError as error:
        error.status, error.request_id = head.status, head.request_id
        raise


def _described(body: bytes) -> tuple[str, str | None]:
    """Message and code of an error body; a proxy's text is quoted in short."""
    try:
        value = json.loads(body)
    except ValueError:
        return body[:200].decode("utf-8", errors="replace").strip(), None
    return _reason(value) if isinstance(value, Mapping) else (str(value)[:200], None)


def _reason(value: Mapping[str, Any]) -> tuple[str, str | None]:
    """From {"error": text, "error_type": code}, or {"error": {"message", "type", "code"}}."""
    error = value.get("error")
    if isinstance(error, Mapping):
        return _text(error.get("message")), _text(error.get("code") or error.get("type")) or None
    # A framework's own error, such as an unknown path, is {"detail": text}.
    return _text(error or value.get("detail")), _text(value.get("error_type")) or None


def _text(value: object) -> str:
    return "" if value is None else str(value)


# -- native routes --------------------------------------------------------------------------


def generation(head: Head, body: bytes) -> Generation:
    reply = Fields(parse_json(body, "the reply"), "reply")
    text = reply.text("generated_text")
    if not reply.has("details"):
        return Generation(
            text,
            adapter_id=head.adapter_id,
            request_id=head.request_id,
            adapter_revision=head.adapter_revision,
        )
    details = reply.object("details")
    return Generation(
        text=text,
        finish_reason=details.text("finish_reason"),
        tokens=tuple(token(item) for item in details.objects("tokens")),
        prompt_tokens=tuple(_prompt_token(item) for item in details.objects("prefill")),
        usage=native_usage(details),
        seed=details.integer_or_none("seed"),
        adapter_id=head.adapter_id,
        request_id=head.request_id,
        adapter_revision=head.adapter_revision,
        other_candidates=tuple(_candidate(c) for c in details.objects("best_of_sequences")),
    )


def native_usage(details: Fields) -> Usage:
    return Usage(details.integer("prompt_tokens"), details.integer("generated_tokens"))


def token(item: Fields) -> Token:
    token_id, raw_text = item.integer("id"), item.text("text")
    logprob, special = item.number_or_none("logprob"), item.flag("special")
    return Token(
        id=token_id,
        text="" if special else raw_text,
        logprob=logprob,
        special=special,
        raw_text=raw_text,
    )


def _prompt_token(item: Fields) -> PromptToken:
    return PromptToken(item.integer("id"), item.text("text"), item.number_or_none("logprob"))


def _candidate(item: Fields) -> Candidate:
    return Candidate(
        text=item.text("generated_text"),
        finish_reason=item.text("finish_reason"),
        tokens=tuple(token(t) for t in item.objects("tokens")),
        generated_tokens=item.integer("generated_tokens"),
        seed=item.integer_or_none("seed"),
    )


def info(_head: Head, body: bytes) -> ServerInfo:
    reply = Fields(parse_json(body, "the reply"), "reply")
    return ServerInfo(
        model_id=reply.text("model_id"),
        model_dtype=reply.text_or_none("model_dtype"),
        model_device_type=reply.text_or_none("model_device_type"),
        max_input_length=reply.integer_or_none("max_input_length"),
        max_total_tokens=reply.integer_or_none("max_total_tokens"),
        version=reply.text_or_none("version"),
        fields=MappingProxyType(dict(reply.value)),
    )


def text_tokens(_head: Head, body: bytes) -> tuple[TextToken, ...]:
    listing = Fields({"tokens": parse_json(body, "the reply")}, "reply")
    return tuple(
        TextToken(t.integer("id"), t.text("text"), t.integer("start"), t.integer("stop"))
        for t in listing.objects("tokens")
    )


def ready(_head: Head, _body: bytes) -> bool:
    return True


# -- OpenAI's routes ------------------------------------------------------------------------


def models(_head: Head, body: bytes) -> tuple[Model, ...]:
    reply = Fields(parse_json(body, "the reply"), "reply")
    return tuple(
        Model(item.text("id"), item.text_or_none("parent"), item.text_or_none("root"))
        for item in reply.objects("data")
    )


def chat_completion(head: Head, body: bytes) -> ChatCompletion:
    reply = Fields(parse_json(body, "the reply"), "reply")
    choices = tuple(_choice(item) for item in reply.objects("choices"))
    if not choices:
        raise ProtocolError("reply.choices is empty")
    return ChatCompletion(
        id=reply.text("id"),
        model=reply.text("model"),
        choices=choices,
        usage=openai_usage(reply),
        request_id=head.request_id,
    )


def _choice(item: Fields) -> ChatChoice:
    message = item.object("message")
    return ChatChoice(
        index=item.integer("index"),
        text=message.text_or_none("content") or "",
        finish_reason=item.text_or_none("finish_reason"),
        role=message.text("role"),
        logprobs=logprobs(item),
    )


def openai_usage(reply: Fields) -> Usage | None:
    if not reply.has("usage"):
        return None
    usage = reply.object("usage")
    return Usage(usage.integer("prompt_tokens"), usage.integer("completion_tokens"))


def logprobs(choice: Fields) -> tuple[TokenLogprob, ...]:
    if not choice.has("logprobs"):
        return ()
    content = choice.object("logprobs").objects("content")
    return tuple(_token_logprob(item) for item in content)


def _token_logprob(item: Fields) -> TokenLogprob:
    return TokenLogprob(
        text=item.text("token"),
        logprob=item.number("logprob"),
        alternatives=tuple(_token_logprob(a) for a in item.objects("top_logprobs")),
    )
