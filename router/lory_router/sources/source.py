"""What a kind of source can do: the seam between those who fetch and where from.

It must not know disks, callers or how often it is asked.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from lory_router.sources.client import Ask, SourceClient
from lory_router.sources.reference import Reference
from lory_server.adapters.config import CONFIG_NAME
from lory_server.adapters.header import WEIGHTS_NAME
from lory_server.adapters.manner import MANIFEST_NAME
from lory_server.adapters.tokenizer_files import COMPANIONS, TOKENIZER_NAME

_MAX_DIGITS = 18

FILE_NAMES = (CONFIG_NAME, WEIGHTS_NAME)
FURTHER_NAMES = (MANIFEST_NAME, TOKENIZER_NAME, *COMPANIONS)
"""What it may have beside them: how it wants to be asked, and a tokenizer of its own."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One of an adapter's files as a source has it."""

    name: str
    ask: Ask
    validator: str = ""
    """Its strong ETag or date, which a resumed request names."""
    is_pinned: bool = False
    """Its URL never stands for other bytes, so that a resumed request need not name them."""
    num_bytes: int | None = None
    sha256: str = ""
    """In hexadecimal, if the source tells."""

    @property
    def is_resumable(self) -> bool:
        return self.is_pinned or bool(self.validator)

    def conditions(self, first_byte: int) -> Mapping[str, str]:
        """Headers for its bytes from `first_byte` on, if it is still what was looked up."""
        if not first_byte:
            return {}
        unchanged = {} if self.is_pinned else {"if-range": self.validator}
        return {"range": f"bytes={first_byte}-", **unchanged}


Files = tuple[RemoteFile, ...]
"""Configuration and weights first, then what it has of FURTHER_NAMES."""
Find = Callable[[str], Coroutine[Any, Any, RemoteFile | None]]
V = TypeVar("V")


async def together(*work: Coroutine[Any, Any, V]) -> Sequence[V]:
    """What all come to. When one fails the others have ended, too, before that is raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def further_files(find: Find) -> Files:
    """Of the files that an adapter need not have those that `find` finds. As in the adapters
    folder, what stands beside a tokenizer counts beside one alone."""
    manifest, tokenizer = await together(find(MANIFEST_NAME), find(TOKENIZER_NAME))
    companions = () if tokenizer is None else await together(*map(find, COMPANIONS))
    return tuple(file for file in (manifest, tokenizer, *companions) if file is not None)


def size_of(text: str) -> int | None:
    """What a Content-Length or the like tells; None if it tells nothing sensible."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS else None


class Source(Protocol):
    """Raises `Refused`, `Interrupted`, `Changed` (see `client`) or what a caller is told."""

    @property
    def client(self) -> SourceClient: ...

    @property
    def scope(self) -> str:
        """Which hub or store this is: the same names at another mean something else."""
        ...

    def lane(self, reference: Reference) -> str:
        """Those with the same lane share its bounds. Raises HostForbidden."""
        ...

    async def look_up(self, reference: Reference, token: str) -> str:
        """The revision it stands for now, if `token` may read it."""
        ...

    async def files(self, reference: Reference, revision: str, token: str) -> Files:
        """All of that revision."""
        ...
