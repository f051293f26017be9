"""The events of one sequence, between the engine's reader and whoever serves the request.

A bounded buffer with one writer and one reader. It must not know sockets, processes or HTTP.
"""

import asyncio
from collections.abc import Callable

import msgspec

from lory_router.engine import BufferRoom, StreamEvent
from lory_server.messages import (
    CancelReason,
    Failure,
    FailureCode,
    Finished,
    FinishReason,
    PromptLogprobs,
    Token,
    Usage,
)


class SequenceStream:
    """An `engine.EngineStream`: tokens gather here until they are asked for."""

    def __init__(
        self,
        request_id: int,
        num_prompt: int,
        room: BufferRoom,
        send_cancel: Callable[[int, CancelReason], None],
    ) -> None:
        self.adapter_revision = ""
        self._request_id = request_id
        self._num_prompt = num_prompt
        self._room = room
        self._send_cancel = send_cancel
        self._prompt: PromptLogprobs | None = None
        self._tokens: list[Token] = []
        self._finished: Finished | None = None
        self._wake = asyncio.Event()
        self._num_pushed = 0
        self._num_gathered = 1
        self._overflowed = False
        self._is_over = False

    # -- the reader's side ------------------------------------------------------------------

    def __aiter__(self) -> "SequenceStream":
        return self

    async def __anext__(self) -> StreamEvent:
        while not self._is_over:
            event = self._take()
            if event is not None:
                return event
            self._wake.clear()
            await self._wake.wait()
        raise StopAsyncIteration

    def _take(self) -> StreamEvent | None:
        if self._prompt is not None:
            prompt, self._prompt = self._prompt, None
            return prompt
        if self._tokens:
            tokens, self._tokens = tuple(self._tokens), []
            self._room.left += sum(map(_weight, tokens))
            return tokens
        self._is_over = self._finished is not None
        return self._finished

    def gather(self, num_tokens: int) -> None:
        self._num_gathered = num_tokens

    def cancel(self, reason: CancelReason = "cancelled") -> None:
        """Ask the engine to end this sequence; its `Finished` follows."""
        if self._finished is None:
            self._send_cancel(self._request_id, reason)

    # -- the engine's side ------------------------------------------------------------------

    def push_prompt(self, prompt: PromptLogprobs) -> None:
        self._prompt = prompt
        self._wake.set()

    def push_token(self, token: Token) -> None:
        self._num_pushed += 1
        if self._overflowed:
            return
        weight = _weight(token)
        if weight > self._room.left:
            self._overflowed = True
            self.cancel()
            return
        self._room.left -= weight
        self._tokens.append(token)
        is_scarce = self._room.left < self._room.most // 2
        if len(self._tokens) >= self._num_gathered or self._num_pushed == 1 or is_scarce:
            self._wake.set()

    def finish(self, finished: Finished) -> None:
        """The end, told once; a sequence that lost tokens to a slow reader ends in an error."""
        if self._overflowed:
            text = (
                f"The answer was read too slowly: {self._room.most} tokens waited to be read; "
                "read faster, or ask for fewer answers or alternatives at once"
            )
            failure = Failure(code="reader_too_slow", message=text)
            finished = msgspec.structs.replace(finished, reason="error", failure=failure)
        self._finished = finished
        self._wake.set()

    def fail(self, code: FailureCode, message: str) -> None:
        """The end, when the engine cannot tell it."""
        failure = Failure(code=code, message=message)
        self.finish(self._broken_off("error", failure))

    def end_cancelled(self) -> None:
        """The end, when the engine was told to go before it could tell it."""
        self.finish(self._broken_off("cancelled", None))

    def _broken_off(self, reason: FinishReason, failure: Failure | None) -> Finished:
        usage = Usage(
            prompt_tokens=self._num_prompt,
            generated_tokens=self._num_pushed,
            cached_tokens=0,
            queue_seconds=0.0,
            load_seconds=0.0,
            engine_seconds=0.0,
        )
        return Finished(request_id=self._request_id, reason=reason, usage=usage, failure=failure)


def _weight(token: Token) -> int:
    return 1 + len(token.top)
