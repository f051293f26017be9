"""PUT and DELETE /v1/adapters/{id}/files: an adapter sent by a caller, and taken away again.

It must not know how files are kept (`sources.upload`).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Literal

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from lory_router.errors import ApiError, ClientGone, WrongMediaType, adapter_not_found
from lory_router.sources.multipart import boundary_of
from lory_router.sources.reference import BadReferenceError, Reference, read_reference
from lory_router.sources.service import Sources

DISCARD_S = 2.0
MAX_DISCARDED_BYTES = 64 * 2**20
PATH = "/v1/adapters/{adapter_id:path}/files"


class UploadReply(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    """What requests name."""
    revision: str
    """Of the files' bytes."""
    bytes: int
    object: Literal["adapter"] = "adapter"


class RemovedReply(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    deleted: bool = True
    object: Literal["adapter.deleted"] = "adapter.deleted"


class UploadRoutes:
    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def routes(self) -> list[Route]:
        return [
            Route(PATH, self.put, methods=["PUT"]),
            Route(PATH, self.delete, methods=["DELETE"]),
        ]

    async def put(self, request: Request) -> Response:
        reference = _named(request)
        boundary = boundary_of(request.headers.get("content-type", ""))
        if boundary is None:
            raise WrongMediaType("Send multipart/form-data with the adapter's two files as parts")
        body = _body(request)
        try:
            done = await self._sources.uploads.take(reference, boundary, body)
        except ApiError:
            await _discard(body)
            raise
        return _json(UploadReply(id=done.name, revision=done.revision, bytes=done.num_bytes), 201)

    async def delete(self, request: Request) -> Response:
        reference = _named(request)
        await self._sources.remove_uploaded(reference)
        return _json(RemovedReply(id=reference.name))


def _named(request: Request) -> Reference:
    name = request.path_params["adapter_id"]
    try:
        reference = read_reference(name, "upload")
    except BadReferenceError:
        reference = None
    if reference is None:
        raise adapter_not_found(name)
    return reference


async def _body(request: Request) -> AsyncIterator[bytes]:
    try:
        async for data in request.stream():
            yield data
    except ClientDisconnect as error:
        raise ClientGone("The client left while sending") from error


async def _discard(body: AsyncIterator[bytes]) -> None:
    """Who is still sending may not read the refusal before having sent for a while."""
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_S):
            async for data in body:
                size += len(data)
                if size > MAX_DISCARDED_BYTES:
                    return


def _json(value: object, status: int = 200) -> Response:
    body = msgspec.json.encode(value) + b"\n"
    return Response(body, status, media_type="application/json")
