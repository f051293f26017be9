"""Who may come in, and how many at once. It must not know routes' contents or the engine."""

import hmac
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import Scope

from lory_router.errors import Overloaded, Unauthorized
from lory_router.settings import RouterSettings

OPEN_PATHS = frozenset({"/health", "/ping"})
"""What an orchestrator probes; everything else, known or not, asks for a key when there is one."""


def authorise(scope: Scope, settings: RouterSettings) -> None:
    """Deny by default. Decided on the path that routing uses, never on the Host header."""
    if not settings.api_keys or scope["path"] in OPEN_PATHS:
        return
    given = _bearer(scope)
    known = [hmac.compare_digest(given, key.encode()) for key in settings.api_keys]
    if not any(known):
        raise Unauthorized("Give a valid API key: `Authorization: Bearer <key>`")


def _bearer(scope: Scope) -> bytes:
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(values) != 1 or values[0][:7].lower() != b"bearer ":
        return b""
    return values[0][7:].strip()


class Gate:
    """Counts generation requests in flight and refuses those above the limit."""

    def __init__(self, settings: RouterSettings) -> None:
        self._most = settings.max_concurrent_requests
        self._retry_after_s = settings.retry_after_s
        self.num_inside = 0

    @contextmanager
    def enter(self) -> Iterator[None]:
        if self.num_inside >= self._most:
            raise Overloaded("Model is overloaded", retry_after_s=self._retry_after_s)
        self.num_inside += 1
        try:
            yield
        finally:
            self.num_inside -= 1
