"""The life of adapters from sources: loaded, pinned, named and removed like local ones, while who
may read them is asked at every request."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from lory_router.engine import Unavailable
from lory_router.errors import ApiError
from lory_router.names import Target
from lory_router.registry import Registry
from lory_router.sourced_orders import SourcedOrders
from lory_router.sources.reference import Reference
from lory_router.sources.service import Sources
from lory_router.warmup import WarmUp
from lory_server.messages import OrderDone, OrderKind
from scripted_engine import BASE, REVISION
from source_files import adapter_bytes, kept, settings, with_sources
from source_servers import Reply, Repo
from sourced_front import ONE, TWO, World, lorax

ADAPTERS = "/v1/adapters"
OPEN = Reference("hub", "org/open")
LATER = "2" * 40


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    with world.hub.running():
        yield world


def push(world: World, files: dict[str, bytes] = TWO) -> None:
    """A new commit of the branch."""
    repo = world.hub.repos["org/open"]
    repo.older[repo.commit] = repo.files
    repo.files, repo.commit = files, LATER


def ask(front: Any, name: str, **parameters: Any) -> httpx.Response:
    return front.post("/generate", lorax(adapter_id=name, **parameters))


def register(front: Any, **body: Any) -> httpx.Response:
    return front.post(ADAPTERS, body)


# -- memory ---------------------------------------------------------------------------------------


def test_load_pin_unpin_and_unload_fetch_first_and_tell_the_adapters_own_name(world: World):
    front, told = world.front(), []

    async def work(client: httpx.AsyncClient) -> None:
        for deed in ("load", "pin", "unload", "unpin", "unload"):
            reply = await client.post(f"{ADAPTERS}/hub:org/open/{deed}")
            assert "@hub-" not in reply.text
            told.append((deed, reply.status_code, reply.json().get("state")))
            listed = (await client.get(f"{ADAPTERS}/hub:org/open")).json()
            assert listed["id"] == "hub:org/open"
            assert listed["pinned"] == (deed in ("pin", "unload") and len(told) < 4)

    front.run(work)
    assert told == [
        ("load", 200, "device"),
        ("pin", 200, "device"),
        ("unload", 409, None),
        ("unpin", 200, "device"),
        ("unload", 200, "disk"),
    ]
    assert {adapter_id[:14] for _, adapter_id, _ in world.engine.orders} == {"@hub-org-open-"}
    assert not world.registry.state.pins


@pytest.mark.parametrize("deed", ["load", "pin", "unload", "unpin"])
def test_what_a_source_does_not_have_is_not_found(world: World, deed: str):
    for name in ("hub:org/none", "upload:none", "hub:org/secret"):
        front = world.front(allows_upload=True)
        assert front.post(f"{ADAPTERS}/{name}/{deed}").status_code == 404
    assert not world.engine.orders


def test_a_source_that_is_off_is_told_with_its_flag(world: World):
    reply = world.front().post(f"{ADAPTERS}/s3:bucket/x/load")
    assert (reply.status_code, "--s3-buckets" in reply.text) == (400, True)
    assert register(world.front(), name="x", adapter_id="upload:x").status_code == 400


def test_a_private_one_is_loaded_and_named_with_a_token(world: World):
    path = f"{ADAPTERS}/hub:org/secret/load"
    assert world.front().post(path, {"api_token": "bad"}).status_code == 404
    assert world.front().post(path, {"api_token": "good"}).status_code == 200
    assert world.front().post(f"{ADAPTERS}/french/load", {"api_token": "x"}).status_code == 400
    body = {"name": "mine", "adapter_id": "hub:org/secret"}
    assert register(world.front(), **body).status_code == 404
    assert register(world.front(), **body, api_token="good").status_code == 201


# -- names ----------------------------------------------------------------------------------------


def test_a_name_stands_for_a_sources_adapter_on_every_route(world: World):
    reply = register(world.front(), name="support", adapter_id="hub:org/open@main")
    assert (reply.status_code, reply.json()["id"]) == (201, "hub:org/open@main")
    assert reply.json()["names"] == {"support": None}
    for path, body in (
        ("/generate", lorax(adapter_id="support")),
        ("/v1/completions", {"model": "support", "prompt": "ab"}),
        ("/v1/completions", {"model": f"{BASE}:support", "prompt": "ab", "stream": True}),
    ):
        reply = world.front().post(path, body)
        assert reply.status_code == 200
        assert reply.headers["x-adapter-id"] == "support"
        assert world.engine.last.adapter_id.startswith("@hub-org-open-")
    assert world.engine.held == [True] * 3
    cards = {card["id"] for card in world.front().get("/v1/models").json()["data"]}
    assert {"support", "hub:org/open@main"} <= cards
    assert world.front().get(f"{ADAPTERS}/support").json()["id"] == "hub:org/open@main"


def test_a_name_follows_its_branch_and_an_alias_keeps_its_commit(world: World):
    register(world.front(), name="support", adapter_id="hub:org/open")
    register(world.front(), name="support@prod", adapter_id="hub:org/open")
    kept_at = Target(f"hub:org/open@{'1' * 40}", REVISION)
    assert world.registry.state.names["support@prod"] == kept_at
    push(world)

    def served(name: str) -> dict[str, bytes]:
        assert ask(world.front(), name).status_code == 200
        return kept(world.folder)[world.engine.last.adapter_id[1:]]

    assert served("support") == TWO
    assert served("support@prod") == ONE
    assert world.engine.last.adapter_revision == REVISION


def test_an_alias_comes_back_when_its_bytes_have_gone(world: World):
    register(world.front(), name="support@prod", adapter_id="hub:org/open")
    push(world)
    size = sum(map(len, ONE.values()))
    world.hub.repos["org/other"] = Repo(adapter_bytes(500, fill=3))
    front = world.front(budget_bytes=size + 100)
    assert ask(front, "hub:org/other").status_code == 200
    assert ask(world.front(budget_bytes=size + 100), "support@prod").status_code == 200
    assert list(kept(world.folder).values()) == [ONE]


def test_names_of_private_ones_are_checked_at_every_request(world: World):
    body = {"name": "mine", "adapter_id": "hub:org/secret", "api_token": "good"}
    assert register(world.front(), **body).status_code == 201

    async def work(client: httpx.AsyncClient) -> list[int]:
        wishes = [lorax(adapter_id="mine", **t) for t in ({}, {"api_token": "bad"})]
        good = lorax(adapter_id="mine", api_token="good")
        wishes = [good, *wishes, good, *wishes]
        return [(await client.post("/generate", json=wish)).status_code for wish in wishes]

    assert world.front().run(work) == [200, 404, 404] * 2
    refused = ask(world.front(), "french", api_token="good")
    assert (refused.status_code, "`api_token`" in refused.text) == (422, True)


def test_names_outlive_a_restart(world: World, tmp_path: Path):
    path = str(tmp_path / "registry")
    with closing(Registry(path)) as world.registry:
        register(world.front(), name="support", adapter_id="hub:org/open")
    with closing(Registry(path)) as world.registry:
        assert ask(world.front(), "support").status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {"name": "hub:org/open", "adapter_id": "french"},
        {"name": "x", "adapter_id": "hub:org"},
        {"name": "x", "adapter_id": "hub:../x"},
        {"name": "hub:org/open", "owner": "acme"},
        {"name": "x y", "adapter_id": "hub:org/open"},
        {"name": "x", "adapter_id": "hub:org/open", "revision": "abcdef0"},
    ],
)
def test_what_makes_no_sense_is_refused(world: World, body: dict[str, str]):
    assert register(world.front(), **body).status_code in (400, 404)
    assert not world.registry.state.names


def test_vllms_routes_take_a_sources_adapter(world: World):
    body = {"lora_name": "sql", "lora_path": "hub:org/open"}
    assert world.front().post("/v1/load_lora_adapter", body).status_code == 200
    assert ask(world.front(), "sql").status_code == 200
    assert world.front().post("/v1/unload_lora_adapter", {"lora_name": "sql"}).status_code == 200
    assert ask(world.front(), "sql").status_code == 404
    assert ask(world.front(), "hub:org/open").status_code == 200


# -- removal --------------------------------------------------------------------------------------


def test_a_removed_one_is_not_served_at_any_branch_until_registered_again(world: World):
    world.hub.repos["org/open"].branches["v2"] = "1" * 40
    for name in ("hub:org/open", "hub:org/open@v2"):
        assert ask(world.front(), name).status_code == 200
    register(world.front(), name="support", adapter_id="hub:org/open@v2")
    assert world.front().ask("DELETE", f"{ADAPTERS}/hub:org/open").status_code == 200
    assert not kept(world.folder)
    for name in ("hub:org/open", "hub:org/open@v2", "hub:org/open@main", "support"):
        assert ask(world.front(), name).status_code == 404, name
    assert world.front().get(ADAPTERS).json()["removed"] == ["hub:org/open"]
    assert not kept(world.folder)
    assert register(world.front(), name="hub:org/open").status_code == 201
    assert ask(world.front(), "hub:org/open@v2").status_code == 200


def test_the_main_branch_is_removed_and_served_again_by_either_of_its_names(world: World):
    """What was removed at `main` was served to who named no branch, which is the same."""
    assert ask(world.front(), "hub:org/open@main").status_code == 200
    assert world.front().ask("DELETE", f"{ADAPTERS}/hub:org/open@main").status_code == 200
    assert ask(world.front(), "hub:org/open").status_code == 404
    world.hub.repos["Org/Open"] = world.hub.repos["org/open"]
    assert register(world.front(), name="hub:Org/Open").status_code == 201
    for name in ("hub:org/open", "hub:org/open@main"):
        assert ask(world.front(), name).status_code == 200


def test_one_branch_of_a_removed_repo_is_not_said_to_be_served_again(world: World):
    """It was a 201, and requests went on being a 404."""
    assert ask(world.front(), "hub:org/open").status_code == 200
    assert world.front().ask("DELETE", f"{ADAPTERS}/hub:org/open").status_code == 200
    for branch in ("main", "v2"):
        reply = register(world.front(), name=f"hub:org/open@{branch}")
        assert reply.status_code == 409
        assert "was removed as 'hub:org/open'" in reply.json()["error"]["message"]
    assert register(world.front(), name="hub:org/open").status_code == 201


def test_what_a_request_holds_is_gone_with_its_end(world: World):
    front = world.front()

    async def work(client: httpx.AsyncClient) -> None:
        async with front.sources.using(OPEN):
            reply = await client.delete(f"{ADAPTERS}/hub:org/open")
            assert reply.status_code == 200
            assert (await client.post("/generate", json=lorax(adapter_id="hub:org/open"))).is_error
            assert len(kept(world.folder)) == 1
        assert not kept(world.folder)

    front.run(work)


# -- pins -----------------------------------------------------------------------------------------


def test_a_pinned_one_is_held_on_the_disk(world: World):
    size = sum(map(len, ONE.values()))
    for number in range(3):
        world.hub.repos[f"org/{number}"] = Repo(adapter_bytes(500, fill=5 + number))
    front = world.front(budget_bytes=2 * size + 100)

    async def work(client: httpx.AsyncClient) -> None:
        assert (await client.post(f"{ADAPTERS}/hub:org/open/pin")).status_code == 200
        for number in range(3):
            wish = lorax(adapter_id=f"hub:org/{number}")
            assert (await client.post("/generate", json=wish)).status_code == 200
        assert ONE in kept(world.folder).values()
        assert (await client.post(f"{ADAPTERS}/hub:org/open/unpin")).status_code == 200
        for number in range(3):
            wish = lorax(adapter_id=f"hub:org/{number}")
            assert (await client.post("/generate", json=wish)).status_code == 200
        assert ONE not in kept(world.folder).values()

    front.run(work)


def test_a_pin_of_a_name_moves_to_the_new_bytes(world: World):
    front = world.front(recheck_s=0.0)

    async def work(client: httpx.AsyncClient) -> None:
        await client.post(f"{ADAPTERS}/hub:org/open/pin")
        before = set(world.engine.pinned)
        push(world)
        await client.post("/generate", json=lorax(adapter_id="hub:org/open"))
        for _ in range(200):
            if world.engine.pinned != before and len(world.engine.pinned) == 1:
                break
            await asyncio.sleep(0.01)
        (pinned,) = world.engine.pinned
        assert kept(world.folder)[pinned[1:]] == TWO
        assert front.sources.disk.is_held(pinned[1:])
        assert not any(front.sources.disk.is_held(name[1:]) for name in before)

    front.run(work)
    assert world.registry.state.pins == {Target("hub:org/open")}


class Gate:
    """Keeps the engine's next orders of a kind waiting."""

    def __init__(self, world: World, held: OrderKind = "pin") -> None:
        self.has_come, self.may_go = asyncio.Event(), asyncio.Event()
        order = world.engine.order

        async def wait(kind: OrderKind, adapter_id: str, revision: str = "") -> OrderDone:
            if kind == held:
                self.has_come.set()
                await self.may_go.wait()
            return await order(kind, adapter_id, revision)

        world.engine.order = wait  # type: ignore[method-assign]


