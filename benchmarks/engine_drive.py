"""An engine in this process under load: requests in, tokens out, all on one clock.

The loop is that of lory_server.process without its socket: what is measured is the engine, not
HTTP. A request that fails ends the measurement. It must not know what is asked for, or why.
"""

import gc
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lory_router.bench.figures import spread
from lory_server.engine import Engine
from lory_server.messages import AdapterMove, Finished, Sampling, StepEvents, Submit
from lory_server.process import keep_step_smooth

WAIT_S = 0.05
STALL_S = 120.0
"""An engine that says nothing for so long, with requests to answer, is taken for hung."""


@dataclass(frozen=True, slots=True)
class Request:
    adapter: str
    """Empty: the base."""
    prompt_ids: tuple[int, ...]
    output_tokens: int


@dataclass(slots=True)
class Reply:
    """What has come of a request."""

    adapter: str
    sent_s: float
    first_s: float = 0.0
    """When its first token came."""
    last_s: float = 0.0
    tokens: int = 0
    finished: Finished | None = None

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.sent_s

    @property
    def tpot_s(self) -> float:
        return (self.last_s - self.first_s) / max(self.tokens - 1, 1)


@dataclass(slots=True)
class Tally:
    """What came in a stretch of time."""

    began_s: float
    tokens: int = 0
    firsts: list[Reply] = field(default_factory=list)
    """Those whose first token came."""
    ended: list[Reply] = field(default_factory=list)
    moves: list[AdapterMove] = field(default_factory=list)
    rows: int = 0
    steps: int = 0

    def moved(self, kind: str, tier: str) -> list[AdapterMove]:
        return [move for move in self.moves if (move.kind, move.tier) == (kind, tier)]

    def figures(self, wall_s: float) -> dict[str, Any]:
        """Rates are over `wall_s`; of latencies, those of requests whose first token came."""
        loads = self.moved("load", "device")
        return {
            "wall_s": round(wall_s, 3),
            "output_tokens_per_s": round(self.tokens / wall_s, 2),
            "requests_ended": len(self.ended),
            "ttft_s": spread(reply.ttft_s for reply in self.firsts),
            "tpot_s": spread(reply.tpot_s for reply in self.ended if reply.tokens > 1),
            "rows_a_step": round(self.rows / max(self.steps, 1), 2),
            "copies": len(loads),
            "copies_a_request": round(len(loads) / max(len(self.firsts), 1), 3),
            "copied_bytes_per_s": round(sum(move.num_bytes for move in loads) / wall_s),
        }


class Driver:
    """One engine, its requests, and what has come of them since the last `restart`."""

    def __init__(self, engine: Engine, wake: threading.Event) -> None:
        """`wake` is what the engine's loader threads set."""
        self.engine = engine
        self._wake = wake
        self._replies: dict[int, Reply] = {}
        self._next_id = 0
        self._heard_s = time.monotonic()
        self._last_step = 0
        self.tally = Tally(time.monotonic())

    def send(self, request: Request) -> Reply:
        number, self._next_id = self._next_id, self._next_id + 1
        now_s = time.monotonic()
        self._heard_s = self._heard_s if self._replies else now_s
        reply = self._replies[number] = Reply(request.adapter, now_s)
        sampling = Sampling(max_new_tokens=request.output_tokens, seed=number, ignore_eos=True)
        self.engine.submit(
            Submit(
                request_id=number,
                prompt_ids=request.prompt_ids,
                sampling=sampling,
                adapter_id=request.adapter,
            )
        )
        return reply

    def turn(self) -> list[Reply]:
        """One turn of the loop; the replies that it ended. Raises RuntimeError if one failed."""
        self._wake.clear()
        self.engine.step()
        ended = self._take(self.engine.events()) if self.engine.has_events else []
        if not self.engine.can_step:
            self._wake.wait(WAIT_S)
        if self._replies and time.monotonic() - self._heard_s > STALL_S:
            raise RuntimeError(f"the engine has said nothing for {STALL_S:g} s")
        return ended

    def answer(self, requests: Sequence[Request]) -> list[Reply]:
        """All of them at once, to their ends."""
        replies = [self.send(request) for request in requests]
        while any(reply.finished is None for reply in replies):
            self.turn()
        return replies

    def drain(self) -> None:
        """End what is open."""
        self.engine.cancel_all("cancelled")
        while self._replies:
            self.turn()

    def restart(self) -> None:
        """Count from now on."""
        self.tally = Tally(time.monotonic())

    def _take(self, events: StepEvents) -> list[Reply]:
        now_s, tally = time.monotonic(), self.tally
        if events.tokens or events.finished:
            self._heard_s = now_s
        tally.moves.extend(events.report.moves)
        tally.rows += events.report.num_rows
        tally.steps += events.report.step - self._last_step
        self._last_step = events.report.step
        for token in events.tokens:
            reply = self._replies[token.request_id]
            tally.tokens += 1
            reply.tokens += 1
            reply.last_s = now_s
            if reply.tokens == 1:
                reply.first_s = now_s
                tally.firsts.append(reply)
        ended = [self._ended(finished) for finished in events.finished]
        tally.ended.extend(ended)
        return ended

    def _ended(self, finished: Finished) -> Reply:
        if finished.failure is not None:
            raise RuntimeError(f"a request failed: {finished.failure.message}")
        reply = self._replies.pop(finished.request_id)
        reply.finished = finished
        return reply


def closed_loop(
    driver: Driver,
    requests: Iterator[Request],
    concurrency: int,
    warm_up_s: float,
    window_s: float,
) -> dict[str, Any]:
    """Figures of a window in which as many requests are open at any time; it is as long as was
    asked for, or as it takes so many requests to end, and ends with all of them cancelled."""
    for _ in range(concurrency):
        driver.send(next(requests))
    _keep_up(driver, requests, concurrency, warm_up_s)
    driver.restart()
    wall_s = _keep_up(driver, requests, concurrency, window_s)
    figures = driver.tally.figures(wall_s)
    driver.drain()
    return figures


def _keep_up(driver: Driver, requests: Iterator[Request], fewest: int, seconds: float) -> float:
    """For so long, and until the fewest have ended; how long that was."""
    began_s, num_ended = time.monotonic(), 0
    while (wall_s := time.monotonic() - began_s) < seconds or num_ended < fewest:
        for _ in driver.turn():
            num_ended += 1
            driver.send(next(requests))
    return wall_s


@contextmanager
def smooth() -> Iterator[None]:
    """What the engine's process does to its interpreter, undone afterwards."""
    interval_s = sys.getswitchinterval()
    keep_step_smooth()
    try:
        yield
    finally:
        sys.setswitchinterval(interval_s)
        gc.unfreeze()
