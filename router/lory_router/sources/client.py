"""HTTP to a source: redirects only where they may lead, secrets only to whom they are for.

What breaks on the way is `Interrupted` and may be tried again; what a source says clearly is an
error for the caller. It must not know adapters, files or which kind of source this is.
"""

import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from urllib.parse import urljoin

import httpx

from lory_router import __version__
from lory_router.errors import HostForbidden, SourceUnavailable
from lory_router.sources.hosts import HostList, origin_of

MAX_REDIRECTS = 5
CONNECT_S = 10.0
TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
REFUSALS = frozenset({401, 403, 404, 410})
"""Not there, or not for this caller: nobody is told which."""

PLAIN = frozenset({"", "identity", "aws-chunked"})
"""Encodings that are none: some stores keep what an upload's own frames were called."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})

Sign = Callable[[str, str], Mapping[str, str]]
"""Headers for a method and a URL, secrets among them."""
Explain = Callable[[Mapping[str, str]], str]
"""What the headers of an answer that is no file say of the fix; empty: nothing."""


def unexplained(_: Mapping[str, str]) -> str:
    return ""


class Interrupted(Exception):  # noqa: N818 - what happened; not an error until tries run out
    """The source fell silent, cut the connection or asked for patience."""


class Refused(Exception):  # noqa: N818 - as above
    """The source has no such thing, or not for this caller."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code
        """What the source calls it, if it says."""


class Changed(Exception):  # noqa: N818 - as above
    """What is there now is not what was looked up."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request, and how far it may be sent on."""

    url: str
    sign: Sign
    """Asked for each request to the origin of `url`, and for no other."""
    hosts: HostList
    """Where a redirect may lead, beside that origin."""
    flag: str
    """What the operator changes to allow more of them."""
    headers: Mapping[str, str] = field(default_factory=dict)
    follows: bool = True
    """Whether a redirect to another origin is followed, or is the answer."""
    explain: Explain = unexplained


@cache
def _authorities() -> ssl.SSLContext:
    """Those of certifi, or of SSL_CERT_FILE; reading them takes as long as ten requests."""
    return httpx.create_ssl_context()


class SourceClient:
    """One per kind of source, so that none waits for another's connections."""

    def __init__(self, stall_s: float) -> None:
        self._http = httpx.AsyncClient(
            verify=_authorities(),
            timeout=httpx.Timeout(stall_s, connect=min(CONNECT_S, stall_s)),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=16),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            trust_env=False,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def head(self, ask: Ask) -> httpx.Response:
        """The headers of what `ask` leads to; raises Refused, Interrupted or an ApiError."""
        async with self._opened("HEAD", ask) as response:
            return response

    @asynccontextmanager
    async def get(self, ask: Ask) -> AsyncIterator[httpx.Response]:
        """The response, its body unread; it is 200, 206 or 416."""
        async with self._opened("GET", ask) as response:
            yield response

    @asynccontextmanager
    async def _opened(self, method: str, ask: Ask) -> AsyncIterator[httpx.Response]:
        with _told(ask.url):
            response = await self._send(method, ask)
            try:
                _check_status(response, ask)
                yield response
            finally:
                await response.aclose()

    async def _send(self, method: str, ask: Ask) -> httpx.Response:
        url, origin = ask.url, origin_of(ask.url)
        for _ in range(MAX_REDIRECTS + 1):
            at_home = origin_of(url) == origin
            headers = {
                "user-agent": f"lory/{__version__}",
                **ask.headers,
                "accept-encoding": "identity",
                **(ask.sign(method, url) if at_home else {}),
            }
            request = self._http.build_request(method, url, headers=headers)
            response = await self._http.send(request, stream=True)
            if response.status_code not in _REDIRECTS:
                return response
            await response.aclose()
            _check_explained(response, ask)
            target = _target(url, response)
            if origin_of(target) != origin and not ask.follows:
                return response
            _check_redirect(target, origin, ask)
            url = target
        raise SourceUnavailable(f"{_host(ask.url)} redirects more than {MAX_REDIRECTS} times")


def _check_explained(response: httpx.Response, ask: Ask) -> None:
    reason = ask.explain(response.headers)
    if reason:
        raise SourceUnavailable(f"{_host(ask.url)} answered {response.status_code}: {reason}")


def _target(url: str, response: httpx.Response) -> str:
    """Without a Location it would be asked again for ever."""
    target = urljoin(url, response.headers.get("location", "about:blank"))
    try:
        origin_of(target)
    except ValueError as error:
        raise SourceUnavailable(f"{_host(url)} redirects to what is not a URL") from error
    return target


def _check_redirect(target: str, origin: tuple[str, str, int], ask: Ask) -> None:
    if origin_of(target) != origin and ask.hosts.entry_for(target) is None:
        raise HostForbidden(
            f"{_host(ask.url)} redirects to {_host(target)}, which is not in {ask.flag}",
            param="model",
        )


def _check_status(response: httpx.Response, ask: Ask) -> None:
    status = response.status_code
    if status in (200, 206, 416) or (status in _REDIRECTS and not ask.follows):
        if response.headers.get("content-encoding", "") not in PLAIN:
            raise SourceUnavailable(f"{_host(ask.url)} sends compressed bytes, unasked")
        return
    _check_explained(response, ask)
    if status in REFUSALS:
        raise Refused(response.headers.get("x-error-code", str(status)))
    if status == 412:
        raise Changed
    if status in TRY_AGAIN:
        raise Interrupted(f"{_host(ask.url)} answered {status}")
    raise SourceUnavailable(f"{_host(ask.url)} answered {status}")


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Networks' troubles in our words, with how long they took."""
    started = time.monotonic()
    try:
        yield
    except httpx.TimeoutException as error:
        seconds = time.monotonic() - started
        raise Interrupted(f"{_host(url)} fell silent; given up after {seconds:.1f} s") from error
    except httpx.ConnectError as error:
        raise Interrupted(f"{_host(url)} cannot be reached: {error}") from error
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
        seconds = time.monotonic() - started
        what = f"{type(error).__name__} after {seconds:.1f} s"
        raise Interrupted(f"{_host(url)} cannot be read: {what}") from error


def _host(url: str) -> str:
    _, host, port = origin_of(url)
    return f"{host}:{port}"
