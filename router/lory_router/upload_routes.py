"""PUT /v1/adapters/{id}/files and POST /v1/adapters/{id}/tensors: an adapter sent by a caller.

    files    kept, and read when somebody asks for it
    tensors  loaded first: who is served it is served it at once, and one that does not fit the
             base never takes the place of one that does

It must not know how files are kept (`sources.upload`) or loaded (`sourced_orders`).
"""

import contextlib
from collections.abc import Iterator

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lory_router.errors import (
    ApiError,
    Invalid,
    WrongMediaType,
    adapter_not_found,
    from_failure,
    shown,
)
from lory_router.gate import caller_of
from lory_router.incoming import body_of, discard
from lory_router.listing import Listing
from lory_router.rights import Rights
from lory_router.schemas_adapters import UploadReply
from lory_router.settings import RouterSettings
from lory_router.sourced_engine import SourcedEngine
from lory_router.sources.multipart import MultipartReader, boundary_of
from lory_router.sources.reference import BadReferenceError, Reference, read_reference
from lory_router.sources.upload import BodyReader, Upload, WeightsReader

PATH = "/v1/adapters/{adapter_id:path}"
RAW = ("application/octet-stream", "application/vnd.safetensors")


class UploadRoutes:
    def __init__(
        self, sourced: SourcedEngine, rights: Rights, listing: Listing, settings: RouterSettings
    ) -> None:
        self._sourced = sourced
        self._rights = rights
        self._listing = listing
        self._settings = settings

    def routes(self) -> list[Route]:
        return [
            Route(f"{PATH}/files", self.put, methods=["PUT"]),
            Route(f"{PATH}/tensors", self.replace, methods=["POST"]),
        ]

    async def put(self, request: Request) -> Response:
        """All files, to be read when they are asked for."""
        upload = self._upload(request, _multipart(request))
        with self._changing():
            try:
                done = await self._sourced.sources.uploads.take(upload)
            except ApiError:
                await discard(upload.body)
                raise
        return _reply(UploadReply(id=done.name, revision=None, bytes=done.num_bytes))

    async def replace(self, request: Request) -> Response:
        """All files, or the weights with the configuration in their header, loaded at once."""
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        reader = WeightsReader() if media_type in RAW else _multipart(request)
        upload = self._upload(request, reader)
        name = upload.reference.name
        with self._changing():
            try:
                done = await self._sourced.orders.replace(upload)
            except ApiError:
                await discard(upload.body)
                raise
        if done.failure is not None:
            raise from_failure(done.failure, self._settings.retry_after_s, name)
        assert done.entry is not None
        loaded = next(one for one in done.entry.revisions if one.revision == done.revision)
        return _reply(UploadReply(id=name, revision=done.revision, bytes=loaded.file_bytes))

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Lists are asked for anew, whatever came of it."""
        try:
            yield
        finally:
            self._listing.expire()

    def _upload(self, request: Request, reader: BodyReader) -> Upload:
        """What is sent, if the caller may send it under that name."""
        caller, reference = caller_of(request.scope), _named(request)
        unknown = set(request.query_params) - {"owner"}
        if unknown:
            raise Invalid(f"unknown parameter {shown(min(unknown))}; there is `owner`")
        is_here = self._sourced.sources.latest(reference) is not None
        self._rights.check_sends(caller, reference, is_here)
        owner = self._rights.check_owner(caller, request.query_params.get("owner"))
        before = self._rights.owner(reference.name)
        return Upload(reference, reader, body_of(request), before if owner is None else owner)


def _multipart(request: Request) -> MultipartReader:
    boundary = boundary_of(request.headers.get("content-type", ""))
    if boundary is None:
        raise WrongMediaType("Send multipart/form-data with the adapter's files as parts")
    return MultipartReader(boundary)


def _named(request: Request) -> Reference:
    name = request.path_params["adapter_id"]
    try:
        reference = read_reference(name, "upload")
    except BadReferenceError:
        reference = None
    if reference is None:
        raise adapter_not_found(name)
    return reference


def _reply(value: UploadReply) -> Response:
    return Response(msgspec.json.encode(value) + b"\n", 201, media_type="application/json")
