"""What a tenant may still send: its uploads stay within a bound, however many come at once.

It must not know disks or bodies.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from lory_router.errors import DiskFull

MAX_UPLOADS = 1000
"""That a tenant may have, however small."""


@dataclass(slots=True, eq=False)
class Coming:
    """An upload under way."""

    name: str
    left_bytes: int
    num_bytes: int = 0
    is_kept: bool = False
    """Whether what has come stays, and goes on taking room."""


class TenantRoom:
    """Of one tenant."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._coming: list[Coming] = []

    @contextmanager
    def begun(self, name: str, kept: Mapping[str, int]) -> Iterator[Coming]:
        """An upload called `name`, beside `kept`: what the tenant has, in bytes by name. What it
        replaces does not count. Raises DiskFull."""
        coming = Coming(name, self._left_bytes(name, kept))
        self._coming.append(coming)
        try:
            yield coming
        finally:
            self._coming.remove(coming)
            if not coming.is_kept:
                for other in self._others(name):
                    other.left_bytes += coming.num_bytes

    def take(self, coming: Coming, num_bytes: int) -> None:
        """So many more have come. Raises DiskFull."""
        if num_bytes > coming.left_bytes:
            raise DiskFull(
                f"the tenant's uploads may take {self._most_bytes} bytes together; take one away,"
                " or ask for more by --tenant-uploads-size",
                param="file",
            )
        coming.num_bytes += num_bytes
        for one in (coming, *self._others(coming.name)):
            one.left_bytes -= num_bytes

    def _left_bytes(self, name: str, kept: Mapping[str, int]) -> int:
        others = self._others(name)
        if len((kept.keys() | {one.name for one in others}) - {name}) >= MAX_UPLOADS:
            text = f"the tenant has {MAX_UPLOADS} uploads; take one away"
            raise DiskFull(text, param="file")
        taken = sum(one.num_bytes for one in others)
        return self._most_bytes - taken - sum(n for other, n in kept.items() if other != name)

    def _others(self, name: str) -> list[Coming]:
        """What is coming under other names."""
        return [one for one in self._coming if one.name != name]
