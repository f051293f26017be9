"""An adapter replaced from tensors: tried before anybody is served it, swapped whole, and the old
one gone when the last request that holds it has ended."""

import json
import struct
from pathlib import Path
from typing import Any

import httpx
import pytest

from lory_router.keys import Keyring
from lory_server.adapters.manner import MANIFEST_NAME
from lory_server.messages import Failure
from scripted_engine import REVISION, Answer
from source_files import adapter_bytes, is_clean, kept
from source_servers import CONFIG, WEIGHTS
from sourced_front import ONE, TWO, World, lorax

PATH = "/v1/adapters/a/tensors"
RAW: dict[str, Any] = {"headers": {"content-type": "application/octet-stream"}}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, hub_url="http://127.0.0.1:9")


def with_config(files: dict[str, bytes], **metadata: str) -> bytes:
    """The weights as safetensors.save writes them with metadata."""
    weights = files[WEIGHTS]
    (size,) = struct.unpack("<Q", weights[:8])
    header = json.loads(weights[8 : 8 + size])
    before = header.pop("__metadata__", {})
    told = {**before, "adapter_config": files[CONFIG].decode(), **metadata}
    text = json.dumps({"__metadata__": told, **header}).encode()
    return struct.pack("<Q", len(text)) + text + weights[8 + size :]


def replace(world: World, files: dict[str, bytes], name: str = "a", **more: Any) -> httpx.Response:
    body = with_config(files)
    front = world.front(allows_upload=True)
    return front.ask("POST", f"/v1/adapters/{name}/tensors", content=body, **(RAW | more))


def test_both_forms_are_taken_and_loaded(world: World):
    reply = replace(world, ONE)
    assert (reply.status_code, reply.json()["id"]) == (201, "upload:a")
    assert reply.json()["revision"] == REVISION
    (files,) = kept(world.folder).values()
    assert files == {CONFIG: ONE[CONFIG], WEIGHTS: with_config(ONE)}
    parts = [(file, (file, body)) for file, body in TWO.items()]
    front = world.front(allows_upload=True)
    assert front.ask("POST", PATH, files=parts).status_code == 201
    assert list(kept(world.folder).values()) == [TWO]
    loads = [order for order in world.engine.orders if order[0] == "load"]
    assert len({adapter_id for _, adapter_id, _ in loads}) == 2
    assert front.post("/generate", lorax(adapter_id="upload:a")).status_code == 200
    assert kept(world.folder)[world.engine.last.adapter_id[1:]] == TWO


def test_a_manifest_goes_beside_the_configuration(world: World):
    told = '{"manifest_version": 1, "template": "{text} ->"}'
    body = with_config(ONE, adapter_manifest=told)
    front = world.front(allows_upload=True)
    assert front.ask("POST", PATH, content=body, **RAW).status_code == 201
    (files,) = kept(world.folder).values()
    assert files == {CONFIG: ONE[CONFIG], WEIGHTS: body, MANIFEST_NAME: told.encode()}
    hostile = with_config(TWO, adapter_manifest='{"manifest_version": 1, "template": "{a.b}"}')
    assert front.ask("POST", PATH, content=hostile, **RAW).status_code == 400
    assert list(kept(world.folder).values()) == [files]


def test_the_old_one_is_let_go_of(world: World):
    replace(world, ONE)
    old = world.engine.orders[-1][1]
    replace(world, TWO)
    assert world.engine.orders[-1] == ("unload", old, "")
    assert len(kept(world.folder)) == 1
    assert is_clean(world.folder)


def test_what_replaces_itself_stays_where_it_is(world: World):
    """The engine knows equal bytes as one revision: letting go of the old took the new along."""
    replace(world, ONE)
    replace(world, ONE)
    assert {kind for kind, _, _ in world.engine.orders} == {"load"}
    assert len(kept(world.folder)) == 1


def test_one_that_cannot_be_loaded_replaces_nothing(world: World):
    replace(world, ONE)
    world.engine.refuses = Failure(code="adapter_invalid", message="tensor x has no module")
    for files in (TWO, ONE):
        reply = replace(world, files)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "adapter_invalid")
        assert "adapter 'upload:a': tensor x has no module" in reply.text
    assert list(kept(world.folder).values()) == [{**ONE, WEIGHTS: with_config(ONE)}]
    world.engine.refuses = None
    front = world.front(allows_upload=True)
    assert front.post("/generate", lorax(adapter_id="upload:a")).status_code == 200


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "empty"),
        (ONE[WEIGHTS], "adapter_config"),
        (with_config({**ONE, CONFIG: b"[]"}), CONFIG),
        (with_config({**ONE, CONFIG: b"{"}), CONFIG),
        (with_config(ONE)[:-1], "truncated"),
        (with_config(ONE) + b"x", "follow the last tensor"),
        (b"\xff" * 100, "header"),
        (with_config(ONE, adapter_config="x" * 2**20 + " "), "1048576"),
        (with_config(ONE)[:5], "truncated"),
    ],
)
def test_what_is_no_adapter_is_refused_and_nothing_is_kept(world: World, body: bytes, told: str):
    front = world.front(allows_upload=True)
    reply = front.ask("POST", PATH, content=body, **RAW)
    assert reply.status_code in (400, 413)
    assert told in reply.text
    assert not world.engine.orders
    assert not kept(world.folder)
    assert is_clean(world.folder)


