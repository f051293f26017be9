"""A running server, asked over HTTP as anybody asks it, a bounded number of requests at once.

Overload is waited out; anything else that goes wrong ends the evaluation in one message that says
how far it came. It must not know rows, metrics or what questions mean.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from lory_trainer.evaluation.errors import EvaluationError, ServerError, ServerLostError

MAX_TRIES = 8
"""Of a request that the server has no room for."""
LONGEST_WAIT_S = 30.0
CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 600.0
BUSY = (429, 503)

T = TypeVar("T")
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    body: Any
    headers: httpx.Headers
    seconds: float
    """From sending it, waits for room not counted."""


class Server:
    """Use it in an `async with` block."""

    def __init__(
        self,
        url: str,
        api_key: str,
        concurrency: int,
        transport: httpx.AsyncBaseTransport | None = None,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self.url = url
        self.concurrency = concurrency
        self._client = httpx.AsyncClient(
            base_url=url,
            headers=headers,
            timeout=httpx.Timeout(answer_timeout_s, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=concurrency),
            transport=transport,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.aclose()

    async def get(self, path: str) -> Reply:
        return await self._ask("GET", path, None)

    async def post(self, path: str, body: Json) -> Reply:
        return await self._ask("POST", path, body)

    async def _ask(self, method: str, path: str, body: Json | None) -> Reply:
        response, seconds = await self._send(method, path, body)
        for num_tries in range(1, MAX_TRIES):
            if response.status_code not in BUSY:
                break
            await asyncio.sleep(_wait_s(response, num_tries))
            response, seconds = await self._send(method, path, body)
        if response.is_error:
            raise ServerError(_complaint(method, path, response), response.status_code)
        try:
            return Reply(response.json(), response.headers, seconds)
        except ValueError as error:
            raise EvaluationError(f"{self.url}: {path} did not answer with JSON") from error

    async def _send(
        self, method: str, path: str, body: Json | None
    ) -> tuple[httpx.Response, float]:
        started_s = time.perf_counter()
        try:
            response = await self._client.request(method, path, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise ServerLostError(f"no answer from {self.url}: {reason}") from error
        return response, time.perf_counter() - started_s

    async def ask_all(
        self,
        name: str,
        questions: Sequence[T],
        ask: Callable[[T], Any],
        watch: Callable[[int], None],
    ) -> list[Any]:
        """The answers in order, `concurrency` asked at once; `watch` is told how many there are.

        The first failure ends the others.
        """
        room, num_done = asyncio.Semaphore(self.concurrency), 0

        async def one(question: T) -> Any:
            nonlocal num_done
            async with room:
                answer = await ask(question)
            num_done += 1
            watch(num_done)
            return answer

        tasks = [asyncio.ensure_future(one(question)) for question in questions]
        try:
            return list(await asyncio.gather(*tasks))
        except EvaluationError as error:
            done = f"{num_done} of {len(tasks)} rows of {name} were answered"
            raise EvaluationError(f"{error} ({done})") from error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def understood(path: str) -> Iterator[None]:
    """What is read within from an answer to `path`; EvaluationError where it makes no sense."""
    try:
        yield
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise EvaluationError(f"{path}: an answer without {error}; is this Lory?") from error


def _wait_s(response: httpx.Response, num_tries: int) -> float:
    told = response.headers.get("retry-after", "")
    return min(LONGEST_WAIT_S, float(told) if told.isdigit() else 0.25 * 2**num_tries)


def _complaint(method: str, path: str, response: httpx.Response) -> str:
    """What either dialect says of it."""
    try:
        error = response.json()["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        text = response.text[:200]
    way_out = "; give the server's key by --api-key or LORY_API_KEY"
    hint = way_out if response.status_code == 401 else ""
    return f"{method} {path}: {response.status_code}: {text}{hint}"
