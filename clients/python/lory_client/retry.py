"""When to send a request again, and after how long: arithmetic alone.

Only requests that generated nothing are repeated (429, 503, no connection); `LoryError.retryable`
says so. This module must not sleep, read a clock, or know HTTP: the client does that.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

from .errors import LoryError


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential backoff with jitter; a server's Retry-After takes precedence."""

    max_retries: int = 2
    """How often a request is sent again; 0 sends it once."""
    first_delay_s: float = 0.5
    """Wait before the first repeat; it doubles at each repeat."""
    max_delay_s: float = 8.0
    """Longest wait that the backoff itself chooses."""
    max_retry_after_s: float = 120.0
    """A server that asks for more is not waited for: the error is raised at once."""

    def __post_init__(self) -> None:
        if self.max_retries < 0:
            raise ValueError(f"max_retries must be 0 or more, got {self.max_retries}")

    def delay_s(self, attempt: int, error: LoryError) -> float | None:
        """Seconds to wait after failed attempt 0, 1, ...; None to give up."""
        if attempt >= self.max_retries or not error.retryable:
            return None
        if error.retry_after_s is None:
            return self._backoff_s(attempt) * random.uniform(0.5, 1.0)
        if error.retry_after_s > self.max_retry_after_s:
            return None
        # Never earlier than asked; the spread keeps waiting clients from returning as one.
        return error.retry_after_s + self._backoff_s(attempt) * random.uniform(0.0, 0.25)

    def _backoff_s(self, attempt: int) -> float:
        return min(self.max_delay_s, self.first_delay_s * 2.0 ** min(attempt, 60))


def parse_retry_after(value: str | None, now: datetime) -> float | None:
    """Seconds from a Retry-After header: a number, or an HTTP date; None if it is neither."""
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.replace(".", "", 1).isdigit():
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except (TypeError, ValueError, OverflowError, IndexError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return max(0.0, (moment - now).total_seconds())
