"""Keeps an engine running: starts it, restarts it after a death, gives up on one that cannot live.

It must not know how an engine is spawned or spoken to (`engine_client`), nor HTTP.
"""

import asyncio
import logging
from dataclasses import dataclass

from lory_router.engine_client import ChildEngine, EngineDeath
from lory_router.metrics import Metrics

log = logging.getLogger("lory")

POLL_S = 0.02
CANCEL_GRACE_S = 2.0
"""How long cancelled requests may take to end before the engine is stopped under them."""


class GaveUp(Exception):  # noqa: N818 - a verdict on the engine, not on a call
    """The engine cannot be kept running; the message is its last cause of death."""


@dataclass(frozen=True)
class RestartPolicy:
    """When a dead engine is started again."""

    first_delay_s: float = 0.5
    max_delay_s: float = 10.0
    max_deaths: int = 5
    """Deaths in a row after which it is given up."""
    settled_s: float = 60.0
    """A death is the first in a row if a request was served or the base was loaded this long."""

    def delay_s(self, num_deaths: int) -> float:
        """The wait after the given death in a row, counted from 1."""
        return min(self.first_delay_s * 2 ** (num_deaths - 1), self.max_delay_s)


class Supervisor:
    """One engine's keeper."""

    def __init__(
        self, engine: ChildEngine, metrics: Metrics, policy: RestartPolicy | None = None
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._policy = policy or RestartPolicy()
        self._stopped = asyncio.Event()

    async def run(self) -> None:
        """Keep an engine alive until `stop`; raises `GaveUp` when that cannot be done."""
        deaths = 0
        while True:
            death = await self._engine.live()
            self._metrics.engine_down()
            if self._stopped.is_set():
                return
            is_new = death.num_served > 0 or death.loaded_s >= self._policy.settled_s
            deaths = 1 if is_new else deaths + 1
            self._judge(death, deaths)
            delay_s = self._policy.delay_s(deaths)
            log.warning("%s; starting another in %.1f s", death.cause, delay_s)
            if await self._sleep(delay_s):
                return
            self._metrics.engine_restarting()

    def _judge(self, death: EngineDeath, deaths: int) -> None:
        if death.is_fatal and self._engine.info is None:
            raise GaveUp(death.cause)
        if deaths >= self._policy.max_deaths:
            raise GaveUp(f"{death.cause} ({deaths} times in a row, no request served between)")

    async def _sleep(self, seconds: float) -> bool:
        """Wait that long or until `stop`; whether it was `stop`."""
        try:
            await asyncio.wait_for(self._stopped.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def drain(self, timeout_s: float) -> int:
        """Refuse new requests, let running ones finish, cancel the rest; how many that were."""
        self._engine.start_draining()
        await self._until_idle(timeout_s)
        num_left = self._engine.num_in_flight
        if num_left:
            self._engine.cancel_all()
            await self._until_idle(CANCEL_GRACE_S)
        return num_left

    def stop(self) -> None:
        """End the engine; streams still open end in an error. `run` returns once it is gone."""
        self._stopped.set()
        self._engine.stop()

    async def _until_idle(self, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while self._engine.num_in_flight and loop.time() < deadline:
            await asyncio.sleep(POLL_S)
