"""A running server as the commands `chat`, `adapters` and `bench` meet it: one more HTTP client.

Whatever goes wrong is a `CommandError`, one line. It must not know the server's inside, nor how
answers are shown.
"""

from typing import Any

import httpx

from lory_router.config import CommandError

CONNECT_TIMEOUT_S = 5.0


class TooLongError(CommandError):
    """Prompt and answer together do not fit the server's context."""


class one_line_errors:  # noqa: N801 - reads as the statement it is
    """Turns failures of the connection into `CommandError`."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            raise CommandError(
                f"no server answers at {error.request.url.copy_with(path='/')}; "
                "start one with lory serve, or name it with --url"
            ) from error
        if isinstance(error, httpx.HTTPError | httpx.InvalidURL):
            raise CommandError(f"the server could not be asked: {error}") from error


def connect(url: str, api_key: str, timeout_s: float | None = None) -> httpx.Client:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
    with one_line_errors():
        return httpx.Client(base_url=url, headers=headers, timeout=timeout)


def list_models(client: httpx.Client) -> list[dict[str, Any]]:
    """The entries of GET /v1/models."""
    with one_line_errors():
        reply = client.get("/v1/models")
    check(reply)
    try:
        models = reply.json()["data"]
        _ = [model["id"] for model in models]
    except (ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{client.base_url}: GET /v1/models is not a list of models") from error
    return models


def list_adapters(client: httpx.Client) -> list[dict[str, Any]]:
    """The entries of GET /v1/adapters."""
    with one_line_errors():
        reply = client.get("/v1/adapters")
    check(reply)
    try:
        adapters = reply.json()["data"]
        _ = [one["id"] for one in adapters]
        return adapters
    except (ValueError, KeyError, TypeError) as error:
        text = f"{client.base_url}: GET /v1/adapters is not a list of adapters"
        raise CommandError(text) from error


def check(reply: httpx.Response) -> None:
    """Refuse a reply that tells of a failure, in the server's words."""
    if reply.is_success:
        return
    try:
        body = reply.json()
        text = error_text(body)
    except (ValueError, AttributeError):
        raise CommandError(f"{reply.status_code}: {reply.text[:200]}") from None
    kind = TooLongError if _is_too_long(body) else CommandError
    raise kind(f"{reply.status_code}: {text}{_WAYS_OUT.get(reply.status_code, '')}")


_WAYS_OUT = {401: "; here by --api-key or LORY_API_KEY"}


def _is_too_long(body: dict[str, Any]) -> bool:
    """The routes of LoRAX have no code for it; the message names the field."""
    error = body.get("error")
    if isinstance(error, dict):
        return error.get("code") == "context_length_exceeded"
    return "prompt tokens + `max_new_tokens`" in str(error)


def error_text(body: dict[str, Any]) -> str:
    """What went wrong, of either dialect's error."""
    error = body.get("error")
    if not isinstance(error, dict):
        return str(error)
    return f"{error.get('message')}{_way_out(error)}"


def _way_out(error: dict[str, Any]) -> str:
    """What to do here about an error of the chat route."""
    if error.get("code") == "context_length_exceeded":
        return "; /clear forgets the conversation, --max-tokens asks for a shorter answer"
    if "no chat template" in str(error.get("message")):
        return "; with --plain, lory chat needs none"
    return ""
