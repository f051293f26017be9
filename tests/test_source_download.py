"""Downloads from servers that stall, cut, lie, redirect and change: whole, or refused and gone."""

import asyncio
import base64
import errno
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lory_router.errors import (
    AdapterFileTooLarge,
    AdapterInvalid,
    ApiError,
    DiskFull,
    HostForbidden,
    SourceUnavailable,
)
from lory_router.sources.check import CHECKS, FileCheck
from lory_router.sources.reference import Reference, read_reference
from lory_router.sources.service import Sources
from lory_router.sources.writer import FileWriter
from lory_server.adapters.errors import AdapterInvalidError
from source_files import adapter_bytes, at, is_clean, kept, settings, weights, with_sources
from source_servers import CONFIG, WEIGHTS, Reply, Seen, Server, etag_of, file_reply

FILES = adapter_bytes(40_000)


def fetch(server: Server, folder: Path, **changes: Any) -> dict[str, bytes]:
    """The files as they lie in the cache afterwards."""

    async def work(sources: Sources) -> str:
        async with sources.using(web(server)) as name:
            return name

    chosen = settings(folder, hosts=(server.url,), **changes)
    name = with_sources(chosen, work)
    return kept(folder)[name.removeprefix("@")]


def web(server: Server, path: str = "a") -> Reference:
    reference = read_reference(f"{server.url}/{path}")
    assert reference is not None
    return reference


def refused(server: Server, folder: Path, kind: type[ApiError], **changes: Any) -> str:
    """The message; nothing is left of what came."""
    with pytest.raises(kind) as caught:
        fetch(server, folder, **changes)
    assert not kept(folder)
    assert is_clean(folder)
    return caught.value.message


def on_weights(change: Callable[[Seen, int], Reply | None]) -> Callable[[Seen], Reply | None]:
    """A rule for GETs of the weights, told which one it is."""
    count = 0

    def rule(seen: Seen) -> Reply | None:
        nonlocal count
        if seen.method != "GET" or not seen.path.endswith(WEIGHTS):
            return None
        count += 1
        return change(seen, count)

    return rule


def whole(seen: Seen, **changes: Any) -> Reply:
    reply = file_reply(seen, FILES[WEIGHTS])
    for name, value in changes.items():
        setattr(reply, name, value)
    return reply


def test_both_files_come_as_they_are(tmp_path: Path):
    with Server(at("/a", FILES)).running() as server:
        assert fetch(server, tmp_path / "c") == FILES


def test_a_cut_download_goes_on_where_it_broke(tmp_path: Path):
    with Server(at("/a", FILES)).running() as server:
        server.rules.append(on_weights(lambda s, n: whole(s, cut_after=50_000) if n < 3 else None))
        assert fetch(server, tmp_path / "c") == FILES
    asked = [s.headers for s in server.seen if s.method == "GET" and s.path.endswith(WEIGHTS)]
    assert [headers.get("range") for headers in asked] == [None, "bytes=50000-", "bytes=100000-"]
    assert asked[1]["if-range"] == etag_of(FILES[WEIGHTS])


def test_what_changed_meanwhile_is_fetched_anew_not_mixed(tmp_path: Path):
    other = adapter_bytes(40_000, fill=7)

    def change(seen: Seen, count: int) -> Reply | None:
        if count == 1:
            server.files |= at("/a", other)
            return whole(seen, cut_after=50_000)
        return None

    with Server(at("/a", FILES)).running() as server:
        server.rules.append(on_weights(change))
        assert fetch(server, tmp_path / "c") == other


def test_what_changes_at_every_look_is_given_up(tmp_path: Path):
    def change(seen: Seen) -> Reply | None:
        return file_reply(seen, FILES[WEIGHTS], etag=f'"{len(server.seen)}"')

    with Server(at("/a", FILES)).running() as server:
        server.rules.append(lambda s: change(s) if s.path.endswith(WEIGHTS) else None)
        assert "changes while" in refused(server, tmp_path / "c", SourceUnavailable)


def test_a_server_that_ignores_ranges_is_read_from_the_start(tmp_path: Path):
    def change(seen: Seen, count: int) -> Reply:
        reply = Reply(200, {"etag": etag_of(FILES[WEIGHTS])}, FILES[WEIGHTS])
        reply.cut_after = 50_000 if count == 1 else None
        return reply

    with Server(at("/a", FILES)).running() as server:
        server.rules.append(on_weights(change))
        assert fetch(server, tmp_path / "c") == FILES


