"""Adapters that callers send: whole or not at all, bounded, replaced and taken away in use."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import settings as with_effort
from hypothesis import strategies as st

from lory_router.errors import BodyTimeout, DiskFull
from lory_router.sources.multipart import (
    MultipartError,
    MultipartReader,
    Part,
    boundary_of,
)
from lory_router.sources.reference import Reference
from lory_router.sources.service import Sources
from lory_router.sources.upload import Upload
from lory_server.adapters.manner import MANIFEST_NAME, read_manner
from scripted_engine import TEXT, Front
from source_files import is_clean, kept, settings, with_sources
from source_servers import CONFIG, WEIGHTS
from sourced_front import ONE, TWO, SourcedFront, World, lorax

BODY = b'--b\r\nContent-Disposition: form-data; name="x"; filename="y"\r\n\r\n1\r\n--\r\n--b' + (
    b'\r\nx-y: z\r\ncontent-disposition: form-data; filename=a; name="two"\r\n\r\n\r\n--b--\r\nend'
)


# -- the body -------------------------------------------------------------------------------------


def parts(pieces: list[bytes]) -> tuple[list[tuple[str, bytes]], bool]:
    reader, found = MultipartReader(b"b"), []
    for piece in pieces:
        for event in reader.feed(piece):
            if isinstance(event, Part):
                found.append((event.name, b""))
            else:
                found[-1] = (found[-1][0], found[-1][1] + event)
    return found, reader.is_whole


@with_effort(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, len(BODY))))
def test_parts_are_the_same_whatever_the_pieces(cuts: set[int]):
    ends = [0, *sorted(cuts), len(BODY)]
    pieces = [BODY[a:b] for a, b in itertools.pairwise(ends)]
    assert parts(pieces) == ([("x", b"1\r\n--"), ("two", b"")], True)


def test_a_body_cut_anywhere_is_not_whole():
    end = BODY.index(b"--b--") + len(b"--b--")
    assert not any(parts([BODY[:size]])[1] for size in range(end))


@pytest.mark.parametrize(
    "body",
    [
        b"preamble\r\n--b\r\n",
        b"--c\r\n",
        b"--bb\r\n",
        b"--b \r\n",
        b"--b\r\ncontent-type: x\r\n\r\n",
        b"--b\r\n" + b"a" * 5000,
    ],
)
def test_what_is_no_multipart_is_refused(body: bytes):
    with pytest.raises(MultipartError):
        parts([body])


@pytest.mark.parametrize(
    ("header", "boundary"),
    [
        ("multipart/form-data; boundary=abc", b"abc"),
        ('multipart/form-data; boundary="a b"', b"a b"),
        ("multipart/form-data", None),
        ("multipart/mixed; boundary=abc", None),
        ("multipart/form-data; boundary=" + "a" * 71, None),
        ("application/json", None),
    ],
)
def test_the_boundary_stands_in_the_header(header: str, boundary: bytes | None):
    assert boundary_of(header) == boundary


# -- the routes -----------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, hub_url="http://127.0.0.1:9")


def send(front: Front, name: str, files: dict[str, bytes], **more: Any) -> httpx.Response:
    """As `curl -F` and every HTTP library send files."""
    named = [(file, (file, body)) for file, body in files.items()]
    return front.ask("PUT", f"/v1/adapters/{name}/files", files=named, **more)


def uploading(world: World, **changes: Any) -> SourcedFront:
    return world.front(allows_upload=True, **changes)


@pytest.mark.parametrize("name", ["support", "team/support"])
def test_an_uploaded_adapter_is_served_listed_and_outlives_a_restart(world: World, name: str):
    sent = send(uploading(world), name, ONE)
    assert sent.status_code == 201
    size = sum(map(len, ONE.values()))
    assert (sent.json()["id"], sent.json()["bytes"]) == (f"upload:{name}", size)
    for wish in (
        lorax(adapter_id=f"upload:{name}"),
        lorax(adapter_id=name, adapter_source="upload"),
    ):
        assert uploading(world).post("/generate", wish).status_code == 200
    cards = uploading(world).get("/v1/models").json()["data"]
    assert f"upload:{name}" in {card["id"] for card in cards}
    assert list(kept(world.folder).values()) == [ONE]


def test_either_order_of_the_files_will_do(world: World):
    assert send(uploading(world), "a", dict(reversed(ONE.items()))).status_code == 201


@pytest.mark.parametrize(
    ("files", "status", "told"),
    [
        ({CONFIG: ONE[CONFIG]}, 400, WEIGHTS),
        ({**ONE, "adapter_model.bin": b"x"}, 400, "no part of an upload"),
        ({**ONE, "../../etc/passwd": b"x"}, 400, "no part of an upload"),
        ({**ONE, WEIGHTS: ONE[WEIGHTS][:-1]}, 400, "truncated"),
        ({**ONE, WEIGHTS: b"\xff" * 100}, 400, "header"),
        ({**ONE, CONFIG: b"[]"}, 400, CONFIG),
        ({**ONE, CONFIG: b" " * 2**20 + b"{}"}, 413, "1048576"),
        ({**ONE, WEIGHTS: ONE[WEIGHTS] + b"x" * 60_000}, 413, "--max-adapter-size"),
    ],
)
def test_what_is_no_adapter_is_refused_and_nothing_is_kept(
    world: World, files: dict[str, bytes], status: int, told: str
):
    limit = {} if told == "1048576" else {"max_adapter_bytes": 50_000}
    response = send(uploading(world, **limit), "a", files)
    assert (response.status_code, set(response.json())) == (status, {"error"})
    assert told in response.text
    assert not kept(world.folder)
    assert is_clean(world.folder)


def test_a_file_that_comes_twice_is_refused(world: World):
    body = [(WEIGHTS, (WEIGHTS, ONE[WEIGHTS])), (WEIGHTS, (WEIGHTS, ONE[WEIGHTS]))]
    response = uploading(world).ask("PUT", "/v1/adapters/a/files", files=body)
    assert (response.status_code, "twice" in response.text) == (400, True)


@pytest.mark.parametrize("name", ["a/b/c", ".hidden", "a%20b", "@a"])
def test_a_name_that_is_none_is_not_found(world: World, name: str):
    assert send(uploading(world), name, ONE).status_code == 404


def test_json_is_not_taken(world: World):
    front = uploading(world)
    assert front.ask("PUT", "/v1/adapters/a/files", json={}).status_code == 415


def test_without_the_flag_there_is_no_such_route(world: World):
    assert send(world.front(), "a", ONE).status_code in (404, 405)
    refused = world.front().post("/generate", lorax(adapter_id="upload:a"))
    assert (refused.status_code, "--adapter-uploads" in refused.text) == (422, True)


def test_a_key_is_asked_for(world: World):
    front = uploading(world)
    front.settings = replace(front.settings, api_keys=("key",))
    assert send(front, "a", ONE).status_code == 401
    assert not kept(world.folder)
    assert send(front, "a", ONE, headers={"authorization": "Bearer key"}).status_code == 201


def test_a_deleted_upload_is_gone_at_once(world: World):
    send(uploading(world), "a", ONE)
    done = uploading(world).ask("DELETE", "/v1/adapters/upload:a")
    assert (done.status_code, done.json()["deleted"]) == (200, True)
    assert uploading(world).post("/generate", lorax(adapter_id="upload:a")).status_code == 404
    assert uploading(world).ask("DELETE", "/v1/adapters/upload:a").status_code == 404
    assert not kept(world.folder)


# -- in use ---------------------------------------------------------------------------------------


def multipart(files: dict[str, bytes]) -> bytes:
    parts = [
        b'--b\r\ncontent-disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (name.encode(), body)
        for name, body in files.items()
    ]
    return b"".join(parts) + b"--b--\r\n"


async def put(sources: Sources, files: dict[str, bytes]) -> None:
    async def body() -> AsyncIterator[bytes]:
        whole = multipart(files)
        for start in range(0, len(whole), 700):
            yield whole[start : start + 700]

    await sources.uploads.take(Upload(UPLOAD, MultipartReader(b"b"), body()))


UPLOAD = Reference("upload", "a")


def test_who_holds_the_old_one_keeps_it_while_others_get_the_new(tmp_path: Path):
    chosen = settings(tmp_path / "c", allows_upload=True)

    def read(name: str) -> dict[str, bytes]:
        return kept(tmp_path / "c")[name.removeprefix("@")]

    async def work(sources: Sources) -> None:
        await put(sources, ONE)
        async with sources.using(UPLOAD) as old:
            await put(sources, TWO)
            async with sources.using(UPLOAD) as new:
                assert (read(old), read(new)) == (ONE, TWO)
            await sources.remove(UPLOAD)
            assert read(old) == ONE

    async def again(sources: Sources) -> None:
        assert not sources.listing()

    with_sources(chosen, work)
    with_sources(chosen, again)
    assert not kept(tmp_path / "c")


def test_uploads_are_not_removed_for_what_can_be_fetched_again(tmp_path: Path):
    size = sum(map(len, ONE.values()))
    chosen = settings(tmp_path / "c", allows_upload=True, budget_bytes=size + 100)

    async def work(sources: Sources) -> None:
        await put(sources, ONE)
        with pytest.raises(Exception, match="--adapter-cache-size"):
            async with sources.disk.arriving() as arrival:
                await arrival.cover(size)
        async with sources.using(UPLOAD) as name:
            assert kept(tmp_path / "c")[name.removeprefix("@")] == ONE

    with_sources(chosen, work)


def test_an_upload_that_stops_is_given_up(tmp_path: Path):
    chosen = settings(tmp_path / "c", allows_upload=True, stall_s=0.1)

    async def body() -> AsyncIterator[bytes]:
        yield multipart(ONE)[:100]
        await asyncio.sleep(10)

    async def work(sources: Sources) -> None:
        with pytest.raises(BodyTimeout):
            await sources.uploads.take(Upload(UPLOAD, MultipartReader(b"b"), body()))

    with_sources(chosen, work)
    assert not kept(tmp_path / "c")
    assert is_clean(tmp_path / "c")


def test_uploads_at_once_leave_one(tmp_path: Path):
    chosen = settings(tmp_path / "c", allows_upload=True)

    async def work(sources: Sources) -> None:
        await asyncio.gather(*(put(sources, files) for files in (ONE, TWO) * 5))
        assert len(sources.listing()) == 1

    with_sources(chosen, work)
    (files,) = kept(tmp_path / "c").values()
    assert files in (ONE, TWO)


# -- those who take too much ----------------------------------------------------------------------


async def put_for(sources: Sources, name: str, owner: str, files: dict[str, bytes] = ONE) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield multipart(files)

    reference = Reference("upload", name)
    await sources.uploads.take(Upload(reference, MultipartReader(b"b"), body(), owner))


def test_a_tenants_uploads_leave_room_for_others(tmp_path: Path):
    size = sum(map(len, ONE.values()))
    chosen = settings(tmp_path / "c", allows_upload=True, tenant_bytes=2 * size + 10)

    async def work(sources: Sources) -> None:
        for name in ("acme/a", "acme/b", "acme/a", "acme/b"):
            await put_for(sources, name, "acme")
        with pytest.raises(DiskFull, match="--tenant-uploads-size"):
            await put_for(sources, "acme/c", "acme")
        await put_for(sources, "beta/a", "beta")
        for name in ("a", "b", "c"):
            await put_for(sources, name, "")
        assert len(sources.listing()) == 6
        assert is_clean(tmp_path / "c")
        await sources.remove(Reference("upload", "acme/a"))
        await put_for(sources, "acme/c", "acme")

    with_sources(chosen, work)


@pytest.mark.parametrize("at_once", [2, 4])
def test_a_tenants_uploads_at_once_are_bounded_together(tmp_path: Path, at_once: int):
    """Each was held against what the tenant had when it began, so four took four times as much."""
    size = sum(map(len, ONE.values()))
    chosen = settings(tmp_path / "c", allows_upload=True, tenant_bytes=size + 10)
    both_send = asyncio.Barrier(at_once)

    async def body() -> AsyncIterator[bytes]:
        sent = multipart(ONE)
        yield sent[:200]
        await both_send.wait()
        yield sent[200:]

    async def put_one(sources: Sources, number: int) -> None:
        reference = Reference("upload", f"acme/{number}")
        await sources.uploads.take(Upload(reference, MultipartReader(b"b"), body(), "acme"))

    async def work(sources: Sources) -> None:
        done = await asyncio.gather(
            *(put_one(sources, number) for number in range(at_once)), return_exceptions=True
        )
        assert {type(one) for one in done} <= {type(None), DiskFull}
        assert DiskFull in map(type, done)
        assert sources.disk.num_bytes <= size + 10
        assert is_clean(tmp_path / "c")
        for entry in sources.disk.entries():
            await sources.disk.remove(entry.folder)
        await put_for(sources, "acme/again", "acme")

    with_sources(chosen, work)


def test_a_tenants_uploads_are_bounded_in_number_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lory_router.sources.tenant_room.MAX_UPLOADS", 2)

    async def work(sources: Sources) -> None:
        for name in ("acme/a", "acme/b", "acme/b"):
            await put_for(sources, name, "acme")
        with pytest.raises(DiskFull, match="2 uploads"):
            await put_for(sources, "acme/c", "acme")

    with_sources(settings(tmp_path / "c", allows_upload=True), work)


def test_an_upload_that_dribbles_is_given_up(tmp_path: Path):
    """A byte now and then kept one of the few places for uploads for an hour."""
    chosen = settings(tmp_path / "c", allows_upload=True, stall_s=0.1, min_bytes_per_s=5000.0)

    async def body() -> AsyncIterator[bytes]:
        for byte in multipart(ONE):
            yield bytes([byte])
            await asyncio.sleep(0.01)

    async def work(sources: Sources) -> None:
        with pytest.raises(BodyTimeout):
            async with asyncio.timeout(5):
                await sources.uploads.take(Upload(UPLOAD, MultipartReader(b"b"), body()))

    with_sources(chosen, work)
    assert is_clean(tmp_path / "c")


def test_a_tenant_that_sends_slowly_keeps_no_other_waiting(tmp_path: Path):
    chosen = settings(tmp_path / "c", allows_upload=True, max_downloads=1)

    async def slow() -> AsyncIterator[bytes]:
        yield multipart(ONE)[:100]
        await asyncio.sleep(10)

    async def work(sources: Sources) -> None:
        upload = Upload(Reference("upload", "acme/a"), MultipartReader(b"b"), slow(), "acme")
        sending = asyncio.ensure_future(sources.uploads.take(upload))
        await asyncio.sleep(0.02)
        async with asyncio.timeout(0.4):
            await put_for(sources, "beta/a", "beta")
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)

    with_sources(chosen, work)


def test_an_upload_that_is_cancelled_leaves_nothing(tmp_path: Path):
    chosen = settings(tmp_path / "c", allows_upload=True)

    async def body() -> AsyncIterator[bytes]:
        yield multipart(ONE)[:1500]
        await asyncio.sleep(10)

    async def work(sources: Sources) -> None:
        upload = Upload(UPLOAD, MultipartReader(b"b"), body())
        sending = asyncio.ensure_future(sources.uploads.take(upload))
        await asyncio.sleep(0.05)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        assert is_clean(tmp_path / "c")
        assert sources.disk.num_bytes == 0

    with_sources(chosen, work)


def test_the_folder_is_nobody_elses_to_read(tmp_path: Path):
    with_sources(settings(tmp_path / "c"), lambda sources: asyncio.sleep(0))
    assert (tmp_path / "c").stat().st_mode & 0o077 == 0


# -- how it wants to be asked ---------------------------------------------------------------------


def manifest(template: str) -> dict[str, bytes]:
    return {MANIFEST_NAME: json.dumps({"manifest_version": 1, "template": template}).encode()}


def newest(world: World, files: dict[str, bytes]) -> None:
    """Let the engine find in the folder what was sent, as it does."""
    folder = next(name for name, found in kept(world.folder).items() if found == files)
    world.engine.manners[f"@{folder}"] = read_manner(files[MANIFEST_NAME])


def test_an_upload_brings_its_manifest_along_and_is_asked_by_it(world: World):
    wish = {"inputs": {"text": "a"}, "parameters": {"adapter_id": "upload:support"}}
    front = uploading(world)
    for template, prompt in (("{text} ->", "a ->"), ("<{text}>", "<a>")):
        files = {**ONE, **manifest(template)}
        assert send(front, "support", files).status_code == 201
        newest(world, files)
        assert front.post("/generate", wish).status_code == 200
        assert TEXT.decode(world.engine.last.prompt_ids) == prompt
    restarted = uploading(world)
    assert restarted.get("/v1/adapters/upload:support").json()["template"] == "<{text}>"
    assert restarted.post("/generate", lorax(adapter_id="hub:org/open")).status_code == 503


@pytest.mark.parametrize("content", [b"[]", b"{}", b'{"manifest_version": 1, "template": "{a.b}"}'])
def test_a_hostile_manifest_refuses_the_upload(world: World, content: bytes):
    response = send(uploading(world), "support", {**ONE, MANIFEST_NAME: content})
    assert response.status_code == 400
    assert MANIFEST_NAME in response.json()["error"]["message"]
    assert not kept(world.folder)


def test_a_manifest_takes_the_place_of_no_other_file(world: World):
    files = {name: body for name, body in ONE.items() if name != "adapter_config.json"}
    response = send(uploading(world), "support", {**files, **manifest("{text}")})
    assert response.status_code == 400
    assert not kept(world.folder)
