"""The HTTP application: which path is answered by what. Here the front is put together.

It must not know what requests mean or how an engine is run.
"""

import re
import time
import uuid
from collections.abc import Callable

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lory_router import lorax, openai
from lory_router.adapters import AdapterRoutes
from lory_router.base_check import ServedBase
from lory_router.catalogue import Catalogue
from lory_router.endpoint import Endpoint, Front, Handler
from lory_router.engine import EngineClient, Unavailable
from lory_router.errors import (
    ApiError,
    BadHttp,
    Dialect,
    MethodNotAllowed,
    NotFound,
    Unauthorized,
    shown,
)
from lory_router.exchange import REQUEST_ID, Exchange, error_headers
from lory_router.gate import CALLER, Gate, authorise, caller_of
from lory_router.hints import Hints
from lory_router.keys import Keyring
from lory_router.lifecycle import Lifecycle
from lory_router.listing import Listing
from lory_router.manners import Manners
from lory_router.merge_routes import MergeRoutes
from lory_router.merges import Merges
from lory_router.merging_engine import MergingEngine
from lory_router.named_engine import NamedEngine
from lory_router.nearest import nearest_path
from lory_router.observe import MetricsSink
from lory_router.own_texts import OwnTexts
from lory_router.pages import Pages
from lory_router.registry import Registry
from lory_router.revisions import Revisions
from lory_router.rights import Rights
from lory_router.settings import RouterSettings
from lory_router.sourced_engine import SourcedEngine
from lory_router.sse import shown_error
from lory_router.text import TextModel
from lory_router.tuning.routes import TuningRoutes
from lory_router.tuning.service import Tuning
from lory_router.tuning.unserved import NOT_SERVED, switched_off_routes
from lory_router.upload_routes import UploadRoutes

GENERATION: tuple[tuple[str, Dialect, Handler], ...] = (
    ("/", "lorax", lorax.compat_generate),
    ("/invocations", "lorax", lorax.compat_generate),
    ("/generate", "lorax", lorax.generate),
    ("/generate_stream", "lorax", lorax.generate_stream),
    ("/tokenize", "lorax", lorax.tokenize),
    ("/v1/completions", "openai", openai.completions),
    ("/v1/chat/completions", "openai", openai.chat_completions),
)


def create_app(
    engine: EngineClient,
    settings: RouterSettings,
    text: TextModel,
    metrics: MetricsSink,
    registry: Registry | None = None,
    is_warm: Callable[[], bool] = lambda: True,
    keys: Keyring | None = None,
    tuning: Tuning | None = None,
    base: ServedBase | None = None,
) -> ASGIApp:
    """The front of `engine`, to be served by an ASGI server; healthy once it is warm."""
    registry = registry or Registry()
    sourced = engine if isinstance(engine, SourcedEngine) else None
    rights = Rights(registry, sourced.sources if sourced else None)
    merging = MergingEngine(engine, registry, rights, settings)
    named = NamedEngine(merging, rights, settings, is_warm)
    fetched = sourced.sources.settings.held if sourced else None
    texts = OwnTexts(text, settings.adapters_dir, settings.retry_after_s, fetched_dir=fetched)
    manners = Manners(named, registry, rights, settings, base or ServedBase(), texts, sourced)
    listing = Listing(named)
    revisions = Revisions(named, listing, registry, rights)
    sources = sourced.sources if sourced else None
    catalogue = Catalogue(listing, registry, rights, revisions, sources)
    hints = Hints(catalogue, settings)
    front = Front(named, settings, text, metrics, Gate(settings), registry, rights, manners, hints)
    lifecycle = Lifecycle(named, registry, rights, listing, revisions, settings, sourced)
    merges = Merges(named, registry, rights, listing, settings)
    uploads = sourced if "upload" in settings.adapter_sources else None

    async def on_api_error(request: Request, error: Exception) -> Response:
        told = await hints.told(shown_error(error), caller_of(request.scope))
        return _error_response(request, told)

    app = Starlette(
        routes=[
            *_generation_routes(front),
            *(UploadRoutes(uploads, rights, listing, settings).routes() if uploads else ()),
            *(TuningRoutes(front, tuning).routes() if tuning else switched_off_routes()),
            *_page_routes(Pages(front, catalogue, int(time.time()))),
            *MergeRoutes(front, merges).routes(),
            *AdapterRoutes(front, lifecycle, catalogue).routes(),
        ],
        exception_handlers={
            HTTPException: _on_http_exception,
            Exception: _on_exception,
            ApiError: on_api_error,
            Unavailable: _on_exception,
        },
    )
    app.router.redirect_slashes = False
    return Guard(app, settings, Keyring(settings.api_keys) if keys is None else keys)


