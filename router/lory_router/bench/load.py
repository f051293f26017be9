"""Load on a server: a workload's requests, sent in a closed or an open loop, and what came back.

Two routes are spoken: OpenAI's /v1/completions, which other servers have too, and /generate with
/generate_stream. It must not know options, repetitions or machines.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import msgspec

from lory_router.bench.client import Exchange, Reply, ReplyError, Target, exchange, read_reply
from lory_router.bench.workload import Ask

ERROR_CHARS = 200


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens, as the server counts them."""

    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request."""

    adapter: str
    latency_s: float
    late_s: float
    """How long after its time in the open loop it was sent."""
    failure: str = ""
    """Empty if it was answered."""
    usage: Usage = Usage(0, 0)
    token_times_s: tuple[float, ...] = ()
    """Streams only: arrival of each event with new text, from the sending."""

    @property
    def ttft_s(self) -> float | None:
        return self.token_times_s[0] if self.token_times_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time of an output token after the first; None for fewer than two."""
        if len(self.token_times_s) < 2 or self.usage.output_tokens < 2:
            return None
        span_s = self.token_times_s[-1] - self.token_times_s[0]
        return span_s / (self.usage.output_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        times = self.token_times_s
        return [after - before for before, after in pairwise(times)]


class Route(Protocol):
    """How one HTTP route is asked and read."""

    def path(self, stream: bool) -> str: ...

    def body(self, ask: Ask, output_tokens: int, stream: bool) -> dict[str, Any]: ...

    def usage(self, value: dict[str, Any]) -> Usage | None:
        """Of a whole reply or of an event; None if it does not say."""
        ...

    def has_text(self, value: dict[str, Any]) -> bool:
        """Whether an event brings something new."""
        ...


@dataclass(frozen=True, slots=True)
class CompletionsRoute:
    """OpenAI's: `model` names the adapter."""

    base_name: str

    def path(self, stream: bool) -> str:
        return "/v1/completions"

    def body(self, ask: Ask, output_tokens: int, stream: bool) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": ask.adapter or self.base_name,
            "prompt": ask.prompt,
            "max_tokens": output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": stream,
        }
        return body | {"stream_options": {"include_usage": True}} if stream else body

    def usage(self, value: dict[str, Any]) -> Usage | None:
        usage = value.get("usage")
        if not usage:
            return None
        return Usage(usage["prompt_tokens"], usage["completion_tokens"])

    def has_text(self, value: dict[str, Any]) -> bool:
        choices = value.get("choices") or ()
        return any(choice["text"] or not choice.get("finish_reason") for choice in choices)


@dataclass(frozen=True, slots=True)
class GenerateRoute:
    """LoRAX's: `adapter_id` names the adapter, prompts are text."""

    def path(self, stream: bool) -> str:
        return "/generate_stream" if stream else "/generate"

    def body(self, ask: Ask, output_tokens: int, stream: bool) -> dict[str, Any]:
        return {
            "inputs": ask.prompt,
            "parameters": {
                "adapter_id": ask.adapter or None,
                "max_new_tokens": output_tokens,
                "ignore_eos_token": True,
                "details": True,
            },
        }

    def usage(self, value: dict[str, Any]) -> Usage | None:
        details = value.get("details")
        if not details:
            return None
        return Usage(details["prompt_tokens"], details["generated_tokens"])

    def has_text(self, value: dict[str, Any]) -> bool:
        return "token" in value


@dataclass(frozen=True, slots=True)
class Load:
    """How requests are sent."""

    target: Target
    route: Route
    output_tokens: int
    stream: bool
    concurrency: int
    """Requests in flight in a closed loop; 0: an open loop, each at its own time."""
    timeout_s: float

    def run(self, asks: Sequence[Ask]) -> tuple[list[Outcome], float]:
        """Outcomes in the order of `asks`, and the seconds from first send to last reply."""
        requests = [self.request(ask) for ask in asks]
        exchanges = asyncio.run(self._send(requests, asks))
        first_s = min(done.began_s for done in exchanges)
        wall_s = max(done.ended_s for done in exchanges) - first_s
        outcomes = [
            self.outcome(ask, done, first_s) for ask, done in zip(asks, exchanges, strict=True)
        ]
        return outcomes, wall_s

    def request(self, ask: Ask) -> bytes:
        """The bytes to send."""
        body = msgspec.json.encode(self.route.body(ask, self.output_tokens, self.stream))
        return self.target.post(self.route.path(self.stream), body)

    def outcome(self, ask: Ask, done: Exchange, began_s: float) -> Outcome:
        """What became of it, in a load that began at `began_s`."""
        latency_s = done.ended_s - done.began_s
        late_s = 0.0 if self.concurrency else done.began_s - began_s - ask.at_s
        try:
            usage, times_s = self._read(read_reply(done))
        except ReplyError as error:
            return Outcome(ask.adapter, latency_s, late_s, failure=str(error))
        times = tuple(at_s - done.began_s for at_s in times_s)
        return Outcome(ask.adapter, latency_s, late_s, usage=usage, token_times_s=times)

    async def _send(self, requests: Sequence[bytes], asks: Sequence[Ask]) -> list[Exchange]:
        if self.concurrency:
            return await self._closed_loop(requests)
        began_s = time.perf_counter()

        async def at_its_time(request: bytes, ask: Ask) -> Exchange:
            await asyncio.sleep(began_s + ask.at_s - time.perf_counter())
            return await exchange(self.target, request, self.timeout_s)

        return await asyncio.gather(*map(at_its_time, requests, asks))

    async def _closed_loop(self, requests: Sequence[bytes]) -> list[Exchange]:
        done: dict[int, Exchange] = {}
        waiting = iter(enumerate(requests))

        async def caller() -> None:
            for place, request in waiting:
                done[place] = await exchange(self.target, request, self.timeout_s)

        await asyncio.gather(*(caller() for _ in range(min(self.concurrency, len(requests)))))
        return [done[place] for place in range(len(requests))]

    def _read(self, reply: Reply) -> tuple[Usage, list[float]]:
        if reply.status != 200:
            text = reply.body[:ERROR_CHARS].decode("utf-8", "replace")
            raise ReplyError(f"HTTP {reply.status}: {text}")
        if not self.stream:
            return _require(self.route.usage(_decode(reply.body))), []
        usage, times_s = None, []
        for at_s, value in _values(reply):
            if self.route.has_text(value):
                times_s.append(at_s)
            usage = self.route.usage(value) or usage
        return _require(usage), times_s


def _values(reply: Reply) -> Iterator[tuple[float, dict[str, Any]]]:
    for at_s, data in reply.events():
        if data == b"[DONE]":
            return
        value = _decode(data)
        if "error" in value:
            raise ReplyError(f"error event: {data[:ERROR_CHARS].decode('utf-8', 'replace')}")
        yield at_s, value


def _decode(data: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ReplyError(f"not JSON: {data[:ERROR_CHARS]!r}") from error


def _require(usage: Usage | None) -> Usage:
    if usage is None:
        raise ReplyError("the reply does not say how many tokens it is")
    return usage
