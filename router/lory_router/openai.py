"""OpenAI's generation routes: /v1/completions and /v1/chat/completions, whole and streamed.

The two differ in a `Dressing` alone: how a choice and a chunk look. It must not know how requests
are checked (`intake_openai`) or sequences run (`running`).
"""

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Protocol

import msgspec

from lory_router import intake_openai
from lory_router.asking import Context
from lory_router.endpoint import Front
from lory_router.exchange import Exchange
from lory_router.headers import header_text, measured_headers
from lory_router.intake_openai import OpenaiJob
from lory_router.off_loop import encoded
from lory_router.openai_shapes import (
    Json,
    Shown,
    chat_logprobs,
    completion_logprobs,
    finish_reason,
    prompt_logprobs,
    usage_of,
    visible,
)
from lory_router.running import LiveSequence, merged, run_all, running
from lory_router.schemas_openai import ChatBody, CompletionBody
from lory_router.sse import DONE, Opened, event, reply_events
from lory_router.text import TextModel
from lory_router.transcript import Piece, Transcript
from lory_server.recipes import MERGED

Accept = Callable[[], Awaitable[OpenaiJob]]
"""What a request is checked by, which may wait for its adapter."""


class Dressing(Protocol):
    """How one of the two routes shows an answer."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def choice(
        self, job: OpenaiJob, index: int, transcript: Transcript, text: TextModel
    ) -> Json: ...

    def first_chunk(self, index: int) -> Json | None: ...

    def chunks(
        self,
        job: OpenaiJob,
        index: int,
        shown: tuple[str, list[Piece]],
        end: str | None,
        text: TextModel,
    ) -> list[Json]: ...


async def completions(front: Front, exchange: Exchange, body: bytes) -> None:
    """POST /v1/completions."""
    wish = intake_openai.read_body(body, CompletionBody)
    accept = partial(intake_openai.accept_completion, wish, _context(front, exchange))
    await _reply(front, exchange, accept, CompletionDressing(), is_stream=bool(wish.stream))


async def chat_completions(front: Front, exchange: Exchange, body: bytes) -> None:
    """POST /v1/chat/completions."""
    wish = intake_openai.read_body(body, ChatBody)
    accept = partial(intake_openai.accept_chat, wish, _context(front, exchange))
    await _reply(front, exchange, accept, ChatDressing(), is_stream=bool(wish.stream))


def _context(front: Front, exchange: Exchange) -> Context:
    info = front.require_ready()
    return Context(info, front.settings, front.text, front.manners, exchange.caller)


async def _reply(
    front: Front, exchange: Exchange, accept: Accept, dressing: Dressing, *, is_stream: bool
) -> None:
    async def opened() -> Opened:
        job, headers = await _accepted(front, exchange, accept)
        return _events(front, exchange, job, dressing), headers

    if is_stream:
        await reply_events(exchange, opened)
    else:
        job, headers = await _accepted(front, exchange, accept)
        await _reply_whole(front, exchange, job, dressing, headers)


async def _accepted(
    front: Front, exchange: Exchange, accept: Accept
) -> tuple[OpenaiJob, dict[str, str]]:
    """What is to be done, and the headers that tell of it."""
    job = await accept()
    exchange.adapter_id = MERGED if job.is_merge else front.served_as(job.adapter_id)
    exchange.sequences_per_prompt = len(job.asks[0])
    exchange.ready_at = time.perf_counter()
    headers = {
        "x-model-id": header_text(front.settings.model_names[0]),
        "x-template": job.template,
    }
    if job.adapter_id:
        headers["x-adapter-id"] = header_text(job.adapter_id)
    return job, headers


def _head(exchange: Exchange, job: OpenaiJob, dressing: Dressing, kind: str) -> Json:
    return {
        "id": dressing.id_prefix + exchange.request_id,
        "object": kind,
        "created": int(time.time()),
        "model": job.model,
        "system_fingerprint": None,
    }


async def _reply_whole(
    front: Front,
    exchange: Exchange,
    job: OpenaiJob,
    dressing: Dressing,
    headers: Mapping[str, str],
) -> None:
    asks = [ask for group in job.asks for ask in group]
    async with running(front.engine, asks, job.text, front.settings, exchange.caller) as live:
        exchange.sequences = live
        await run_all(live)
    groups = _groups(job, live)
    chosen = [t for group in groups for t in _best(group, job.num_choices)]
    choices = [await _encoded_choice(job, i, t, dressing) for i, t in enumerate(chosen)]
    head = _head(exchange, job, dressing, dressing.whole_object)
    usage = usage_of(groups, job.answer)
    whole = {**head, "choices": choices, "usage": usage}
    await exchange.reply_json(whole, headers={**headers, **measured_headers(exchange)})


async def _encoded_choice(
    job: OpenaiJob, index: int, transcript: Transcript, dressing: Dressing
) -> msgspec.Raw:
    num_tokens = len(transcript.pieces) + len(transcript.prompt_logprobs or ())
    num_entries = num_tokens * (1 + (job.num_top_logprobs or 0))
    return await encoded(partial(dressing.choice, job, index, transcript, job.text), num_entries)


def _groups(job: OpenaiJob, live: Sequence[LiveSequence]) -> list[list[Transcript]]:
    transcripts = iter([sequence.transcript for sequence in live])
    return [[next(transcripts) for _ in group] for group in job.asks]


def _best(group: list[Transcript], num: int) -> list[Transcript]:
    """The likeliest per token, best first, where more were run than are shown."""
    if num == len(group):
        return group
    return sorted(group, key=lambda transcript: transcript.mean_logprob, reverse=True)[:num]


async def _events(
    front: Front, exchange: Exchange, job: OpenaiJob, dressing: Dressing
) -> AsyncGenerator[bytes, None]:
    """A chunk a batch of tokens, usage if asked for, and [DONE]."""
    head = _head(exchange, job, dressing, dressing.chunk_object)
    asks = [ask for group in job.asks for ask in group]
    async with running(front.engine, asks, job.text, front.settings, exchange.caller) as live:
        exchange.sequences = live
        choices = [_Streamed(i, s.transcript, job, dressing) for i, s in enumerate(live)]
        async with aclosing(merged(live)) as batches:
            async for index, pieces in batches:
                bodies = choices[index].take(pieces, job.text)
                tail = _chunk_usage(job, live)
                yield b"".join([event({**head, "choices": [b], **tail}, "openai") for b in bodies])
    if job.include_usage:
        usage = usage_of(_groups(job, live))
        yield event({**head, "choices": [], "usage": usage}, "openai")
    yield DONE


def _chunk_usage(job: OpenaiJob, live: Sequence[LiveSequence]) -> Json:
    if job.continuous_usage:
        return {"usage": usage_of(_groups(job, live))}
    return {"usage": None} if job.include_usage else {}


class _Streamed:
    """One choice of a stream."""

    def __init__(
        self, index: int, transcript: Transcript, job: OpenaiJob, dressing: Dressing
    ) -> None:
        self._index = index
        self._transcript = transcript
        self._job = job
        self._dressing = dressing
        self._shown = Shown(transcript)
        self._begun = False

    def take(self, pieces: Sequence[Piece], text: TextModel) -> list[Json]:
        bodies: list[Json] = []
        if not self._begun:
            first = self._dressing.first_chunk(self._index)
            bodies += [first] if first else []
            self._begun = True
        shown = self._shown.take(pieces)
        end = finish_reason(self._transcript) if self._transcript.end else None
        return bodies + self._dressing.chunks(self._job, self._index, shown, end, text)


class CompletionDressing:
    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def choice(self, job: OpenaiJob, index: int, transcript: Transcript, text: TextModel) -> Json:
        prompt = job.prompt_texts[index // job.num_choices] if job.prompt_texts else ""
        return {
            "index": index,
            "text": prompt + transcript.stripped_text if job.answer else prompt,
            "logprobs": self._logprobs(job, transcript, prompt, text),
            "finish_reason": finish_reason(transcript) if job.answer else "length",
        }

    def _logprobs(
        self, job: OpenaiJob, transcript: Transcript, prompt: str, text: TextModel
    ) -> Json | None:
        if job.num_top_logprobs is None:
            return None
        pieces = visible(transcript, transcript.pieces) if job.answer else []
        answer = completion_logprobs(pieces, text, job.num_top_logprobs, len(prompt))
        if not job.prompt_texts:
            return answer
        return _joined(prompt_logprobs(transcript, text), answer)

    def first_chunk(self, index: int) -> Json | None:
        return None

    def chunks(
        self,
        job: OpenaiJob,
        index: int,
        shown: tuple[str, list[Piece]],
        end: str | None,
        text: TextModel,
    ) -> list[Json]:
        said, pieces = shown
        logprobs = None
        if job.num_top_logprobs is not None:
            logprobs = completion_logprobs(pieces, text, job.num_top_logprobs, 0)
        return [{"index": index, "text": said, "logprobs": logprobs, "finish_reason": end}]


def _joined(first: Json, second: Json) -> Json:
    """Two sets of the older log-probabilities, one after the other."""
    names = ["tokens", "token_logprobs", "text_offset"]
    has_top = first["top_logprobs"] is not None and second["top_logprobs"] is not None
    lists: Json = {
        name: [*_list(first[name]), *_list(second[name])]
        for name in (*names, *(("top_logprobs",) if has_top else ()))
    }
    return {"top_logprobs": None, **lists}


def _list(value: object) -> list[object]:
    assert isinstance(value, list)
    return value


class ChatDressing:
    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def choice(self, job: OpenaiJob, index: int, transcript: Transcript, text: TextModel) -> Json:
        said = transcript.stripped_text
        return {
            "index": index,
            "message": {"role": "assistant", "content": said, "refusal": None},
            "logprobs": _chat_logprobs(job, visible(transcript, transcript.pieces), text),
            "finish_reason": finish_reason(transcript),
        }

    def first_chunk(self, index: int) -> Json | None:
        return _delta(index, {"role": "assistant", "content": ""}, None, None)

    def chunks(
        self,
        job: OpenaiJob,
        index: int,
        shown: tuple[str, list[Piece]],
        end: str | None,
        text: TextModel,
    ) -> list[Json]:
        said, pieces = shown
        found: list[Json] = []
        if said or pieces or not end:
            logprobs = _chat_logprobs(job, pieces, text)
            found.append(_delta(index, {"content": said}, logprobs, None))
        return [*found, _delta(index, {}, None, end)] if end else found


def _chat_logprobs(job: OpenaiJob, pieces: Sequence[Piece], text: TextModel) -> Json | None:
    return None if job.num_top_logprobs is None else chat_logprobs(pieces, text)


def _delta(index: int, delta: Json, logprobs: Json | None, end: str | None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": end}