async def send(client: httpx.AsyncClient, files: dict[str, bytes]) -> None:
    sent = [(name, (name, body)) for name, body in files.items()]
    assert (await client.put(f"{ADAPTERS}/u/files", files=sent)).status_code == 201


@pytest.mark.parametrize("name", ["upload:u", "hub:org/open"])
def test_what_is_removed_while_it_is_pinned_is_not_pinned(world: World, name: str):
    """Its pin came after its end, and kept its bytes on the disk and in memory for ever."""
    front = world.front(allows_upload=True)

    async def work(client: httpx.AsyncClient) -> None:
        await send(client, ONE)
        await client.post(f"{ADAPTERS}/{name}/load")
        gate = Gate(world)
        pin = asyncio.ensure_future(client.post(f"{ADAPTERS}/{name}/pin"))
        await gate.has_come.wait()
        assert (await client.delete(f"{ADAPTERS}/{name}")).status_code == 200
        gate.may_go.set()
        assert (await pin).status_code == 404
        assert not world.engine.pinned
        assert not [one for one in front.sources.listing() if one.name == name]

    front.run(work)
    assert not world.registry.state.pins


def test_what_is_removed_while_it_is_named_has_no_name(world: World):
    """The name came back with the adapter, though its removal takes all names along."""

    async def work(client: httpx.AsyncClient) -> None:
        gate = Gate(world, "find")
        wish = {"name": "support@prod", "adapter_id": "hub:org/open"}
        naming = asyncio.ensure_future(client.post(ADAPTERS, json=wish))
        await gate.has_come.wait()
        assert (await client.delete(f"{ADAPTERS}/hub:org/open")).status_code == 200
        gate.may_go.set()
        assert (await naming).status_code == 404

    world.front().run(work)
    assert not world.registry.state.names


