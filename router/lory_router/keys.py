"""Who asks: callers by the key they send, each with a tenant and a role.

    --api-key   keys of admins of the tenant `default`
    --api-keys  a YAML file, or JSON: [{key or sha256, tenant, role: admin | user}, ...]

A key is looked up by a keyed digest of its SHA-256, so that the time it takes tells nothing of the
keys there are; keys are not kept, and no message quotes one. It must not know HTTP or what callers
may do.
"""

import hashlib
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import yaml

DEFAULT_TENANT = "default"
MAX_FILE_BYTES = 4 * 2**20
ROLES = ("admin", "user")

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KEY = re.compile(r"[\x21-\x7e]{1,4096}")

TENANT_RULE = "up to 64 letters, digits, '.', '_' and '-', the first a letter or digit"


class KeysError(Exception):
    """The keys cannot be used; the message names where, never what."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is. Without more it is nobody's, who sees what is for all."""

    tenant: str = DEFAULT_TENANT
    is_admin: bool = False
    is_known: bool = True
    """Whether a key says so."""

    @property
    def sees_all(self) -> bool:
        """What a token was needed for, too."""
        return self.is_admin and self.is_known


ADMIN = Caller(is_admin=True)
"""Who asks with one of `--api-key`."""
ANYBODY = Caller(is_admin=True, is_known=False)
"""Who asks where no key is asked for."""


def is_tenant(text: str) -> bool:
    return _TENANT.fullmatch(text) is not None


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tenant: str
    role: str = "user"
    key: str | None = None
    sha256: str | None = None

    def __repr__(self) -> str:
        return f"<a key of {self.tenant}>"


class Keyring:
    """All keys that let somebody in; without any, everybody is an admin."""

    def __init__(self, keys: Sequence[str] = (), path: str = "") -> None:
        """Raises KeysError."""
        self._pepper = secrets.token_bytes(32)
        self._given = [(_sha256(key.encode()), ADMIN) for key in keys]
        self._path = path
        self._callers = self._read()

    def __bool__(self) -> bool:
        return bool(self._callers)

    @property
    def has_file(self) -> bool:
        return bool(self._path)

    def caller(self, key: bytes) -> Caller | None:
        return self._callers.get(self._place(_sha256(key)))

    def reload(self) -> int:
        """Read the file again; how many keys there are. Raises KeysError, and changes nothing."""
        self._callers = self._read()
        return len(self._callers)

    def _read(self) -> dict[bytes, Caller]:
        found: dict[bytes, Caller] = {}
        told = _read_file(Path(self._path)) if self._path else ()
        for number, (digest, caller) in enumerate((*self._given, *told), 1 - len(self._given)):
            place = self._place(digest)
            if place in found:
                raise KeysError(f"{self._path or 'the list'}: key {number} is there twice")
            found[place] = caller
        return found

    def _place(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, key=self._pepper, digest_size=32).digest()


def _sha256(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _read_file(path: Path) -> Iterator[tuple[bytes, Caller]]:
    """Each key's digest and caller."""
    items = _parse(path)
    if not isinstance(items, list) or not items:
        raise KeysError(f"{path}: a list of keys is expected, each with key or sha256, and tenant")
    for number, item in enumerate(items, 1):
        try:
            entry = msgspec.convert(item, _Entry)
            yield _digest(entry), _caller(entry)
        except (msgspec.ValidationError, ValueError) as error:
            raise KeysError(f"{path}: entry {number}: {error}") from None


def _parse(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeysError(f"{path}: cannot be read: {error.strerror}") from error
    if len(text) > MAX_FILE_BYTES:
        raise KeysError(f"{path}: is larger than {MAX_FILE_BYTES} bytes")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1} is" if mark else "it is"
        raise KeysError(f"{path}: {where} not YAML") from None


def _digest(entry: _Entry) -> bytes:
    if (entry.key is None) == (entry.sha256 is None):
        raise ValueError("give `key` or `sha256`, one of them")
    if entry.key is not None:
        if not _KEY.fullmatch(entry.key):
            raise ValueError("`key` is empty, too long or holds what no header can carry")
        return _sha256(entry.key.encode())
    assert entry.sha256 is not None
    if not _SHA256.fullmatch(entry.sha256) or bytes.fromhex(entry.sha256) == _sha256(b""):
        raise ValueError("`sha256` must be 64 hexadecimal digits in lower case, of a key")
    return bytes.fromhex(entry.sha256)


def _caller(entry: _Entry) -> Caller:
    if not is_tenant(entry.tenant):
        raise ValueError(f"`tenant` must be {TENANT_RULE}")
    if entry.role not in ROLES:
        raise ValueError("`role` must be admin or user")
    return Caller(entry.tenant, entry.role == "admin")