def test_what_was_not_tried_to_the_end_is_not_served_after_a_restart(world: World):
    """Killed between the two: the files are whole, and nobody knows whether they fit the base."""
    replace(world, ONE)
    front = world.front(allows_upload=True)

    async def work(client: httpx.AsyncClient) -> None:
        seen: list[int] = []

        async def order(*order: Any) -> Any:
            seen.append(len(kept(world.folder)))
            listed = (await client.get("/v1/adapters")).json()["data"]
            assert sum(one["id"] == "upload:a" for one in listed) == 1
            raise SystemError("killed")

        front.engine.order = order  # type: ignore[method-assign]
        front.sources.disk.release = lambda folder: None  # type: ignore[method-assign]
        await client.post(PATH, content=with_config(TWO), **RAW)
        assert seen == [2]
        assert len(kept(world.folder)) == 2
        front.sources.disk._holds.clear()

    front.run(work)
    del front.engine.order  # type: ignore[attr-defined]
    again = world.front(allows_upload=True)
    assert again.post("/generate", lorax(adapter_id="upload:a")).status_code == 200
    assert list(kept(world.folder).values()) == [{**ONE, WEIGHTS: with_config(ONE)}]


def test_who_streams_finishes_on_the_old_one_which_then_goes(world: World):
    replace(world, ONE)
    world.engine.answers = [Answer(text=b"abcdef", delay_s=0.02)]
    front = world.front(allows_upload=True)

    async def work(client: httpx.AsyncClient) -> None:
        import asyncio

        body = {"model": "upload:a", "prompt": "a", "stream": True}
        stream = asyncio.ensure_future(client.post("/v1/completions", json=body))
        await asyncio.sleep(0.05)
        old = world.engine.last.adapter_id[1:]
        reply = await client.post(PATH, content=with_config(TWO), **RAW)
        assert reply.status_code == 201
        assert old in kept(world.folder), "the engine may still have to read it"
        assert len(kept(world.folder)) == 2
        assert (await stream).text.endswith("[DONE]\n\n")
        for _ in range(100):
            if old not in kept(world.folder):
                break
            await asyncio.sleep(0.01)
        assert len(kept(world.folder)) == 1

    front.run(work)


def test_a_pin_moves_with_a_replacement(world: World):
    replace(world, ONE)
    front = world.front(allows_upload=True)

    async def work(client: httpx.AsyncClient) -> None:
        assert (await client.post("/v1/adapters/upload:a/pin")).status_code == 200
        (before,) = world.engine.pinned
        assert (await client.post(PATH, content=with_config(TWO), **RAW)).status_code == 201
        (after,) = world.engine.pinned
        assert after != before
        assert len(kept(world.folder)) == 1

    front.run(work)


def test_many_at_once_leave_one(world: World):
    front = world.front(allows_upload=True)

    async def work(client: httpx.AsyncClient) -> None:
        import asyncio

        bodies = [with_config(adapter_bytes(500, fill=n)) for n in range(10)]
        replies = await asyncio.gather(*(client.post(PATH, content=body, **RAW) for body in bodies))
        assert {reply.status_code for reply in replies} == {201}
        assert len(kept(world.folder)) == 1

    front.run(work)
    assert is_clean(world.folder)


def test_a_tenant_replaces_its_own(world: World, tmp_path: Path):
    path = tmp_path / "keys"
    path.write_text(json.dumps([{"key": name, "tenant": name} for name in ("acme", "beta")]))
    world.keys = Keyring(("admin",), str(path))

    def status(who: str, name: str) -> int:
        headers = {**RAW["headers"], "authorization": f"Bearer {who}"}
        return replace(world, ONE, name, headers=headers).status_code

    assert status("acme", "acme/x") == 201
    assert status("beta", "acme/x") == 403
    assert status("beta", "x") == 403
    assert status("nobody", "acme/x") == 401
    assert status("admin", "acme/x") == 201
    assert status("acme", "acme/x") == 201


def test_an_adapter_may_be_called_files_or_tensors(world: World):
    """DELETE /v1/adapters/x/files took an upload away, and shadowed the adapter of that name."""
    world.engine.adapters = ("x/files",)
    front = world.front(allows_upload=True)

    def look() -> None:
        world.engine.adapters = ("x/files",)

    world.engine._look = look  # type: ignore[method-assign]
    assert front.ask("DELETE", "/v1/adapters/x/files").json()["id"] == "x/files"
    assert front.get("/v1/adapters").json()["removed"] == ["x/files"]
