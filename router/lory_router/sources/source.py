"""What a kind of source can do: the seam between those who fetch and where from.

It must not know disks, callers or how often it is asked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from lory_router.sources.client import Ask, SourceClient
from lory_router.sources.reference import Reference
from lory_server.adapters.config import CONFIG_NAME
from lory_server.adapters.header import WEIGHTS_NAME
from lory_server.adapters.manner import MANIFEST_NAME

_MAX_DIGITS = 18

FILE_NAMES = (CONFIG_NAME, WEIGHTS_NAME)
FURTHER_NAMES = (MANIFEST_NAME,)
"""What an upload may bring along."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One of an adapter's two files as a source has it."""

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

    async def files(
        self, reference: Reference, revision: str, token: str
    ) -> tuple[RemoteFile, RemoteFile]:
        """Configuration and weights of that revision."""
        ...
