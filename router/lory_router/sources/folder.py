"""Files below one URL, told apart over time by what HTTP says of them: an S3 store, the web.

Their revision is made of all files' validators. It must not know signatures or lists of hosts.
"""

import base64
import binascii
import hashlib
import re
from typing import Protocol

import httpx

from lory_router.errors import AdapterInvalid
from lory_router.sources.client import Ask, Changed, Refused, SourceClient
from lory_router.sources.reference import Reference
from lory_router.sources.source import (
    FILE_NAMES,
    Files,
    RemoteFile,
    further_files,
    size_of,
    together,
)

_DIGEST = re.compile(r"sha-256=:(?P<value>[A-Za-z0-9+/]{43}=):")


class Place(Protocol):
    """Where the files lie, and what it takes to ask for them."""

    @property
    def scope(self) -> str: ...

    def lane(self, reference: Reference) -> str: ...

    def ask(self, reference: Reference, name: str, token: str) -> Ask: ...


class FolderSource:
    """`source.Source` for such a place."""

    def __init__(self, place: Place, client: SourceClient) -> None:
        self._place = place
        self.client = client

    @property
    def scope(self) -> str:
        return self._place.scope

    def lane(self, reference: Reference) -> str:
        return self._place.lane(reference)

    async def look_up(self, reference: Reference, token: str) -> str:
        return _revision(await self._all(reference, token))

    async def files(self, reference: Reference, revision: str, token: str) -> Files:
        files = await self._all(reference, token)
        if _revision(files) != revision:
            raise Changed
        return files

    async def _all(self, reference: Reference, token: str) -> Files:
        """Who may not read configuration and weights may not read the adapter. Of the others a
        refusal says that they are not there: so a store says it to who may not list it."""

        async def find(name: str) -> RemoteFile | None:
            try:
                return await self._file(reference, name, token)
            except Refused:
                return None

        async def required() -> Files:
            return tuple(await together(*(self._file(reference, n, token) for n in FILE_NAMES)))

        both, further = await together(required(), further_files(find))
        return *both, *further

    async def _file(self, reference: Reference, name: str, token: str) -> RemoteFile:
        ask = self._place.ask(reference, name, token)
        headers = (await self.client.head(ask)).headers
        etag = headers.get("etag", "")
        strong = etag if etag.startswith('"') else ""
        validator = strong or headers.get("last-modified", "")
        if not validator:
            raise AdapterInvalid(
                f"{reference.name}: its server gives {name} neither a strong ETag nor"
                " Last-Modified, without which a change goes unnoticed",
                param="model",
            )
        return RemoteFile(
            name=name,
            ask=ask,
            validator=validator,
            num_bytes=size_of(headers.get("content-length", "")),
            sha256=_sha256(headers),
        )


def _sha256(headers: httpx.Headers) -> str:
    """As an S3 store tells it, or RFC 9530; empty if nobody does."""
    told = _DIGEST.search(headers.get("repr-digest", ""))
    value = told["value"] if told else headers.get("x-amz-checksum-sha256", "")
    try:
        raw = base64.b64decode(value, validate=True)
    except binascii.Error:
        return ""
    return raw.hex() if len(raw) == hashlib.sha256().digest_size else ""


def _revision(files: Files) -> str:
    told = [f"{file.name} {file.validator} {file.num_bytes} {file.sha256}" for file in files]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:40]