def _generation_routes(front: Front) -> list[Route]:
    return [
        Route(path, Endpoint(front, path, dialect, handle), methods=["POST"])
        for path, dialect, handle in GENERATION
    ]


def _page_routes(pages: Pages) -> list[Route]:
    return [
        Route("/", pages.health),
        Route("/health", pages.health),
        Route("/ping", pages.health),
        Route("/info", pages.info),
        Route("/metrics", pages.metrics),
        Route("/v1/models", pages.models),
        Route("/v1/models/{model_id:path}", pages.model),
    ]


class Guard:
    """Names each request, and asks for the key before anything else looks at it, unknown paths
    included."""

    def __init__(self, app: ASGIApp, settings: RouterSettings, keys: Keyring) -> None:
        self._app = app
        self._settings = settings
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[REQUEST_ID] = request_id = _request_id(scope)

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                named = (*message["headers"], (b"x-request-id", request_id.encode()))
                message = {**message, "headers": named}
            await send(message)

        try:
            _check_framing(scope)
            scope[CALLER] = authorise(scope, self._keys)
        except (BadHttp, Unauthorized) as error:
            dialect = dialect_of(scope["path"])
            exchange = Exchange(scope, receive, send_named, dialect, self._settings)
            if isinstance(error, BadHttp):
                exchange.extra_headers["connection"] = "close"
            await exchange.reply_error(error)
        else:
            await self._app(scope, receive, send_named)


SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


def _request_id(scope: Scope) -> str:
    """The one the caller gave, if a log and a header can hold it; else a new one."""
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(given) == 1 and SANE_ID.fullmatch(given[0]):
        return given[0].decode()
    return uuid.uuid4().hex


def _check_framing(scope: Scope) -> None:
    """Where a body ends must be told once: a proxy in front may have believed the other."""
    names = {name for name, _ in scope["headers"]}
    if {b"content-length", b"transfer-encoding"} <= names:
        raise BadHttp("Send Content-Length or Transfer-Encoding, not both")


def dialect_of(path: str) -> Dialect:
    return "openai" if path == "/v1" or path.startswith("/v1/") else "lorax"


def _error_response(request: Request, error: ApiError) -> Response:
    dialect = dialect_of(request.scope["path"])
    return Response(
        msgspec.json.encode(error.body_for(dialect)),
        status_code=error.status_for(dialect),
        media_type="application/json",
        headers=error_headers(error),
    )


def _on_exception(request: Request, error: Exception) -> Response:
    return _error_response(request, shown_error(error))


def _on_http_exception(request: Request, error: Exception) -> Response:
    """What routing itself refuses: a path or method that is not there."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        response = _error_response(request, MethodNotAllowed("Method not allowed on this path"))
        response.headers.update(error.headers or {})
        return response
    path = request.scope["path"]
    served = (r for r in request.app.routes if isinstance(r, Route) and r.name != NOT_SERVED)
    near = nearest_path(path, [route.path for route in served])
    hint = f"; did you mean {shown(near)}?" if near else ""
    return _error_response(request, NotFound(f"No such path: {shown(path)}{hint}"))
