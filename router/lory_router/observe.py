"""What the front tells about each request, and to whom: the seam to the metrics.

It must not know how figures are kept or rendered.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

Outcome = Literal["stop", "length", "cancelled", "timeout", "error", "refused"]


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request that is over. Names come from closed sets, never from a caller's text."""

    route: str
    """The route's own pattern, such as "/generate"."""
    tenant: str
    adapter_id: str | None
    """The adapter that tokens came from, empty for the base; None where there came none."""
    status: int
    """The HTTP status; 499 when the client left before one was sent."""
    outcome: Outcome
    duration_s: float
    queue_s: float = 0.0
    time_to_first_token_s: float | None = None
    time_per_token_s: float | None = None
    """Mean gap between tokens after the first; None for fewer than two."""
    prompt_tokens: int = 0
    """A prompt counts once, however many sequences share it; so do its cached tokens."""
    generated_tokens: int = 0
    cached_tokens: int = 0


class MetricsSink(Protocol):
    """Whoever counts. Both calls are made on the event loop and must be quick."""

    def request_started(self, route: str) -> None: ...

    def request_finished(self, record: RequestRecord) -> None:
        """Called exactly once for each `request_started`."""
        ...

    def render(self) -> tuple[bytes, str]:
        """The body of GET /metrics and its content type."""
        ...