def test_what_is_replaced_while_it_is_pinned_is_pinned_as_it_is_then(world: World):
    front = world.front(allows_upload=True)

    async def work(client: httpx.AsyncClient) -> None:
        await send(client, ONE)
        gate = Gate(world)
        pin = asyncio.ensure_future(client.post(f"{ADAPTERS}/upload:u/pin"))
        await gate.has_come.wait()
        await send(client, TWO)
        gate.may_go.set()
        assert (await pin).status_code == 200
        (pinned,) = world.engine.pinned
        assert kept(world.folder) == {pinned[1:]: TWO}

    front.run(work)


def test_a_removal_takes_a_pin_along_that_has_not_moved_to_the_newest(world: World):
    """The engine kept what was replaced in memory until it was started again."""

    async def work(client: httpx.AsyncClient) -> None:
        await send(client, ONE)
        assert (await client.post(f"{ADAPTERS}/upload:u/pin")).status_code == 200
        await send(client, TWO)
        assert (await client.delete(f"{ADAPTERS}/upload:u")).status_code == 200
        assert not world.engine.pinned

    world.front(allows_upload=True).run(work)
    assert not kept(world.folder)


def test_a_pin_that_is_taken_away_while_it_moves_is_gone(world: World):
    front = world.front(allows_upload=True)

    async def work(client: httpx.AsyncClient) -> None:
        await send(client, ONE)
        assert (await client.post(f"{ADAPTERS}/upload:u/pin")).status_code == 200
        await send(client, TWO)
        gate = Gate(world)
        await client.post("/generate", json=lorax(adapter_id="upload:u"))
        await gate.has_come.wait()
        assert (await client.post(f"{ADAPTERS}/upload:u/unpin")).status_code == 200
        gate.may_go.set()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not world.engine.pinned
        assert not front.sources.disk._holds

    front.run(work)
    assert not world.registry.state.pins


