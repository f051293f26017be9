"""What a caller names: an adapter at a source, read and checked character by character.

    hub:ORG/NAME[@REVISION]    s3:BUCKET/PREFIX    https://HOST[:PORT]/FOLDER    upload:NAME

A name of none of these forms is a local one. None of it is ever used as a path. This module must
not know networks, files or which sources are served.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

SourceKind = Literal["hub", "s3", "web", "upload"]

MAX_NAME_CHARS = 512
DEFAULT_PORTS = {"https": 443, "http": 80}

_KINDS: dict[str, SourceKind] = {
    "hub": "hub",
    "s3": "s3",
    "http": "web",
    "https": "web",
    "upload": "upload",
}
"""By what `adapter_source` and a name's prefix call them."""
_PREFIX = re.compile(r"(?P<scheme>hub|s3|https?|upload):(?P<rest>.*)", re.DOTALL)
HUB = "hub:"
UPLOAD = "upload:"
"""What names of a hub's adapters, and of uploads, begin with."""
MAIN = "main"
"""The branch of who names none."""
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPO = re.compile(rf"{_PART}(?:/{_PART})?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_KEY_PART = re.compile(r"[A-Za-z0-9._=+@~-]+")
_HOST = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?")
_UPLOAD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,127})?")
_ALL_FILES = "2"
"""What older servers fetched has neither manifest nor tokenizer, and folders without this."""
_NOT_IN_A_FOLDER = re.compile(r"[^A-Za-z0-9._-]+")


class BadReferenceError(ValueError):
    """A name that cannot be one; `param` is the field that is wrong."""

    def __init__(self, message: str, param: str = "model") -> None:
        super().__init__(message)
        self.message = message
        self.param = param


@dataclass(frozen=True, slots=True)
class Reference:
    """An adapter at a source."""

    kind: SourceKind
    place: str
    """ORG/NAME, BUCKET/PREFIX, a URL without its last slash, or an uploaded adapter's name."""
    revision: str = ""
    """A hub's branch, tag or commit; empty: main."""

    @property
    def name(self) -> str:
        """As replies, lists and metrics call it: what the caller wrote, in one spelling."""
        if self.kind == "web":
            return self.place
        return f"{self.kind}:{self.place}" + (f"@{self.revision}" if self.revision else "")

    def is_also(self, other: "Reference", commit: str) -> bool:
        """Whether it stands for a hub's adapter that `other` names, and that is at `commit`."""
        if not (self.kind == other.kind == "hub" and self.place.lower() == other.place.lower()):
            return False
        return self.revision == commit or (self.revision or MAIN) == (other.revision or MAIN)

    def folder(self, scope: str, revision: str) -> str:
        """The folder for its bytes at `revision`; readable, and another for any other bytes."""
        told = f"{_ALL_FILES}\n{scope}\n{self.name}\n{revision}"
        digest = hashlib.sha256(told.encode()).hexdigest()[:24]
        slug = _NOT_IN_A_FOLDER.sub("-", self.place.partition("://")[2] or self.place)
        return f"{self.kind}-{slug[:64].strip('.-')}-{digest}"


def is_from_source(name: str) -> bool:
    """Whether it is the name of a source's adapter, and not a local one's."""
    return _PREFIX.fullmatch(name) is not None


def covers(name: str, other: str) -> bool:
    """Whether what is done to the one is done to the other: without a branch a hub's adapter is
    all of its branches, and is itself at `main`. To a hub, upper and lower case of a repo's name
    are the same."""
    if name == other:
        return True
    if not (name.startswith(HUB) and other.startswith(HUB)):
        return False
    (repo, _, branch), (others, _, at) = name.partition("@"), other.partition("@")
    return repo.lower() == others.lower() and branch in ("", at or MAIN)


def reference_of(name: str) -> Reference:
    """What a name that `is_from_source` stands for; raises BadReferenceError."""
    reference = read_reference(name)
    if reference is None:
        raise BadReferenceError(f"{_shown(name)} is no name of a source")
    return reference


def read_reference(adapter_id: str, source: str | None = None) -> Reference | None:
    """What `adapter_id` names, given `adapter_source` if there is one; None: a local adapter."""
    found = _PREFIX.fullmatch(adapter_id)
    if source in (None, "", "local"):
        if found and source:
            raise BadReferenceError(
                f"`adapter_source` is local, but {_shown(adapter_id)} is no local adapter's name"
            )
        kind = _KINDS[found["scheme"]] if found else None
    else:
        kind = _kind_of(source)
        if found and _KINDS[found["scheme"]] != kind:
            raise BadReferenceError(
                f"`adapter_source` is {source}, but {_shown(adapter_id)} says otherwise"
            )
    if kind is None:
        return None
    if len(adapter_id) > MAX_NAME_CHARS:
        raise BadReferenceError(f"an adapter's name may have at most {MAX_NAME_CHARS} characters")
    if kind == "web":
        return _read_url(adapter_id)
    return _READERS[kind](found["rest"] if found else adapter_id)


def _kind_of(source: str) -> SourceKind:
    if source not in _KINDS:
        known = ", ".join(("local", *_KINDS))
        raise BadReferenceError(f"`adapter_source` must be one of {known}", "adapter_source")
    return _KINDS[source]


def _read_hub(text: str) -> Reference:
    repo, at, revision = text.partition("@")
    is_named = _REPO.fullmatch(repo) and ".." not in repo and "--" not in repo
    if not is_named or (at and not _is_revision(revision)):
        raise BadReferenceError(f"{_shown(text)} is not of the form ORG/NAME or ORG/NAME@REVISION")
    return Reference("hub", repo, revision)


def _is_revision(text: str) -> bool:
    parts = text.split("/")
    return bool(_REVISION.fullmatch(text)) and not any(p in ("", ".", "..") for p in parts)


def _read_s3(text: str) -> Reference:
    bucket, _, prefix = text.removeprefix("//").partition("/")
    prefix = prefix.removesuffix("/")
    if not _BUCKET.fullmatch(bucket) or ".." in bucket or not _are_parts(prefix.split("/")):
        raise BadReferenceError(f"{_shown(text)} is not of the form BUCKET/PREFIX")
    return Reference("s3", f"{bucket}/{prefix}")


def _read_upload(text: str) -> Reference:
    if not _UPLOAD.fullmatch(text):
        raise BadReferenceError(f"{_shown(text)} is not an uploaded adapter's name")
    return Reference("upload", text)


def _read_url(text: str) -> Reference:
    rule = "write https://HOST/FOLDER, the folder that holds the adapter's files"
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError as error:
        raise BadReferenceError(f"{_shown(text)} is not a URL; {rule}") from error
    host = url.hostname or ""
    extras = url.username is not None or url.password is not None or "?" in text or "#" in text
    path = url.path.strip("/")
    is_sound = url.scheme in DEFAULT_PORTS and _HOST.fullmatch(host) and not extras
    if not is_sound or (path and not _are_parts(path.split("/"))):
        raise BadReferenceError(f"{_shown(text)} is not such a URL; {rule}")
    at = "" if port in (None, DEFAULT_PORTS[url.scheme]) else f":{port}"
    return Reference("web", f"{url.scheme}://{host}{at}/{path}".removesuffix("/"))


def _are_parts(parts: list[str]) -> bool:
    return all(_KEY_PART.fullmatch(part) and part not in (".", "..") for part in parts)


_READERS = {"hub": _read_hub, "s3": _read_s3, "upload": _read_upload}


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 80 else text[:80] + "...")
