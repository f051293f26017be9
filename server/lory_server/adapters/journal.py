"""What happened to adapters, told twice: as moves for the reports, as lines for the log.

    INFO     adapter 'a' loaded to host: revision 1f..., 1234 bytes, 5.1 ms
    WARNING  adapter 'b' refused: tensor ... has shape ...

Thousands of adapters may swap for as long as the server runs, so the lines are bounded; those left
out are counted. It must not know tiers' contents, files or requests.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Literal

from lory_server.adapters.store import NAME_RULE
from lory_server.messages import AdapterMove
from lory_server.recipes import called

MAX_LINES = 20
MAX_SKIPPED_LINES = 10
WINDOW_S = 10.0
"""At most MAX_LINES in it, of each level."""

Tier = Literal["host", "device"]

_log = logging.getLogger(__name__)


class Journal:
    """Belongs to the engine's thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._moves: list[AdapterMove] = []
        self._info = _Lines(logging.INFO, clock)
        self._warnings = _Lines(logging.WARNING, clock)
        self._errors = _Lines(logging.ERROR, clock)

    def loaded(
        self, tier: Tier, adapter_id: str, revision: str, num_bytes: int, seconds: float
    ) -> None:
        self._move("load", tier, adapter_id, num_bytes, seconds)
        self._info.say(
            "adapter %r loaded to %s: revision %s, %d bytes, %.1f ms",
            called(adapter_id), tier, revision, num_bytes, seconds * 1000,
        )  # fmt: skip

    def evicted(
        self, tier: Tier, adapter_id: str, revision: str, num_bytes: int, seconds: float
    ) -> None:
        self._move("evict", tier, adapter_id, num_bytes, seconds)
        self._info.say(
            "adapter %r evicted from %s: revision %s, %d bytes, %.1f ms",
            called(adapter_id), tier, revision, num_bytes, seconds * 1000,
        )  # fmt: skip

    def replaced(self, adapter_id: str, old_revision: str, revision: str) -> None:
        self._info.say(
            "adapter %r replaced: revision %s, was %s", called(adapter_id), revision, old_revision
        )

    def failed(self, adapter_id: str) -> None:
        """It could not be loaded."""
        self._move("fail", "host", adapter_id, 0, 0.0)

    def broke(self, work: object, cause: Exception) -> None:
        """Our own failure, with its trace."""
        self._errors.say("adapter work failed: %r", work, cause=cause)

    def refused(self, adapter_id: str, reason: Exception) -> None:
        self.failed(adapter_id)
        self._warnings.say("adapter %r refused: %s", called(adapter_id), reason)

    def skipped(self, folders: Sequence[str]) -> None:
        """At start: adapters that lie where no request can name them."""
        for folder in folders[:MAX_SKIPPED_LINES]:
            _log.warning("folder %r in the adapters folder is skipped: %s", folder, NAME_RULE)
        num_more = len(folders) - MAX_SKIPPED_LINES
        if num_more > 0:
            _log.warning("%d more folders in the adapters folder are skipped, too", num_more)

    def drain(self) -> list[AdapterMove]:
        """The moves since the last call."""
        moves, self._moves = self._moves, []
        return moves

    def _move(
        self,
        kind: Literal["load", "evict", "fail"],
        tier: Tier,
        adapter_id: str,
        num_bytes: int,
        seconds: float,
    ) -> None:
        move = AdapterMove(
            adapter_id=adapter_id, kind=kind, tier=tier, seconds=seconds, num_bytes=num_bytes
        )
        self._moves.append(move)


class _Lines:
    """Log lines of one level, MAX_LINES a window."""

    def __init__(self, level: int, clock: Callable[[], float]) -> None:
        self._level = level
        self._clock = clock
        self._window_ends_s = float("-inf")
        self._num_said = 0

    def say(self, text: str, *values: object, cause: Exception | None = None) -> None:
        now_s = self._clock()
        if now_s >= self._window_ends_s:
            self._open_window(now_s)
        self._num_said += 1
        if self._num_said <= MAX_LINES:
            _log.log(self._level, text, *values, exc_info=cause)

    def _open_window(self, now_s: float) -> None:
        num_left_out = self._num_said - MAX_LINES
        if num_left_out > 0:
            _log.log(self._level, "%d more lines about adapters were left out", num_left_out)
        self._window_ends_s = now_s + WINDOW_S
        self._num_said = 0
