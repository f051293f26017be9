"""LoRAX's routes: /, /generate, /generate_stream, /invocations, /tokenize; replies to the letter.

It must not know how requests are checked (`intake_lorax`) or sequences run (`running`).
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial

import msgspec

from lory_router import intake_lorax
from lory_router.asking import Context
from lory_router.bodies import read_object, read_struct, refuse_unknown
from lory_router.chat_tokens import chat_tokens, check_form
from lory_router.endpoint import Front
from lory_router.errors import IncompleteGeneration, Invalid
from lory_router.exchange import Exchange
from lory_router.headers import header_text, measured_headers
from lory_router.intake_lorax import LoraxJob
from lory_router.off_loop import encoded
from lory_router.running import LiveSequence, run_all, running
from lory_router.schemas_lorax import (
    Details,
    FinishReason,
    GenerateBody,
    GenerateReply,
    PrefillReply,
    SequenceReply,
    SimpleToken,
    StreamDetails,
    StreamReply,
    TokenizeBody,
    TokenReply,
)
from lory_router.sse import Opened, event, reply_events
from lory_router.text import TextModel
from lory_router.tokenize import locate
from lory_router.transcript import EndReason, Piece, Transcript
from lory_router.validate import check_adapter
from lory_server.messages import EngineInfo
from lory_server.recipes import MERGED

TOKENS_AT_ONCE = 4096
NUM_CONTEXTS = 2
"""So many times the context may messages be that are only tokenized: some are looked at with an
answer that would not fit behind them."""

FINISH_REASONS: dict[EndReason, FinishReason] = {
    "length": "length",
    "eos": "eos_token",
    "stop": "stop_sequence",
}


async def generate(front: Front, exchange: Exchange, body: bytes) -> None:
    """POST /generate: one JSON object."""
    wish = intake_lorax.read_body(body)
    if wish.stream:
        raise Invalid("`stream` is for / ; use /generate_stream", param="stream")
    await _reply_whole(front, exchange, wish, as_list=False)


async def generate_stream(front: Front, exchange: Exchange, body: bytes) -> None:
    """POST /generate_stream: server-sent events."""
    wish = intake_lorax.read_body(body)
    if wish.stream is False:
        raise Invalid("`stream` false is for / ; use /generate", param="stream")
    await _reply_stream(front, exchange, wish)


async def compat_generate(front: Front, exchange: Exchange, body: bytes) -> None:
    """POST / and /invocations: a list of one object, or server-sent events."""
    wish = intake_lorax.read_body(body)
    if wish.stream:
        await _reply_stream(front, exchange, wish)
    else:
        await _reply_whole(front, exchange, wish, as_list=True)


async def tokenize(front: Front, exchange: Exchange, body: bytes) -> None:
    """POST /tokenize: the tokens of a text and where each stands in it; or, of messages, what the
    chat template makes of them, and its tokens."""
    value = read_object(body)
    refuse_unknown(value, TokenizeBody)
    wish = read_struct(value, TokenizeBody)
    check_form(wish)
    special = wish.add_special_tokens is not False
    named = check_adapter(wish.adapter_id, wish.adapter_source, wish.api_token, front.settings)
    manner = await front.manners.of(named, exchange.caller)
    text = await front.manners.text(named, exchange.caller, manner)
    if wish.inputs is None:
        most = NUM_CONTEXTS * front.require_ready().max_model_len
        await exchange.reply_json(await chat_tokens(wish, text, front.settings, most))
        return
    tokens = await locate(text, wish.inputs, front.settings, special)
    body = await asyncio.to_thread(_encode_tokens, tokens, wish.inputs)
    await exchange.reply_json(msgspec.Raw(body))


def _encode_tokens(tokens: Sequence[tuple[int, int, int]], text: str) -> bytes:
    """A JSON list, a part at a time: the event loop waits no longer than for one."""
    parts = []
    for first in range(0, len(tokens), TOKENS_AT_ONCE):
        some = tokens[first : first + TOKENS_AT_ONCE]
        replies = [SimpleToken(id=i, text=text[a:b], start=a, stop=b) for i, a, b in some]
        parts.append(msgspec.json.encode(replies)[1:-1])
    return b"[" + b",".join(parts) + b"]"


async def _accept(
    front: Front, exchange: Exchange, wish: GenerateBody, stream: bool
) -> tuple[LoraxJob, EngineInfo]:
    info = front.require_ready()
    context = Context(info, front.settings, front.text, front.manners, exchange.caller)
    job = await intake_lorax.accept(wish, stream, context)
    exchange.adapter_id = MERGED if job.is_merge else front.served_as(job.adapter_id)
    exchange.sequences_per_prompt = len(job.asks)
    exchange.ready_at = time.perf_counter()
    return job, info


async def _reply_whole(front: Front, exchange: Exchange, wish: GenerateBody, as_list: bool) -> None:
    job, info = await _accept(front, exchange, wish, stream=False)
    async with running(front.engine, job.asks, job.text, front.settings, exchange.caller) as live:
        exchange.sequences = live
        await run_all(live)
    transcripts = [sequence.transcript for sequence in live]
    num_entries = sum(len(t.pieces) + len(t.prompt_logprobs or ()) for t in transcripts)
    reply = await encoded(partial(_reply, job, live, job.text), num_entries if job.details else 0)
    headers = _common_headers(job, front, info) | measured_headers(exchange)
    await exchange.reply_json([reply] if as_list else reply, headers=headers)


async def _reply_stream(front: Front, exchange: Exchange, wish: GenerateBody) -> None:
    async def opened() -> Opened:
        job, info = await _accept(front, exchange, wish, stream=True)
        return _events(front, exchange, job), _common_headers(job, front, info)

    await reply_events(exchange, opened)


async def _events(front: Front, exchange: Exchange, job: LoraxJob) -> AsyncGenerator[bytes, None]:
    """An event a token; the last token's waits for the terminal event, which it tells as well."""
    last: Piece | None = None
    async with running(front.engine, job.asks, job.text, front.settings, exchange.caller) as live:
        exchange.sequences = live
        async with aclosing(live[0].pieces()) as batches:
            async for pieces in batches:
                if pieces[-1].ends is not None:
                    last = pieces.pop()
                if pieces:
                    yield b"".join([_token_event(piece, job.text) for piece in pieces])
    if last is None:
        raise IncompleteGeneration("Incomplete generation")
    yield _last_event(last, job, live[0].transcript, job.text)


