"""May this caller read it, and which revision is it? Asked of the source, remembered shortly.

Every request passes here, whether the bytes are at hand or not. Answers are kept by a digest of
the token that got them, so that one caller's rights are never another's. Tokens themselves are not
kept. It must not know disks or downloads.
"""

import asyncio
import hashlib
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from lory_router.errors import ApiError, SourceUnavailable, adapter_not_found
from lory_router.sources.client import Interrupted, Refused
from lory_router.sources.flight import Flights
from lory_router.sources.memory import Memory
from lory_router.sources.reference import Reference
from lory_router.sources.source import Source

MAX_REMEMBERED = 65_536
REFUSAL_S = 2.0
"""How long a refusal or a failure is the answer for all who ask the same."""
MAX_LOOK_UPS = 32
"""At once in one lane."""
MAX_TRIES = 2

V = TypeVar("V")
_Key = tuple[Reference, bytes]


class Access:
    def __init__(self, recheck_s: float, stall_s: float) -> None:
        self._recheck_s = recheck_s
        self._stall_s = stall_s
        self._pepper = secrets.token_bytes(32)
        self._answers: Memory[_Key, str | ApiError] = Memory(MAX_REMEMBERED)
        self._flights: Flights[_Key, str] = Flights()
        self._lanes: dict[str, asyncio.Semaphore] = {}

    def known(self, reference: Reference, token: str) -> str | None:
        """The revision, where it was told lately."""
        answer = self._answers.get(self._key(reference, token))
        return answer if isinstance(answer, str) else None

    async def revision(self, source: Source, reference: Reference, token: str) -> str:
        """What `reference` stands for, to who has `token`. Raises an ApiError."""
        key = self._key(reference, token)
        known = self._answers.get(key)
        if isinstance(known, ApiError):
            raise again(known)
        if known is not None:
            return known
        return await self._flights.join(key, lambda: self._ask(source, key, token))

    def forget(self, reference: Reference, token: str) -> None:
        """It has changed since it was looked up."""
        self._answers.forget(self._key(reference, token))

    async def close(self) -> None:
        await self._flights.close()

    def _key(self, reference: Reference, token: str) -> _Key:
        digest = hashlib.blake2b(token.encode(), key=self._pepper, digest_size=32).digest()
        return reference, digest

    async def _ask(self, source: Source, key: _Key, token: str) -> str:
        reference = key[0]
        lane = self._lanes.setdefault(source.lane(reference), asyncio.Semaphore(MAX_LOOK_UPS))
        try:
            async with lane:
                revision = await patiently(
                    lambda: source.look_up(reference, token), reference, self._stall_s
                )
        except ApiError as error:
            self._answers.put(key, error, REFUSAL_S)
            raise
        self._answers.put(key, revision, self._recheck_s)
        return revision


async def patiently(ask: Callable[[], Awaitable[V]], reference: Reference, stall_s: float) -> V:
    """What a source says of `reference`, asked again where it broke; all else in callers' words."""
    started = time.monotonic()
    for num_tries in range(1, MAX_TRIES + 1):
        try:
            async with asyncio.timeout(2 * stall_s):
                return await ask()
        except Refused as error:
            raise adapter_not_found(reference.name) from error
        except (Interrupted, TimeoutError) as error:
            if num_tries == MAX_TRIES:
                raise _silent(reference, started, error) from error
    raise AssertionError("the last try returns or raises")


def _silent(reference: Reference, started: float, error: Exception) -> SourceUnavailable:
    seconds = time.monotonic() - started
    why = str(error) or "its source does not answer"
    text = f"{reference.name} could not be looked up: {why}; {seconds:.1f} s in all"
    return SourceUnavailable(text, retry_after_s=5)


def again(error: ApiError) -> ApiError:
    """The same refusal for another request: an exception is raised once."""
    return type(error)(error.message, param=error.param, retry_after_s=error.retry_after_s)
