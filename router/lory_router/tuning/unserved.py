"""What of OpenAI's API around fine-tuning is not served, each with the reason and the way out.

It must not know what is served.
"""

from collections.abc import Awaitable, Callable, Iterable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lory_router.errors import NotServed

PERMISSIONS = "/v1/fine_tuning/checkpoints/{checkpoint:path}/permissions"
REASONS: tuple[tuple[str, str], ...] = (
    (
        PERMISSIONS,
        "Permissions of checkpoints are not served: a checkpoint is its job's tenant's, or"
        " everybody's; `owner` of POST /v1/adapters gives it to another",
    ),
    (
        "/v1/fine_tuning/alpha/graders",
        "Graders are not served: no job is reinforced; `lory eval` scores an adapter",
    ),
    (
        "/v1/uploads",
        "Uploads in parts are not served: send the file whole to POST /v1/files",
    ),
)
SWITCHED_OFF = (
    "Fine-tuning is not served here; start the server with --fine-tuning FOLDER"
    " (docs/fine-tuning-api.md)"
)
NOT_SERVED = "not served"
"""The name of such routes: nobody is led there."""
METHODS = ["GET", "POST", "DELETE"]

Handler = Callable[[Request], Awaitable[Response]]


def unserved_routes() -> list[Route]:
    return _refused(REASONS)


def switched_off_routes() -> list[Route]:
    """Of a server without a folder for it."""
    paths = ("/v1/files", "/v1/fine_tuning", "/v1/uploads")
    return _refused([(path, SWITCHED_OFF) for path in paths])


def _refused(reasons: Iterable[tuple[str, str]]) -> list[Route]:
    return [
        Route(path + below, _refusing(reason), methods=METHODS, name=NOT_SERVED)
        for path, reason in reasons
        for below in ("", "/{rest:path}")
    ]


def _refusing(reason: str) -> Handler:
    async def refuse(request: Request) -> Response:
        raise NotServed(reason)

    return refuse