def _token_event(piece: Piece, text: TextModel) -> bytes:
    return event(StreamReply(token=_token(piece, text)), "lorax")


def _last_event(last: Piece, job: LoraxJob, transcript: Transcript, text: TextModel) -> bytes:
    details = StreamDetails(
        finish_reason=_finish_reason(transcript),
        prompt_tokens=len(job.prompt_ids),
        generated_tokens=len(transcript.pieces),
        seed=_seed(job, 0),
    )
    reply = StreamReply(
        token=_token(last, text),
        generated_text=job.prompt_text + transcript.text,
        details=details if job.details else None,
    )
    return event(reply, "lorax")


def _reply(job: LoraxJob, live: list[LiveSequence], text: TextModel) -> GenerateReply:
    """Of best_of the likeliest per token; the others go into its details."""
    replies = [_sequence(job, index, s.transcript, text) for index, s in enumerate(live)]
    best = max(range(len(live)), key=lambda index: live[index].transcript.mean_logprob)
    others = [reply for index, reply in enumerate(replies) if index != best]
    chosen = replies[best]
    if not job.details:
        return GenerateReply(generated_text=chosen.generated_text)
    details = Details(
        finish_reason=chosen.finish_reason,
        prompt_tokens=len(job.prompt_ids),
        generated_tokens=chosen.generated_tokens,
        skipped_tokens=0,
        seed=chosen.seed,
        prefill=chosen.prefill,
        tokens=chosen.tokens,
        best_of_sequences=others or None,
    )
    return GenerateReply(generated_text=chosen.generated_text, details=details)


def _sequence(job: LoraxJob, index: int, transcript: Transcript, text: TextModel) -> SequenceReply:
    return SequenceReply(
        generated_text=job.prompt_text + transcript.text,
        finish_reason=_finish_reason(transcript),
        generated_tokens=len(transcript.pieces),
        seed=_seed(job, index),
        prefill=_prefill(transcript, text) if job.prefill_details else [],
        tokens=[_token(piece, text) for piece in transcript.pieces] if job.details else [],
    )


def _finish_reason(transcript: Transcript) -> FinishReason:
    if transcript.end is None:
        raise IncompleteGeneration("Incomplete generation")
    return FINISH_REASONS[transcript.end]


def _seed(job: LoraxJob, index: int) -> int | None:
    return job.asks[index].request.sampling.seed if job.sampled else None


def _token(piece: Piece, text: TextModel) -> TokenReply:
    """A special token shows itself here, though the answer does not hold it."""
    token_id = piece.token.token_id
    special = token_id in text.special_ids or piece.ends == "eos"
    return TokenReply(
        id=token_id,
        text=text.token_text(token_id) if special else piece.text,
        logprob=piece.token.logprob,
        special=special,
    )


def _prefill(transcript: Transcript, text: TextModel) -> list[PrefillReply]:
    """The prompt's tokens; the first has nothing before it and so no probability."""
    logprobs = (None, *(transcript.prompt_logprobs or ()))
    return [
        PrefillReply(id=token_id, text=text.token_text(token_id), logprob=logprob)
        for token_id, logprob in zip(transcript.prompt_ids, logprobs, strict=True)
    ]


def _common_headers(job: LoraxJob, front: Front, info: EngineInfo) -> dict[str, str]:
    headers = {
        "x-compute-type": info.device,
        "x-compute-characters": str(job.num_input_chars),
        "x-model-id": header_text(front.settings.model_names[0]),
        "x-template": job.template,
    }
    if job.adapter_id:
        headers |= {
            "x-adapter-id": header_text(job.adapter_id),
            "x-adapter-source": job.adapter_source,
        }
    return headers
