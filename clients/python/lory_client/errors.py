"""Everything this package raises, as one tree.

    LoryError
    |-- ConnectionFailedError        no reply: refused, reset, name unknown, broken off
    |   `-- ReplyTimeoutError        the client's own timeout passed
    |-- ProtocolError                a reply that is not Lory's format
    |-- IncompleteStreamError        a stream that ended without its final event
    `-- StatusError                  the server said no
        |-- BadRequestError          400  malformed, or a parameter it cannot honour
        |-- AuthenticationError      401  no API key, or a wrong one
        |-- PermissionDeniedError    403
        |-- NotFoundError            404
        |   `-- AdapterNotFoundError 404  no such adapter or revision, or not for this caller
        |-- ConflictError            409  not as things are: such as unloading what is pinned
        |-- PayloadTooLargeError     413
        |-- ValidationError          422  a parameter out of its range
        |-- GenerationError          424  accepted, then failed (500 on the chat routes)
        |-- OverloadedError          429  queue or quota full; see retry_after_s
        `-- ServerError              5xx
            |-- UnavailableError     503  starting, draining, or engine down; see retry_after_s
            `-- RequestTimeoutError  504  the server gave the request up

An error inside a stream has the class, and the status, that it would have had as a reply.
This module must not know httpx, sockets or bodies: `lory_client.replies` decides what to raise.
"""

from __future__ import annotations


class LoryError(Exception):
    """What went wrong, in words (`message`) and for programs (`status`, `code`)."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
        retryable: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        """HTTP status; None if there was no reply."""
        self.code = code
        """The server's machine-readable reason, such as `adapter_not_found`."""
        self.request_id = request_id
        """The reply's `x-request-id`: quote it when asking the operator."""
        self.retry_after_s = retry_after_s
        """How long the server asked to wait, if it did."""
        self.retryable = retryable
        """Nothing was generated, so the same request may be sent again."""

    def __str__(self) -> str:
        facts = [f"{name} {value}" for name, value in self._facts() if value is not None]
        return f"{self.message} ({', '.join(facts)})" if facts else self.message

    def _facts(self) -> list[tuple[str, object]]:
        return [("status", self.status), ("code", self.code), ("request", self.request_id)]


class ConnectionFailedError(LoryError):
    """No reply came: the server is not there, or the connection broke."""


class ReplyTimeoutError(ConnectionFailedError):
    """The client's own timeout passed first."""


class ProtocolError(LoryError):
    """The reply is not in Lory's format: another server, a proxy, or an incompatible version."""


class IncompleteStreamError(LoryError):
    """The stream ended without its final event; what was yielded is not the whole answer."""


class StatusError(LoryError):
    """The server answered with an error status."""


class BadRequestError(StatusError):
    """400: malformed, or a parameter the server cannot honour."""


class AuthenticationError(StatusError):
    """401: no API key, or a wrong one."""


class PermissionDeniedError(StatusError):
    """403: the key is known, but may not do this."""


class NotFoundError(StatusError):
    """404: no such path, model or adapter."""


class AdapterNotFoundError(NotFoundError):
    """404: no adapter of that name, or none that this caller may use."""


class ConflictError(StatusError):
    """409: what was asked does not go together with how things are; the message says what does."""


class PayloadTooLargeError(StatusError):
    """413: the request's body is over the server's limit."""


class ValidationError(StatusError):
    """422: a parameter is out of its range; the message names it."""


class GenerationError(StatusError):
    """424, or 500 on the chat routes: the request was accepted, then failed."""


class OverloadedError(StatusError):
    """429: the queue or the caller's quota is full."""


class ServerError(StatusError):
    """5xx: the server failed."""


class UnavailableError(ServerError):
    """503: the server is starting, draining, or has lost its engine."""


class RequestTimeoutError(ServerError):
    """504: the server gave the request up at its deadline."""


_BY_STATUS: dict[int, type[StatusError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    413: PayloadTooLargeError,
    422: ValidationError,
    424: GenerationError,
    429: OverloadedError,
    503: UnavailableError,
    504: RequestTimeoutError,
}

_ADAPTER_CODES = frozenset({"adapter_not_found", "model_not_found", "revision_not_found"})


def class_for(status: int, code: str | None) -> type[StatusError]:
    """The class of an error status; the code tells a 404 and a 5xx more exactly."""
    if status == 404 and code in _ADAPTER_CODES:
        return AdapterNotFoundError
    if status == 500 and code == "generation":
        return GenerationError
    return _BY_STATUS.get(status, ServerError if status >= 500 else StatusError)
