"""Sequences in flight: submitting them, reading them to their end, cancelling what is left.

However a request ends, each of its sequences is cancelled or finished when `running` exits. This
module must not know HTTP, dialects or framing.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

from lory_router.engine import BufferRoom, EngineClient, EngineStream, SequenceRequest
from lory_router.errors import AdapterReplaced, IncompleteGeneration, from_finished
from lory_router.keys import Caller
from lory_router.settings import RouterSettings
from lory_router.text import TextModel
from lory_router.transcript import Piece, Transcript
from lory_router.validate import Ask
from lory_server.messages import CancelReason, Finished

GATHERED_TOKENS = 16
"""Waking the reader of a whole answer once a token took a third of the router's time for it."""


class LiveSequence:
    """One sequence: the engine's stream, and the transcript it is read into."""

    def __init__(
        self,
        stream: EngineStream,
        transcript: Transcript,
        retry_after_s: int,
        request: SequenceRequest,
    ) -> None:
        self._stream = stream
        self._retry_after_s = retry_after_s
        self._request = request
        self.transcript = transcript
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None

    @property
    def adapter_revision(self) -> str:
        return self._stream.adapter_revision

    async def pieces(self) -> AsyncGenerator[list[Piece], None]:
        """The tokens as they come, in batches; returns after the terminal event.

        A stop string cancels the sequence in the engine. Raises the failure it ended in.
        """
        transcript = self.transcript
        async for event in self._stream:
            if isinstance(event, tuple):
                fresh = transcript.feed(event)
                if fresh:
                    self._note(transcript)
                    yield fresh
            elif isinstance(event, Finished):
                transcript.finish(event)
            else:
                transcript.prompt_logprobs = event.logprobs
                transcript.prompt_top = event.top
        self._check_end()

    async def run(self) -> None:
        """Read to the end without looking at the pieces."""
        if not self.transcript.may_stop_anywhere:
            self._stream.gather(GATHERED_TOKENS)
        async for _ in self.pieces():
            pass

    def _note(self, transcript: Transcript) -> None:
        self.last_token_at = time.perf_counter()
        if self.first_token_at is None:
            self.first_token_at = self.last_token_at
        if transcript.cut is not None:
            self.cancel()

    def cancel(self, reason: CancelReason = "cancelled") -> None:
        self._stream.cancel(reason)

    def _check_end(self) -> None:
        """What was told completely is a success, even if the engine failed right after it."""
        if self.transcript.end is not None:
            return
        if self.transcript.finished is None:
            raise IncompleteGeneration("Incomplete generation: the engine's stream broke off")
        request = self._request
        error = from_finished(self.transcript.finished, self._retry_after_s, request.adapter_id)
        if isinstance(error, AdapterReplaced):
            error.recipe = request.recipe
        raise error


@asynccontextmanager
async def running(
    engine: EngineClient,
    asks: Sequence[Ask],
    text: TextModel,
    settings: RouterSettings,
    caller: Caller,
) -> AsyncIterator[list[LiveSequence]]:
    """Submit all of `asks` for `caller`; at the deadline, and when left, cancel what still runs."""
    live: list[LiveSequence] = []
    room = BufferRoom(settings.stream_buffer_tokens)
    loop = asyncio.get_running_loop()
    timer = loop.call_later(settings.request_timeout_s, _cancel_all, live, "timeout")
    try:
        for ask in asks:
            stream = await engine.submit(replace(ask.request, caller=caller, room=room))
            transcript = Transcript(text, ask.request.prompt_ids, ask.ending)
            live.append(LiveSequence(stream, transcript, settings.retry_after_s, ask.request))
            if timer.when() <= loop.time():
                live[-1].cancel("timeout")
        yield live
    finally:
        timer.cancel()
        _cancel_all(live, "cancelled")


def _cancel_all(live: Sequence[LiveSequence], reason: CancelReason) -> None:
    for sequence in live:
        sequence.cancel(reason)


async def run_all(live: Sequence[LiveSequence]) -> None:
    """Read all to their ends, together. The first failure is raised at once."""
    if len(live) == 1:
        await live[0].run()
        return
    tasks = [asyncio.ensure_future(sequence.run()) for sequence in live]
    try:
        await asyncio.gather(*tasks)
    finally:
        await _end_tasks(tasks)


async def merged(live: Sequence[LiveSequence]) -> AsyncGenerator[tuple[int, list[Piece]], None]:
    """The pieces of all sequences as they come, each batch with its sequence's index.

    A sequence is read no faster than the merged pieces are, so that the stream's bound holds.
    """
    if len(live) == 1:
        async with aclosing(live[0].pieces()) as batches:
            async for pieces in batches:
                yield 0, pieces
        return
    queue: Batches = asyncio.Queue()
    tasks = [asyncio.ensure_future(_forward(i, s, queue)) for i, s in enumerate(live)]
    try:
        for _ in live:
            while (item := await queue.get()) is not None:
                yield item
                queue.task_done()
            queue.task_done()
            for task in tasks:
                if task.done():
                    task.result()
    finally:
        await _end_tasks(tasks)


Batches = asyncio.Queue[tuple[int, list[Piece]] | None]


async def _forward(index: int, sequence: LiveSequence, queue: Batches) -> None:
    """One batch of each sequence is on its way at most; None says that this one is over."""
    try:
        async for pieces in sequence.pieces():
            queue.put_nowait((index, pieces))
            await queue.join()
    finally:
        queue.put_nowait(None)


async def _end_tasks(tasks: Sequence["asyncio.Future[None]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
