"""What can go wrong for a caller, and how each way looks on the wire.

ApiError
 |- BadJson 400               |- NotFound 404 (no such path)      |- Overloaded 429
 |- Unauthorized 401          |- MethodNotAllowed 405             |- GenerationFailed 424 / 500
 |- Forbidden 403             |- BodyTimeout 408                  |- IncompleteGeneration 500
 |- AdapterNotFound 404       |- ReaderTooSlow 408                |- InternalError 500
 |- RevisionNotFound 404      |- NotServed 404 (not done here)    |
 |- BodyTooLarge 413          |- Conflict 409                     |- RegistryUnwritable 500
 |- WrongMediaType 415        |- Invalid 422 / 400                |- EngineUnavailable 503
 |- ClientGone 499                |- ContextTooLong               |- JobsUnwritable 500
 |- HostForbidden 403             |- AdapterInvalid               |- TooManyConnections 503
 |- BadHttp 400                   |- AdapterTooLarge              |- SourceUnavailable 503
     |- HeaderTooLarge 431    |- AdapterFileTooLarge 413          |- AdapterReplaced 503
                                                                   |- TimedOut 504
                                                                   |- DiskFull 507

Where two statuses stand, the first is on LoRAX's routes and the second on OpenAI's. The body is
`{"error", "error_type"}` on the first, `{"error": {"message", "type", "param", "code"}}` on the
second. It must not know routes or how a reply is sent.
"""
# ruff: noqa: N818 - each is named for what happened; all are `ApiError`s

from typing import Literal

from lory_router.engine import Unavailable
from lory_server.messages import Failure, Finished
from lory_server.recipes import Recipe

Dialect = Literal["lorax", "openai"]


class ApiError(Exception):
    """Base of all; carries what both dialects need."""

    status = 500
    openai_status: int | None = None
    """Where OpenAI's routes answer with another status."""
    error_type = "internal"
    """LoRAX's `error_type`."""
    openai_type = "server_error"
    code: str | None = None
    """OpenAI's `code`; the same as `error_type` unless given."""
    lorax_prefix = ""

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def status_for(self, dialect: Dialect) -> int:
        if dialect == "openai" and self.openai_status is not None:
            return self.openai_status
        return self.status

    def body_for(self, dialect: Dialect) -> dict[str, object]:
        if dialect == "lorax":
            return {"error": self.lorax_prefix + self.message, "error_type": self.error_type}
        return {"error": self._openai_error()}

    def _openai_error(self) -> dict[str, object]:
        return {
            "message": self.message,
            "type": self.openai_type,
            "param": self.param,
            "code": self.code or self.error_type,
        }


class BadJson(ApiError):
    status = 400
    error_type = "invalid_json"
    openai_type = "invalid_request_error"


class BadHttp(ApiError):
    status = 400
    error_type = "bad_http"
    openai_type = "invalid_request_error"


class HeaderTooLarge(BadHttp):
    status = 431
    error_type = "header_too_large"


class Unauthorized(ApiError):
    status = 401
    error_type = "unauthorized"
    openai_type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(ApiError):
    """Known, and not this caller's to do."""

    status = 403
    error_type = "forbidden"
    openai_type = "permission_error"


class NotFound(ApiError):
    status = 404
    error_type = "not_found"
    openai_type = "invalid_request_error"


class NotServed(NotFound):
    """A part of an API that is not spoken here."""

    code = "not_served"


class AdapterNotFound(ApiError):
    status = 404
    error_type = "adapter_not_found"
    openai_type = "invalid_request_error"
    code = "model_not_found"
    missing = ""
    """What was named."""
    base_name = ""
    """What OpenAI's `model` calls the base."""

    def body_for(self, dialect: Dialect) -> dict[str, object]:
        told = super().body_for(dialect)
        if dialect == "openai" and self.base_name:
            message = f"{self.message}; the base is called {shown(self.base_name)}"
            told["error"] = {**self._openai_error(), "message": message}
        return told


class RevisionNotFound(ApiError):
    """The adapter may be there, but not as it was asked for."""

    status = 404
    error_type = "adapter_not_found"
    openai_type = "invalid_request_error"
    code = "revision_not_found"


class AdapterReplaced(ApiError):
    """The request was made for a revision that its name does not stand for any more."""

    status = 503
    error_type = "adapter_replaced"
    adapter_id = ""
    """The name it was asked for by."""
    recipe: Recipe | None = None
    """Of a merge that a request asked for, as it named it."""
    tokenizer = ""
    """Digest of the tokenizer that such a merge is to be asked by."""


class MethodNotAllowed(ApiError):
    status = 405
    error_type = "method_not_allowed"
    openai_type = "invalid_request_error"


class BodyTimeout(ApiError):
    status = 408
    error_type = "body_timeout"
    openai_type = "invalid_request_error"


class ReaderTooSlow(ApiError):
    status = 408
    error_type = "reader_too_slow"
    openai_type = "invalid_request_error"


class Conflict(ApiError):
    """What was asked does not go together with how things are."""

    status = 409
    error_type = "conflict"
    openai_type = "invalid_request_error"


class BodyTooLarge(ApiError):
    status = 413
    error_type = "body_too_large"
    openai_type = "invalid_request_error"


class WrongMediaType(ApiError):
    status = 415
    error_type = "wrong_media_type"
    openai_type = "invalid_request_error"