def test_another_range_than_was_asked_for_is_not_taken(tmp_path: Path):
    def change(seen: Seen, count: int) -> Reply:
        if count == 1:
            return whole(seen, cut_after=50_000)
        wrong = {"content-range": f"bytes 10-{len(FILES[WEIGHTS]) - 1}/{len(FILES[WEIGHTS])}"}
        return Reply(206, wrong, FILES[WEIGHTS][10:]) if count == 2 else whole(seen)

    with Server(at("/a", FILES)).running() as server:
        server.rules.append(on_weights(change))
        assert fetch(server, tmp_path / "c") == FILES


def test_a_source_that_stalls_is_given_up_and_told_of(tmp_path: Path):
    with Server(at("/a", FILES)).running() as server:
        server.rules.append(on_weights(lambda s, n: whole(s, stalls_after=1000 if n == 1 else 0)))
        started = time.monotonic()
        message = refused(server, tmp_path / "c", SourceUnavailable, stall_s=0.2)
    assert time.monotonic() - started < 3
    assert "fell silent" in message
    assert WEIGHTS in message
    assert "1000 bytes in" in message


def test_a_byte_now_and_then_is_a_stall_too(tmp_path: Path):
    with Server(at("/a", FILES)).running() as server:
        server.rules.append(on_weights(lambda s, n: whole(s, dribble_s=0.01)))
        message = refused(
            server, tmp_path / "c", SourceUnavailable, stall_s=0.1, download_timeout_s=0.6
        )
    assert "stalled" in message or "--download-timeout" in message


def test_a_source_that_is_down_is_told_of(tmp_path: Path):
    server = Server()
    with server.running():
        pass
    message = refused(server, tmp_path / "c", SourceUnavailable)
    assert "could not be looked up" in message
    assert "cannot be reached" in message
    assert server.url in message


@pytest.mark.parametrize("status", [500, 503, 429, 418])
def test_a_source_in_trouble_is_told_of(tmp_path: Path, status: int):
    with Server().running() as server:
        server.rules.append(lambda seen: Reply(status))
        assert str(status) in refused(server, tmp_path / "c", SourceUnavailable)


def test_trouble_that_passes_is_not_noticed(tmp_path: Path):
    with Server(at("/a", FILES)).running() as server:
        server.rules.append(on_weights(lambda s, n: Reply(503) if n < 3 else None))
        assert fetch(server, tmp_path / "c") == FILES


# -- too much ------------------------------------------------------------------------------------


def test_a_file_over_the_limit_is_refused_before_it_is_read(tmp_path: Path):
    with Server(at("/a", FILES)).running() as server:
        server.rules.append(on_weights(lambda s, n: whole(s, stalls_after=0)))
        message = refused(server, tmp_path / "c", AdapterFileTooLarge, max_adapter_bytes=100_000)
    assert "--max-adapter-size" in message


def test_a_file_that_does_not_tell_its_length_is_bounded_all_the_same(tmp_path: Path):
    with Server(at("/a", FILES)).running() as server:
        server.rules.append(on_weights(lambda s, n: whole(s, chunked=True)))
        refused(server, tmp_path / "c", AdapterFileTooLarge, max_adapter_bytes=100_000)
        assert fetch(server, tmp_path / "d") == FILES


def test_a_configuration_over_a_mebibyte_is_refused(tmp_path: Path):
    files = {**FILES, CONFIG: b'{"a": "' + b"x" * 2**20 + b'"}'}
    with Server(at("/a", files)).running() as server:
        refused(server, tmp_path / "c", AdapterFileTooLarge)


def test_what_is_larger_than_the_whole_cache_is_refused(tmp_path: Path):
    with Server(at("/a", FILES)).running() as server:
        message = refused(server, tmp_path / "c", AdapterFileTooLarge, budget_bytes=100_000)
    assert "--adapter-cache-size" in message


# -- lies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("claimed", [10, 100_000, 159_999, 200_000])
def test_a_wrong_length_is_never_served(tmp_path: Path, claimed: int):
    with Server(at("/a", FILES)).running() as server:
        server.rules.append(on_weights(lambda s, n: whole(s, claimed=claimed)))
        with pytest.raises((SourceUnavailable, AdapterInvalid)):
            fetch(server, tmp_path / "c")
    assert not kept(tmp_path / "c")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>Not found</html>",
        b"\x80\x04\x95pickle",
        b"\xff" * 100,
        weights(40_000)[:-1],
        weights(40_000) + b"\0",
        (2**63).to_bytes(8, "little") + b"{}",
    ],
)
def test_bytes_that_are_no_safetensors_are_refused(tmp_path: Path, body: bytes):
    with Server(at("/a", {**FILES, WEIGHTS: body})).running() as server:
        assert WEIGHTS in refused(server, tmp_path / "c", AdapterInvalid)


