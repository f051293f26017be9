"""A hub's HTTP, as huggingface_hub speaks it: HEAD and GET of /ORG/NAME/resolve/REVISION/FILE.

A HEAD of the configuration tells the commit and whether this token may read the files; unlike
the hub's own description of a repo it is also refused where access has to be asked for. It must
not know disks or who waits.
"""

import re
from collections.abc import Mapping
from urllib.parse import quote

import httpx

from lory_router.errors import AdapterInvalid, SourceUnavailable
from lory_router.sources.client import Ask, Refused, SourceClient, unexplained
from lory_router.sources.reference import MAIN, Reference
from lory_router.sources.settings import HubSettings
from lory_router.sources.source import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Files,
    RemoteFile,
    further_files,
    size_of,
)

_COMMIT = re.compile(r"[0-9a-f]{7,64}")
_NAMELESS = "404"
"""What a mirror says of a file that a commit, which was found, does not have, if it does not say
EntryNotFound."""
_UNKNOWN_TOKEN = "Invalid credentials in Authorization header"
_SHA256 = re.compile(r"[0-9a-f]{64}")


class _NoFile(AdapterInvalid):
    """The commit does not have it."""


class HubSource:
    """`source.Source` for a hub."""

    def __init__(self, settings: HubSettings, client: SourceClient) -> None:
        self._endpoint = settings.endpoint.rstrip("/")
        self._token = settings.token
        self._hosts = settings.hosts
        self.client = client

    @property
    def scope(self) -> str:
        return self._endpoint

    def lane(self, reference: Reference) -> str:
        return "hub"

    async def look_up(self, reference: Reference, token: str) -> str:
        revision = reference.revision or MAIN
        reply = await self._head(reference, revision, CONFIG_NAME, token)
        commit = reply.headers.get("x-repo-commit", "")
        if not _COMMIT.fullmatch(commit):
            raise SourceUnavailable(f"{self._endpoint} is no hub: it names no commit")
        return commit

    async def files(self, reference: Reference, revision: str, token: str) -> Files:
        async def find(name: str) -> RemoteFile | None:
            try:
                return await self._file(reference, revision, name, token)
            except (_NoFile, Refused) as error:
                if isinstance(error, Refused) and error.code != _NAMELESS:
                    raise
                return None

        config = await self._file(reference, revision, CONFIG_NAME, token)
        weights = await self._file(reference, revision, WEIGHTS_NAME, token)
        return config, weights, *await further_files(find)

    async def _file(self, reference: Reference, revision: str, name: str, token: str) -> RemoteFile:
        """A redirect tells of the file in its own headers, and has a length of its own."""
        reply = await self._head(reference, revision, name, token)
        size = "" if reply.is_redirect else reply.headers.get("content-length", "")
        digest = reply.headers.get("x-linked-etag", "").strip('"')
        return RemoteFile(
            name=name,
            ask=self._ask(reference, revision, name, token),
            is_pinned=True,
            num_bytes=size_of(reply.headers.get("x-linked-size", size)),
            sha256=digest if _SHA256.fullmatch(digest) else "",
        )

    async def _head(
        self, reference: Reference, revision: str, name: str, token: str
    ) -> httpx.Response:
        try:
            return await self.client.head(
                self._ask(reference, revision, name, token, follows=False)
            )
        except Refused as error:
            if error.code != "EntryNotFound":
                raise
            raise _NoFile(
                f"{reference.name} has no {name}: not a PEFT adapter in safetensors", param="model"
            ) from error

    def _ask(
        self, reference: Reference, revision: str, name: str, token: str, follows: bool = True
    ) -> Ask:
        known = token or self._token
        signed = {"authorization": f"Bearer {known}"} if known else {}
        path = f"{reference.place}/resolve/{quote(revision, safe='')}/{name}"
        return Ask(
            url=f"{self._endpoint}/{path}",
            sign=lambda method, url: signed,
            hosts=self._hosts,
            flag="--hub-hosts",
            follows=follows,
            explain=unexplained if token or not self._token else _explain,
        )


def _explain(headers: Mapping[str, str]) -> str:
    """Of the server's own token: with one that has expired a hub refuses what all may read, too."""
    is_unknown = headers.get("x-error-message", "") == _UNKNOWN_TOKEN
    return "it does not know --hub-token any more; renew it" if is_unknown else ""
