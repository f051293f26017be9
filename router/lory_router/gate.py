"""Who may come in, and how many at once. It must not know routes' contents or the engine."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.types import Scope

from lory_router.errors import Overloaded, Unauthorized
from lory_router.keys import ANYBODY, Caller, Keyring
from lory_router.settings import RouterSettings

OPEN_PATHS = frozenset({"/health", "/ping"})
"""What an orchestrator probes; everything else, known or not, asks for a key when there is one."""
SMALL_BODY_BYTES = 64 * 1024
"""Of each body so much is never counted: large ones must not keep ordinary requests out."""


CALLER = "lory.caller"
"""Where a scope holds who asks."""


def authorise(scope: Scope, keys: Keyring) -> Caller:
    """Deny by default. Decided on the path that routing uses, never on the Host header."""
    if not keys:
        return ANYBODY
    caller = keys.caller(_bearer(scope))
    if caller is None and scope["path"] not in OPEN_PATHS:
        raise Unauthorized("Give a valid API key: `Authorization: Bearer <key>`")
    return caller or Caller()


def caller_of(scope: Scope) -> Caller:
    """Who asks; nobody, if nobody looked at the key."""
    caller = scope.get(CALLER)
    return caller if isinstance(caller, Caller) else Caller()


def _bearer(scope: Scope) -> bytes:
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(values) != 1 or values[0][:7].lower() != b"bearer ":
        return b""
    return values[0][7:].strip()


class Gate:
    """Counts generation requests in flight and what their bodies hold; refuses what is above."""

    def __init__(self, settings: RouterSettings) -> None:
        self._most = settings.max_concurrent_requests
        self._most_bytes = max(settings.max_held_body_bytes, settings.max_body_bytes)
        self._retry_after_s = settings.retry_after_s
        self.num_inside = 0
        self.num_held_bytes = 0

    @contextmanager
    def enter(self) -> Iterator[None]:
        if self.num_inside >= self._most:
            raise Overloaded("Model is overloaded", retry_after_s=self._retry_after_s)
        self.num_inside += 1
        try:
            yield
        finally:
            self.num_inside -= 1

    @contextmanager
    def holding(self) -> Iterator[Callable[[int], None]]:
        """Room for one body until left; what is given is told the body's size as it grows."""
        held = 0

        def hold(size: int) -> None:
            nonlocal held
            more = max(0, size - SMALL_BODY_BYTES) - held
            if self.num_held_bytes + more > self._most_bytes:
                text = "Too many large bodies at once; send it again"
                raise Overloaded(text, retry_after_s=self._retry_after_s)
            self.num_held_bytes += more
            held += more

        try:
            yield hold
        finally:
            self.num_held_bytes -= held