def test_a_bad_header_is_refused_before_the_rest_is_fetched(tmp_path: Path):
    body = (5 * 2**20).to_bytes(8, "little") + b"x" * 40_000
    with Server(at("/a", {**FILES, WEIGHTS: body})).running() as server:
        server.rules.append(on_weights(lambda s, n: Reply(200, {}, body, stalls_after=100)))
        started = time.monotonic()
        message = refused(server, tmp_path / "c", AdapterInvalid, stall_s=5.0)
    assert "4194304" in message
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("body", [b"", b"[]", b"<html>", b"{", b'{"r": NaN}', b'{"r":1,"r":2}'])
def test_a_configuration_that_is_no_json_object_is_refused(tmp_path: Path, body: bytes):
    with Server(at("/a", {**FILES, CONFIG: body})).running() as server:
        assert CONFIG in refused(server, tmp_path / "c", AdapterInvalid)


@pytest.mark.parametrize("is_told", [True, False])
def test_every_truncation_of_a_file_is_refused(tmp_path: Path, is_told: bool):
    """At every byte, whether its length is known from the beginning or not."""
    whole = weights(2)
    for size in range(len(whole) + 1):
        with FileWriter(tmp_path / str(size), CHECKS[WEIGHTS]) as writer:
            if size == len(whole):
                writer.append(whole, size)
                assert writer.finish() == hashlib.sha256(whole).hexdigest()
                return
            with pytest.raises(AdapterInvalidError):
                _write(writer, whole[:size], size if is_told else None)


def _write(writer: FileWriter, data: bytes, total_bytes: int | None) -> None:
    for byte in data:
        writer.append(bytes([byte]), total_bytes)
    writer.finish()


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path):
    whole = weights(2)

    async def work(sources: Sources) -> None:
        for size in (0, 7, 8, 30, len(whole) - 1):
            server.files |= at(f"/{size}", {CONFIG: FILES[CONFIG], WEIGHTS: whole[:size]})
            with pytest.raises((AdapterInvalid, SourceUnavailable)):
                await sources.acquire(web(server, str(size)))
        assert await sources.acquire(web(server, "all"))

    with Server(at("/all", {CONFIG: FILES[CONFIG], WEIGHTS: whole})).running() as server:
        with_sources(settings(tmp_path / "c", hosts=(server.url,)), work)
    assert len(kept(tmp_path / "c")) == 1


def test_a_digest_that_the_source_tells_must_hold(tmp_path: Path):
    right = base64.b64encode(hashlib.sha256(FILES[WEIGHTS]).digest()).decode()
    wrong = base64.b64encode(hashlib.sha256(b"other").digest()).decode()
    told = ""

    def rule(seen: Seen) -> Reply | None:
        if not seen.path.endswith(WEIGHTS):
            return None
        return file_reply(seen, FILES[WEIGHTS], **{"repr-digest": f"sha-256=:{told}:"})

    with Server(at("/a", FILES)).running() as server:
        server.rules.append(rule)
        told = wrong
        assert "sha256" in refused(server, tmp_path / "c", SourceUnavailable)
        told = right
        assert fetch(server, tmp_path / "d") == FILES


def test_without_etag_and_date_it_is_refused(tmp_path: Path):
    with Server(at("/a", FILES)).running() as server:
        server.rules.append(lambda seen: Reply(200, {}, FILES[CONFIG]))
        assert "ETag" in refused(server, tmp_path / "c", AdapterInvalid)


def test_compressed_bytes_are_refused(tmp_path: Path):
    with Server(at("/a", FILES)).running() as server:
        headers = {"etag": '"1"', "content-encoding": "gzip"}
        server.rules.append(lambda seen: Reply(200, headers, FILES[CONFIG]))
        assert "compressed" in refused(server, tmp_path / "c", SourceUnavailable)


@pytest.mark.parametrize("encoding", ["", "identity", "aws-chunked"])
def test_an_encoding_that_is_none_is_passed_over(tmp_path: Path, encoding: str):
    """Some stores keep what SDKs call the frames of an upload."""
    with Server(at("/a", FILES)).running() as server:
        told = {"content-encoding": encoding}
        server.rules.append(lambda seen: file_reply(seen, server.files.get(seen.path), **told))
        assert fetch(server, tmp_path / "c") == FILES


