"""Which hosts may be fetched from: a list that the operator writes, and every redirect is held to.

An entry is HOST, *.HOST (any name below it), HOST:PORT or http://HOST:PORT; without a scheme it is
https, without a port the scheme's own. It must not know what is fetched.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from lory_router.sources.reference import DEFAULT_PORTS

_ENTRY = re.compile(
    r"(?:(?P<scheme>https?)://)?(?P<host>(?:\*\.)?[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?)"
    r"(?::(?P<port>[0-9]{1,5}))?/?"
)


def origin_of(url: str) -> tuple[str, str, int]:
    """Scheme, host and port; raises ValueError for what is not such a URL."""
    parts = urlsplit(url)
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname or parts.username is not None:
        raise ValueError("not a plain http or https URL")
    return parts.scheme, parts.hostname, parts.port or DEFAULT_PORTS[parts.scheme]


@dataclass(frozen=True, slots=True)
class _Rule:
    scheme: str
    host: str
    """Without "*.", whose rules end in the dot before: ".example.com"."""
    port: int

    def allows(self, scheme: str, host: str, port: int) -> bool:
        if (scheme, port) != (self.scheme, self.port):
            return False
        return host.endswith(self.host) if self.host.startswith(".") else host == self.host


class HostList:
    def __init__(self, entries: Iterable[str] = ()) -> None:
        """Raises ValueError naming an entry that is none."""
        self._rules = {entry: _read(entry) for entry in entries}

    def __bool__(self) -> bool:
        return bool(self._rules)

    def entry_for(self, url: str) -> str | None:
        """The entry that allows `url`, as it was written."""
        try:
            scheme, host, port = origin_of(url)
        except ValueError:
            return None
        allowing = (entry for entry, r in self._rules.items() if r.allows(scheme, host, port))
        return next(allowing, None)


def _read(entry: str) -> _Rule:
    found = _ENTRY.fullmatch(entry)
    if not found or int(found["port"] or 0) > 65535:
        raise ValueError(f"{entry!r} is not HOST, *.HOST, HOST:PORT or http://HOST:PORT")
    scheme = found["scheme"] or "https"
    port = int(found["port"] or DEFAULT_PORTS[scheme])
    return _Rule(scheme, found["host"].removeprefix("*"), port)
