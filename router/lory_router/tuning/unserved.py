"""What of OpenAI's API around fine-tuning is not served, each with the reason and the way out.

It must not know what is served.
"""

from collections.abc import Awaitable, Callable

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
METHODS = ["GET", "POST", "DELETE"]

Handler = Callable[[Request], Awaitable[Response]]


def unserved_routes() -> list[Route]:
    return [
        Route(path + below, _refusing(reason), methods=METHODS)
        for path, reason in REASONS
        for below in ("", "/{rest:path}")
    ]


def _refusing(reason: str) -> Handler:
    async def refuse(request: Request) -> Response:
        raise NotServed(reason)

    return refuse