# -- redirects ------------------------------------------------------------------------------------


def redirecting(target: str) -> Callable[[Seen], Reply]:
    return lambda seen: Reply(302, {"location": f"{target}{seen.path}"})


def test_a_redirect_to_a_host_that_is_not_listed_is_not_followed(tmp_path: Path):
    with Server(at("/a", FILES)).running() as inner, Server().running() as server:
        server.rules.append(redirecting(inner.url))
        message = refused(server, tmp_path / "c", HostForbidden)
    assert "--adapter-hosts" in message
    assert not inner.seen


@pytest.mark.parametrize(
    "target", ["http://169.254.169.254/latest", "file:///etc/passwd", "http://127.0.0.1:1@evil/"]
)
def test_no_redirect_leads_inside(tmp_path: Path, target: str):
    with Server().running() as server:
        server.rules.append(lambda seen: Reply(302, {"location": target}))
        with pytest.raises((HostForbidden, SourceUnavailable)):
            fetch(server, tmp_path / "c")
    assert not kept(tmp_path / "c")


def test_a_token_does_not_go_along_to_another_host(tmp_path: Path):
    async def work(sources: Sources) -> None:
        await sources.acquire(web(server), "secret")

    with Server(at("/a", FILES)).running() as other, Server().running() as server:
        server.rules.append(redirecting(other.url))
        with_sources(settings(tmp_path / "c", hosts=(server.url, other.url)), work)
    assert {seen.token for seen in server.seen} == {"secret"}
    assert {seen.token for seen in other.seen} == {""}


def test_redirects_in_a_circle_end(tmp_path: Path):
    with Server().running() as server:
        server.rules.append(lambda seen: Reply(302, {"location": seen.path}))
        assert "redirects more than" in refused(server, tmp_path / "c", SourceUnavailable)


def test_cookies_of_one_caller_are_not_sent_for_another(tmp_path: Path):
    def rule(seen: Seen) -> Reply:
        return file_reply(seen, server.files.get(seen.path), **{"set-cookie": "who=first"})

    with Server(at("/a", FILES)).running() as server:
        server.rules.append(rule)
        fetch(server, tmp_path / "c")
    assert not any("cookie" in seen.headers for seen in server.seen)


# -- our own disk ---------------------------------------------------------------------------------


def full_after(
    num_writes: int, code: int = errno.ENOSPC
) -> Callable[[Path, FileCheck], FileWriter]:
    left = num_writes

    def write(fd: int, data: memoryview) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(code, os.strerror(code))
        return os.write(fd, data[:1000])

    return lambda path, check: FileWriter(path, check, write)


@pytest.mark.parametrize(
    ("num_writes", "code", "says"),
    [(n, errno.ENOSPC, "is full") for n in (0, 1, 5, 100)] + [(1, errno.EROFS, "is read-only")],
)
def test_a_full_disk_is_told_of_and_nothing_is_left(
    tmp_path: Path, num_writes: int, code: int, says: str
):
    async def work(sources: Sources) -> None:
        with pytest.raises(DiskFull, match=says):
            await sources.acquire(web(server))
        assert sources.disk.num_bytes == 0

    files = {**FILES, CONFIG: b'{"a": "' + b"x" * 3000 + b'"}'}
    with Server(at("/a", files)).running() as server:
        chosen = settings(tmp_path / "c", hosts=(server.url,))
        with_sources(chosen, work, full_after(num_writes, code))
    assert not kept(tmp_path / "c")
    assert is_clean(tmp_path / "c")


def test_who_leaves_in_the_middle_leaves_no_file_open(tmp_path: Path):
    """Closing the cache ends a download; a thread that still writes is waited for."""

    async def work(sources: Sources) -> None:
        task = asyncio.ensure_future(sources.acquire(web(server)))
        while not sources.downloads() or not sources.downloads()[0].num_bytes:
            await asyncio.sleep(0.005)
        task.cancel()

    with Server(at("/a", FILES)).running() as server:
        server.rules.append(on_weights(lambda s, n: whole(s, stalls_after=70_000)))
        with_sources(settings(tmp_path / "c", hosts=(server.url,), stall_s=30.0), work)
    assert not kept(tmp_path / "c")
    assert is_clean(tmp_path / "c")