def orders(world: World, sources: Sources) -> SourcedOrders:
    world.engine.sources = sources
    return SourcedOrders(world.engine, sources)


def test_pins_are_back_after_a_restart_though_their_source_is_down_and_no_token_at_hand(
    world: World,
):
    for name, token in (("org/open", ""), ("org/secret", "good")):
        body = {"api_token": token} if token else None
        assert world.front().post(f"{ADAPTERS}/hub:{name}/pin", body).status_code == 200
    pins = world.registry.state.pins
    assert pins == {Target("hub:org/open"), Target("hub:org/secret")}
    world.engine.pinned.clear()
    world.hub.front.rules.insert(0, lambda seen: Reply(500))

    async def work(sources: Sources) -> None:
        fetched = orders(world, sources)
        fetched.hold_pinned(pins)
        assert all(sources.disk.is_held(name) for name in kept(world.folder))
        for _ in range(2):  # the second engine is one that was started again
            warm_up = WarmUp(world.engine, world.registry, [], fetched)
            warm_up.begin()
            await warm_up.check()
            assert {name[1:] for name in world.engine.pinned} == set(kept(world.folder))
        with pytest.raises(ApiError):
            await sources.acquire(Reference("hub", "org/secret"))

    with_sources(settings(world.folder, hub=world.hub.url, hosts=(world.hub.cdn.url,)), work)