class Invalid(ApiError):
    """A field is not acceptable; `param` names it."""

    status = 422
    openai_status = 400
    error_type = "validation"
    openai_type = "invalid_request_error"
    code = "invalid_value"
    lorax_prefix = "Input validation error: "


class ContextTooLong(Invalid):
    code = "context_length_exceeded"


class AdapterInvalid(Invalid):
    code = "adapter_invalid"


class AdapterTooLarge(Invalid):
    """Larger than the whole adapter pool: trying again does not help."""

    code = "adapter_capacity"


class AdapterFileTooLarge(ApiError):
    """More bytes than may be fetched or uploaded for one adapter."""

    status = 413
    error_type = "adapter_too_large"
    openai_type = "invalid_request_error"


class HostForbidden(ApiError):
    """A place that callers may not make this server fetch from."""

    status = 403
    error_type = "source_forbidden"
    openai_type = "invalid_request_error"


class SourceUnavailable(ApiError):
    """Where an adapter comes from is down, slow or does not make sense."""

    status = 503
    error_type = "source_unavailable"


class DiskFull(ApiError):
    status = 507
    error_type = "disk_full"


class Overloaded(ApiError):
    status = 429
    error_type = "overloaded"
    openai_type = "rate_limit_error"


class GenerationFailed(ApiError):
    status = 424
    openai_status = 500
    error_type = "generation"
    lorax_prefix = "Request failed during generation: Server error: "


class IncompleteGeneration(ApiError):
    error_type = "incomplete_generation"


class InternalError(ApiError):
    pass


class RegistryUnwritable(ApiError):
    error_type = "registry"


class JobsUnwritable(ApiError):
    error_type = "fine_tuning"


class ClientGone(ApiError):
    """Nobody is left to read this; it only names the outcome."""

    status = 499
    error_type = "client_gone"


class Unhealthy(ApiError):
    status = 503
    error_type = "healthcheck"


class EngineUnavailable(ApiError):
    status = 503
    error_type = "unavailable"


class TooManyConnections(ApiError):
    status = 503
    error_type = "too_many_connections"


class TimedOut(ApiError):
    status = 504
    error_type = "timeout"
    openai_type = "timeout"


FAILURES: dict[str, type[ApiError]] = {
    "adapter_not_found": AdapterNotFound,
    "adapter_invalid": AdapterInvalid,
    "adapter_capacity": AdapterTooLarge,
    "adapter_pinned": Conflict,
    "revision_not_found": RevisionNotFound,
    "manner_changed": AdapterReplaced,
    "context_too_long": ContextTooLong,
    "bad_request": Invalid,
    "overloaded": Overloaded,
    "reader_too_slow": ReaderTooSlow,
    "engine_died": GenerationFailed,
    "internal": GenerationFailed,
}
PARAMS = {
    "adapter_not_found": "model",
    "adapter_invalid": "model",
    "adapter_capacity": "model",
    "revision_not_found": "model",
    "context_too_long": "max_tokens",
}


def from_failure(failure: Failure, retry_after_s: int, adapter_id: str = "") -> ApiError:
    """The engine's refusal; what is wrong with an adapter is told under its name."""
    kind, missing = FAILURES[failure.code], failure.source or adapter_id
    if kind is AdapterNotFound and missing:
        return adapter_not_found(missing)
    if kind is AdapterReplaced:
        return _replaced(failure, retry_after_s, adapter_id)
    wait = retry_after_s if kind is Overloaded else None
    about = f"adapter {shown(adapter_id)}: " if kind is AdapterInvalid and adapter_id else ""
    return kind(about + failure.message, param=PARAMS.get(failure.code), retry_after_s=wait)


def _replaced(failure: Failure, retry_after_s: int, adapter_id: str) -> AdapterReplaced:
    error = AdapterReplaced(failure.message, retry_after_s=retry_after_s)
    error.adapter_id, error.tokenizer = adapter_id, failure.tokenizer
    return error


def from_finished(finished: Finished, retry_after_s: int, adapter_id: str = "") -> ApiError:
    """Why a sequence that ended in neither a stop nor its length did not succeed."""
    if finished.failure is not None:
        return from_failure(finished.failure, retry_after_s, adapter_id)
    if finished.reason == "timeout":
        return TimedOut("The request ran past its deadline; ask for fewer tokens or try later")
    if finished.reason == "cancelled":
        text = "The server is shutting down and its drain ended before the request; send it again"
        return EngineUnavailable(text, retry_after_s=retry_after_s)
    return GenerationFailed(f"The engine ended the request with reason {finished.reason!r}")


def from_unavailable(error: Unavailable) -> ApiError:
    wait = min(120, max(1, error.retry_after_s))
    return EngineUnavailable(error.message, retry_after_s=wait)


def adapter_not_found(adapter_id: str, near: str = "") -> ApiError:
    """The one reply to a name that is unknown, malformed, or not for this caller. `near` is a name
    that the caller sees."""
    lists = "GET /v1/models lists what is served"
    hint = f"did you mean {shown(near)}? {lists}" if near else lists
    error = AdapterNotFound(f"No adapter named {shown(adapter_id)}; {hint}", param="model")
    error.missing = adapter_id
    return error


def shown(text: str, longest: int = 80) -> str:
    """A caller's text as it may stand in a message: quoted, printable, short."""
    return ascii(text if len(text) <= longest else text[:longest] + "...")
