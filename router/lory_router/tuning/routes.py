"""OpenAI's /v1/files and /v1/fine_tuning/jobs.

It must not know how jobs are kept or run (`service`).
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route

from lory_router.bodies import read_object, read_struct, refuse_unknown
from lory_router.endpoint import Endpoint, Front
from lory_router.errors import ApiError, Invalid, WrongMediaType, shown
from lory_router.exchange import Exchange
from lory_router.gate import caller_of
from lory_router.incoming import body_of, discard
from lory_router.keys import Caller
from lory_router.sources.multipart import boundary_of
from lory_router.sse import DONE, EVENT_HEADERS, KEEP_ALIVE, event
from lory_router.tuning.records import JobRecord
from lory_router.tuning.service import MAX_FILES_LIMIT, MAX_LIMIT, Tuning
from lory_router.tuning.shapes import (
    CreateJob,
    DeletedReply,
    Hyperparameters,
    ListReply,
    Method,
    MethodPart,
    checkpoint_reply,
    event_reply,
    file_reply,
    job_reply,
)
from lory_router.tuning.unserved import unserved_routes
from lory_router.tuning.wishes import not_reinforced, told_by_bounds

FILES = "/v1/files"
JOBS = "/v1/fine_tuning/jobs"
METADATA = "metadata["
BYTES = "application/octet-stream"


class TuningRoutes:
    def __init__(self, front: Front, tuning: Tuning) -> None:
        self._front = front
        self._tuning = tuning

    def routes(self) -> list[Route]:
        one = JOBS + "/{job_id}"
        deeds = {
            "cancel": self._tuning.cancel,
            "pause": self._tuning.pause,
            "resume": self._tuning.resume,
        }
        return [
            Route(FILES, self.upload, methods=["POST"]),
            Route(FILES, self.list_files),
            Route(FILES + "/{file_id}", self.get_file),
            Route(FILES + "/{file_id}", self.delete_file, methods=["DELETE"]),
            Route(FILES + "/{file_id}/content", self.content),
            Route(JOBS, self._creating(), methods=["POST"]),
            Route(JOBS, self.list_jobs),
            Route(one, self.get_job),
            Route(one + "/events", self.events),
            Route(one + "/checkpoints", self.checkpoints),
            *[
                Route(f"{one}/{name}", self._doing(do), methods=["POST"])
                for name, do in deeds.items()
            ],
            *unserved_routes(),
        ]

    # -- files ------------------------------------------------------------------------------

    async def upload(self, request: Request) -> Response:
        boundary, body = boundary_of(request.headers.get("content-type", "")), body_of(request)
        try:
            if boundary is None:
                raise WrongMediaType("Send multipart/form-data with `file` and `purpose`")
            record = await self._tuning.take_file(caller_of(request.scope), boundary, body)
        except ApiError:
            await discard(body)
            raise
        return _json(file_reply(record))

    async def list_files(self, request: Request) -> Response:
        query = _query(request, "purpose", "after", "limit", "order")
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise Invalid("`order`: give asc or desc", param="order")
        limit = _limit(query, MAX_FILES_LIMIT, MAX_FILES_LIMIT)
        found, has_more = await self._tuning.list_files(
            caller_of(request.scope),
            query.get("purpose", ""),
            query.get("after", ""),
            limit,
            oldest_first=order == "asc",
        )
        return _list([file_reply(one) for one in found], has_more)

    async def get_file(self, request: Request) -> Response:
        return _json(file_reply(await self._tuning.file(*_one(request, "file_id"))))

    async def delete_file(self, request: Request) -> Response:
        caller, file_id = _one(request, "file_id")
        await self._tuning.delete_file(caller, file_id)
        return _json(DeletedReply(id=file_id))

    async def content(self, request: Request) -> Response:
        record, path = await self._tuning.file_place(*_one(request, "file_id"))
        return FileResponse(path, media_type=BYTES, filename=record.filename)

    # -- jobs -------------------------------------------------------------------------------

    def _creating(self) -> Endpoint:
        return Endpoint(self._front, JOBS, "openai", self._create, needs_engine=False)

    async def _create(self, front: Front, exchange: Exchange, body: bytes) -> None:
        job = await self._tuning.create(exchange.caller, _read_wish(body))
        await exchange.reply_json(job_reply(job))

    async def list_jobs(self, request: Request) -> Response:
        query = _query(request, "after", "limit", "metadata", inside=METADATA)
        limit = _limit(query, 20, MAX_LIMIT)
        found, has_more = await self._tuning.list_jobs(
            caller_of(request.scope), _labels(query), query.get("after", ""), limit
        )
        return _list([job_reply(job) for job in found], has_more)

    async def get_job(self, request: Request) -> Response:
        return _json(job_reply(await self._tuning.job(*_one(request, "job_id"))))

    async def events(self, request: Request) -> Response:
        if request.query_params.get("stream", "false") != "false":
            return await self._stream(request)
        found, has_more = await self._tuning.events(*self._place(request, 20, "stream"))
        return _list([event_reply(one) for one in found], has_more)

    async def _stream(self, request: Request) -> Response:
        """Oldest first, as they come; [DONE] once the job is over."""
        query = _query(request, "stream")
        if query["stream"] != "true":
            raise Invalid("`stream`: give true or false", param="stream")
        caller, job_id = caller_of(request.scope), request.path_params["job_id"]
        await self._tuning.job(caller, job_id)
        lines = self._lines(caller, job_id)
        return StreamingResponse(lines, media_type="text/event-stream", headers=EVENT_HEADERS)

    async def _lines(self, caller: Caller, job_id: str) -> AsyncIterator[bytes]:
        following = aclosing(self._tuning.follow(caller, job_id))
        try:
            async with following as events:
                async for one in events:
                    yield KEEP_ALIVE if one is None else event(event_reply(one), "openai")
            if not (await self._tuning.job(caller, job_id)).is_open:
                yield DONE
        except ApiError as error:
            yield event(error.body_for("openai"), "openai")

    async def checkpoints(self, request: Request) -> Response:
        found, has_more = await self._tuning.checkpoints(*self._place(request, 10))
        return _list([checkpoint_reply(one) for one in found], has_more)

    def _place(self, request: Request, default: int, *also: str) -> tuple[Caller, str, str, int]:
        query = _query(request, "after", "limit", *also)
        limit = _limit(query, default, MAX_LIMIT)
        return (
            caller_of(request.scope),
            request.path_params["job_id"],
            query.get("after", ""),
            limit,
        )

    def _doing(
        self, do: Callable[[Caller, str], Awaitable[JobRecord]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def work(request: Request) -> Response:
            return _json(job_reply(await do(*_one(request, "job_id"))))

        return work


def _read_wish(body: bytes) -> CreateJob:
    """Unknown fields are refused at every depth."""
    value = read_object(body)
    refuse_unknown(value, CreateJob)
    _refuse_within(value, "hyperparameters", Hyperparameters, "hyperparameters.")
    method = value.get("method")
    if isinstance(method, dict):
        if method.get("type") == "reinforcement":
            raise not_reinforced()
        _refuse_unknown(method, Method, "method.")
        for kind in ("supervised", "dpo"):
            _refuse_within(method, kind, MethodPart, f"method.{kind}.")
            part = method.get(kind)
            if isinstance(part, dict):
                place = f"method.{kind}.hyperparameters."
                _refuse_within(part, "hyperparameters", Hyperparameters, place)
    try:
        return read_struct(value, CreateJob)
    except Invalid as error:
        raise told_by_bounds(error) from error


def _refuse_within(
    value: dict[str, Any], name: str, kind: type[msgspec.Struct], place: str
) -> None:
    inner = value.get(name)
    if isinstance(inner, dict):
        _refuse_unknown(inner, kind, place)


def _refuse_unknown(value: dict[str, Any], kind: type[msgspec.Struct], place: str) -> None:
    """Null says nothing: OpenAI's package sends a job's method back with all that it has not."""
    refuse_unknown({name: one for name, one in value.items() if one is not None}, kind, place)


def _one(request: Request, name: str) -> tuple[Caller, str]:
    """Who asks, and for which; nothing else is taken."""
    _query(request)
    return caller_of(request.scope), request.path_params[name]


def _query(request: Request, *known: str, inside: str = "") -> dict[str, str]:
    """What stands behind the question mark; what nobody knows is refused."""
    for name in request.query_params:
        if name not in known and not (inside and name.startswith(inside)):
            listed = f"known are {', '.join(known)}" if known else "none is taken here"
            raise Invalid(f"unknown parameter {shown(name)}; {listed}", param=name[:80])
        if len(request.query_params.getlist(name)) > 1:
            raise Invalid(f"`{name[:80]}`: comes twice", param=name[:80])
    return dict(request.query_params)


def _labels(query: dict[str, str]) -> dict[str, str] | None:
    """Of `metadata[name]=value`; None: `metadata=null`, which is of jobs that have none."""
    named = {name: value for name, value in query.items() if name.startswith(METADATA)}
    is_wrong = query.get("metadata", "null") != "null" or ("metadata" in query and named)
    if is_wrong or not all(name.endswith("]") for name in named):
        raise Invalid("`metadata`: give metadata[name]=value, or null alone", param="metadata")
    if "metadata" in query:
        return None
    return {name.removeprefix(METADATA)[:-1]: value for name, value in named.items()}


def _limit(query: dict[str, str], default: int, most: int) -> int:
    text = query.get("limit", str(default))
    limit = int(text) if text.isdecimal() and len(text) < 9 else 0
    if not 1 <= limit <= most:
        raise Invalid(f"`limit`: give a number from 1 to {most}", param="limit")
    return limit


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value) + b"\n", media_type="application/json")


def _list(data: list[Any], has_more: bool) -> Response:
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return _json(ListReply(data=data, first_id=first, last_id=last, has_more=has_more))