def test_a_start_fetches_what_it_is_told_to_warm_up(world: World):
    async def work(sources: Sources) -> list[str]:
        names = ["hub:org/open", "hub:org/none", "s3:b"]
        return await WarmUp(world.engine, world.registry, names, orders(world, sources))._run()

    chosen = settings(world.folder, hub=world.hub.url, hosts=(world.hub.cdn.url,))
    said = with_sources(chosen, work)
    assert len(said) == 2
    assert "org/none" in said[0]
    assert "BUCKET/PREFIX" in said[1]
    assert {kind for kind, _, _ in world.engine.orders} == {"load"}
    assert (
        "--adapter-cache"
        in asyncio.run(WarmUp(world.engine, Registry(), ["hub:org/open"])._run())[0]
    )


def test_an_engine_that_goes_away_leaves_no_hold(world: World):
    front = world.front()

    async def work(client: httpx.AsyncClient) -> None:
        await client.post("/generate", json=lorax(adapter_id="hub:org/open"))
        world.engine.down = Unavailable("down", "the engine has ended", 3)
        for deed in ("load", "pin", "unload", "unpin"):
            reply = await client.post(f"{ADAPTERS}/hub:org/open/{deed}")
            assert reply.status_code == 503
        assert not world.registry.state.pins
        assert (await client.delete(f"{ADAPTERS}/hub:org/open")).status_code == 200
        assert not kept(world.folder)

    front.run(work)


# -- progress -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "token"), [("hub:org/open", ""), ("hub:org/secret", "good")])
def test_a_download_under_way_is_seen(world: World, name: str, token: str, tmp_path: Path):
    from lory_router.keys import Keyring

    path = tmp_path / "keys"
    path.write_text(json.dumps([{"key": "user", "tenant": "acme"}]))
    world.keys = Keyring(("admin",), str(path))
    body = world.hub.repos[name.partition(":")[2]].files["adapter_model.safetensors"]
    reply = Reply(body=body, stalls_after=1000)
    world.hub.cdn.rules.append(lambda seen: reply if seen.method == "GET" else None)
    front = world.front(stall_s=3.0)

    async def work(client: httpx.AsyncClient) -> None:
        def headers(who: str) -> dict[str, Any]:
            return {"headers": {"authorization": f"Bearer {who}"}}

        wish = lorax(adapter_id=name, **({"api_token": token} if token else {}))
        asking = asyncio.ensure_future(client.post("/generate", json=wish, **headers("admin")))
        seen: dict[str, Any] = {}
        for _ in range(300):
            listed = (await client.get(ADAPTERS, **headers("admin"))).json()["data"]
            seen = next((one for one in listed if one["id"] == name), {})
            if seen and seen["fetching"]["bytes"] >= 1000:
                break
            await asyncio.sleep(0.005)
        assert seen["state"] == "fetching"
        assert seen["fetching"]["total"] == sum(map(len, (body, ONE["adapter_config.json"])))
        one = await client.get(f"{ADAPTERS}/{name}", **headers("admin"))
        assert one.json()["fetching"]["bytes"] >= 1000
        status = (await client.get(f"{ADAPTERS}/{name}", **headers("user"))).status_code
        assert status == (404 if token else 200)
        listed = (await client.get(ADAPTERS, **headers("user"))).json()["data"]
        assert (name in {one["id"] for one in listed}) == (not token)
        world.hub.cdn.ending.set()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        while front.sources.downloads():
            await asyncio.sleep(0.01)

    front.run(work)
