"""Servers on loopback that adapters are fetched from: files over HTTP, a hub, an S3 store, faults.

They speak the protocols that `lory_router.sources` reads, and note every request.
"""

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from lory_router.sources.s3 import authorization
from lory_router.sources.settings import S3Settings

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Seen:
    method: str
    path: str
    headers: Mapping[str, str]
    """In lower case."""
    raw_path: str = ""
    """As it was sent, with its percent signs."""

    @property
    def token(self) -> str:
        return self.headers.get("authorization", "").removeprefix("Bearer ")


@dataclass
class Reply:
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    claimed: int | None = None
    """A Content-Length that is a lie."""
    cut_after: int | None = None
    """Close the connection after so many bytes of the body."""
    stalls_after: int | None = None
    """Say nothing more after so many, until the server ends."""
    dribble_s: float = 0.0
    """Before each byte."""
    delay_s: float = 0.0
    chunked: bool = False


Rule = Callable[[Seen], Reply | None]


class Server:
    """Answers by its rules in turn, else from `files`, with ETags and ranges."""

    def __init__(self, files: Mapping[str, bytes] | None = None) -> None:
        self.files = dict(files or {})
        self.rules: list[Rule] = []
        self.seen: list[Seen] = []
        self.ending = threading.Event()
        self.url = ""

    def reply(self, seen: Seen) -> Reply:
        for rule in self.rules:
            found = rule(seen)
            if found is not None:
                return found
        return file_reply(seen, self.files.get(seen.path))

    def count(self, method: str, end: str = "") -> int:
        return sum(s.method == method and s.path.endswith(end) for s in self.seen)

    @contextmanager
    def running(self) -> Iterator["Server"]:
        http = _Listener(self)
        self.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield self
        finally:
            self.ending.set()
            http.shutdown()
            http.server_close()
            thread.join()


def etag_of(body: bytes) -> str:
    return f'"{hashlib.md5(body).hexdigest()}"'


def file_reply(seen: Seen, body: bytes | None, **headers: str) -> Reply:
    """A file as a good server sends it, whole or from a byte on."""
    if body is None:
        return Reply(404)
    etag = headers.pop("etag", etag_of(body))
    told = {"etag": etag, **headers}
    wanted = seen.headers.get("range", "")
    if wanted and seen.headers.get("if-range", etag) == etag:
        first = int(wanted.removeprefix("bytes=").rstrip("-"))
        if first >= len(body):
            return Reply(416, {"content-range": f"bytes */{len(body)}"})
        told["content-range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
        return Reply(206, told, body[first:])
    return Reply(200, told, body)


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, owner: Server) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.owner = owner


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        seen = Seen(self.command, unquote(self.path), headers, self.path)
        self.server.owner.seen.append(seen)
        try:
            self._send(self.server.owner.reply(seen))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _send(self, reply: Reply) -> None:
        self.server.owner.ending.wait(reply.delay_s)
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if reply.chunked:
            self.send_header("transfer-encoding", "chunked")
        else:
            claimed = len(reply.body) if reply.claimed is None else reply.claimed
            self.send_header("content-length", str(claimed))
        self.end_headers()
        if self.command == "GET":
            self._send_body(reply)

    def _send_body(self, reply: Reply) -> None:
        if reply.chunked:
            framed = f"{len(reply.body):x}\r\n".encode() + reply.body + b"\r\n0\r\n\r\n"
            self.wfile.write(framed)
            return
        ends = [n for n in (reply.cut_after, reply.stalls_after) if n is not None]
        self._send_part(reply.body[: min(ends, default=None)], reply.dribble_s)
        if reply.stalls_after is not None:
            self.server.owner.ending.wait(60)
        is_short = reply.claimed is not None and reply.claimed != len(reply.body)
        self.close_connection = bool(ends) or is_short or reply.dribble_s > 0

    def _send_part(self, part: bytes, dribble_s: float) -> None:
        if not dribble_s:
            self.wfile.write(part)
            return
        for byte in part:
            self.wfile.write(bytes([byte]))
            if self.server.owner.ending.wait(dribble_s):
                return


# -- a hub ----------------------------------------------------------------------------------


@dataclass
class Repo:
    files: dict[str, bytes]
    commit: str = "1" * 40
    branches: dict[str, str] = field(default_factory=dict)
    readers: set[str] | None = None
    """Tokens that may read it; None: public."""
    is_gated: bool = False
    """It is seen by all, and its files are read by `readers`."""
    older: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files of other commits."""

    def commit_of(self, revision: str) -> str | None:
        names = {"main": self.commit, self.commit: self.commit, **self.branches}
        return names.get(revision, revision if revision in self.older else None)

    def at(self, commit: str) -> dict[str, bytes]:
        return self.older.get(commit, self.files)


class Hub:
    """The part of the hub's HTTP that serves files. Weights are behind a redirect to `cdn`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.front, self.cdn = Server(), Server()
        self.front.rules.append(self._reply)

    @property
    def url(self) -> str:
        return self.front.url

    @contextmanager
    def running(self) -> Iterator["Hub"]:
        with self.front.running(), self.cdn.running():
            yield self

    def _reply(self, seen: Seen) -> Reply | None:
        place, _, rest = seen.path.removeprefix("/").partition("/resolve/")
        revision, _, name = rest.rpartition("/")
        repo = self.repos.get(place)
        may_read = repo is not None and (repo.readers is None or seen.token in repo.readers)
        if repo is None or (not may_read and not repo.is_gated):
            return Reply(404 if seen.token else 401, {"x-error-code": "RepoNotFound"})
        if not may_read:
            return Reply(403 if seen.token else 401, {"x-error-code": "GatedRepo"})
        commit = repo.commit_of(revision)
        if commit is None:
            return Reply(404, {"x-error-code": "RevisionNotFound"})
        body = repo.at(commit).get(name)
        told = {"x-repo-commit": commit}
        if body is None:
            return Reply(404, {"x-error-code": "EntryNotFound", **told})
        if not name.endswith(".safetensors"):
            return file_reply(seen, body, **told)
        digest = hashlib.sha256(body).hexdigest()
        self.cdn.files.setdefault(f"/lfs/{digest}", body)
        told |= {"x-linked-etag": f'"{digest}"', "x-linked-size": str(len(body))}
        return Reply(302, {"location": f"{self.cdn.url}/lfs/{digest}", **told})


# -- an S3 store ----------------------------------------------------------------------------


class SignedStore(Server):
    """Answers what is signed with its key, for the moment, and nothing else."""

    def __init__(self, settings: S3Settings, files: Mapping[str, bytes]) -> None:
        super().__init__(files)
        self._settings = settings
        self.rules.append(self._refuse)

    def _refuse(self, seen: Seen) -> Reply | None:
        told = seen.headers.get("authorization", "")
        names = told.partition("SignedHeaders=")[2].partition(",")[0].split(";")
        if "host" not in names or "x-amz-date" not in names:
            return Reply(403)
        signed = {name: seen.headers[name] for name in names}
        at = parsedate_to_datetime(_rfc_date(signed["x-amz-date"])).timestamp()
        good = authorization(self._settings, seen.method, seen.raw_path, signed)
        return None if told == good and abs(at - time.time()) < 900 else Reply(403)


def _rfc_date(moment: str) -> str:
    read = time.strptime(moment, "%Y%m%dT%H%M%SZ")
    return time.strftime("%a, %d %b %Y %H:%M:%S +0000", read)


def requests_by_path(server: Server) -> Counter[tuple[str, str]]:
    return Counter((seen.method, seen.path.rpartition("/")[2]) for seen in server.seen)
