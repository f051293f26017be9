"""Owners: what is one tenant's is to the others as if it were not there, on every route."""

import asyncio
import json
import statistics
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from lory_router.keys import Keyring
from lory_router.names import Target
from lory_router.registry import Registry
from scripted_engine import BASE, REVISION, Front, ScriptedEngine
from sourced_front import ONE, World, lorax

ADAPTERS = "/v1/adapters"
TENANTS = ("acme", "beta")
DEEDS = ("load", "unload", "pin", "unpin")


@pytest.fixture
def keys(tmp_path: Path) -> Keyring:
    path = tmp_path / "keys"
    path.write_text(json.dumps([{"key": name, "tenant": name} for name in TENANTS]))
    return Keyring(("admin",), str(path))


def as_(who: str) -> dict[str, Any]:
    return {"headers": {"authorization": f"Bearer {who}"}}


def owned(tmp_path: Path, keys: Keyring) -> Front:
    """`secret` is acme's, and so is the alias of a public one; `team/secret` is beta's."""
    adapters = ("french", "secret", "team/secret")
    front = Front(
        engine=ScriptedEngine(adapters=adapters),
        registry=Registry(str(tmp_path / "registry")),
        keys=keys,
    )
    for body in (
        {"name": "secret", "owner": "acme"},
        {"name": "secret@prod"},
        {"name": "help", "adapter_id": "secret"},
        {"name": "french@quiet", "owner": "acme"},
        {"name": "team/secret", "owner": "beta"},
    ):
        reply = front.post(ADAPTERS, body, **as_("admin"))
        assert reply.status_code == 201, reply.text
    return front


NAMES = {
    "secret": "absent",
    f"secret@{REVISION[:6]}": f"absent@{REVISION[:6]}",
    "secret@prod": "absent@prod",
    "secret@nothing": "absent@nothing",
    "help": "heap",
    "french@quiet": "french@queue",
}
"""What beta may not see, and in its place what is not there at all."""


def bodies(name: str) -> list[tuple[str, dict[str, Any]]]:
    return [
        ("/generate", lorax(adapter_id=name)),
        ("/generate_stream", lorax(adapter_id=name)),
        ("/", {**lorax(adapter_id=name), "stream": True}),
        ("/v1/completions", {"model": name, "prompt": "a"}),
        ("/v1/completions", {"model": f"{BASE}:{name}", "prompt": "a", "stream": True}),
    ]


def told(reply: httpx.Response, name: str) -> tuple[int, str, list[str]]:
    """A reply without the name that was asked for, which it may quote."""
    text = reply.text
    for part in (name, *name.split("@")):
        text = text.replace(part, "NAME")
    return reply.status_code, text, sorted(reply.headers)


@pytest.mark.parametrize(("name", "absent"), NAMES.items())
def test_what_is_not_ours_is_as_what_is_not_there(
    tmp_path: Path, keys: Keyring, name: str, absent: str
) -> None:
    front = owned(tmp_path, keys)
    for hidden, missing in zip(bodies(name), bodies(absent), strict=True):
        replies = [front.post(path, body, **as_("beta")) for path, body in (hidden, missing)]
        assert replies[0].status_code == 404
        assert told(replies[0], name) == told(replies[1], absent)
    asked = [
        ("GET", ""),
        ("DELETE", ""),
        *(("POST", f"/{deed}") for deed in DEEDS),
    ]
    for method, deed in asked:
        replies = [
            front.ask(method, f"{ADAPTERS}/{one}{deed}", **as_("beta")) for one in (name, absent)
        ]
        assert told(replies[0], name) == told(replies[1], absent), (method, deed)
        assert replies[0].status_code in (400, 404)
    for one in ("/v1/models", ADAPTERS):
        assert (
            name.partition("@")[2] not in ("prod", "quiet")
            or name not in front.get(one, **as_("beta")).text
        )
    assert front.get(f"/v1/models/{name}", **as_("beta")).status_code == 404
    for who in ("acme", "admin"):
        for path, body in bodies(name):
            reply = front.post(path, body, **as_(who))
            assert reply.status_code == (404 if "nothing" in name else 200), (who, path, reply.text)


def test_a_hidden_adapter_is_looked_for_as_one_that_is_not_there(
    tmp_path: Path, keys: Keyring
) -> None:
    """Told apart by time otherwise: the engine takes a thread and a disk to say no."""
    front = owned(tmp_path, keys)
    num_before = len(front.engine.orders)
    for name in ("secret", "help", "absent"):
        front.post("/generate", lorax(adapter_id=name), **as_("beta"))
    asked = [adapter_id for _, adapter_id, _ in front.engine.orders[num_before:]]
    assert len(asked) == 3, "all three went to the engine"
    assert asked[0] == asked[1]
    assert asked[0].startswith("absent-")
    assert asked[2] == "absent"


def test_no_merge_leads_to_what_is_not_ours(tmp_path: Path, keys: Keyring) -> None:
    front = owned(tmp_path, keys)

    def merged(who: str, name: str) -> httpx.Response:
        wish = {"ids": ["french", name], "weights": [0.5, 0.5]}
        return front.post("/generate", lorax(merged_adapters=wish), **as_(who))

    for name, absent in NAMES.items():
        hidden, missing = merged("beta", name), merged("beta", absent)
        assert hidden.status_code == 404
        assert told(hidden, name) == told(missing, absent)


def test_it_takes_as_long_to_say_no_either_way(tmp_path: Path, keys: Keyring) -> None:
    front = owned(tmp_path, keys)

    async def work(client: httpx.AsyncClient) -> dict[str, float]:
        took: dict[str, list[float]] = {"secret": [], "absent": []}
        for _ in range(60):
            for name, seconds in took.items():
                started = time.perf_counter()
                await client.post("/generate", json=lorax(adapter_id=name), **as_("beta"))
                seconds.append(time.perf_counter() - started)
        return {name: statistics.median(seconds) for name, seconds in took.items()}

    median = front.run(work)
    assert 0.5 < median["secret"] / median["absent"] < 2.0


def test_lists_show_each_tenant_its_own(tmp_path: Path, keys: Keyring) -> None:
    front = owned(tmp_path, keys)

    def models(who: str) -> set[str]:
        return {card["id"] for card in front.get("/v1/models", **as_(who)).json()["data"]} - {BASE}

    def adapters(who: str) -> dict[str, Any]:
        data = front.get(ADAPTERS, **as_(who)).json()["data"]
        return {one["id"]: (one["owner"], set(one["names"])) for one in data}

    assert models("beta") == {"french", "team/secret"}
    assert models("acme") == {"french", "french@quiet", "secret", "secret@prod", "help"}
    assert models("admin") == models("acme") | models("beta")
    assert adapters("beta") == {"french": (None, set()), "team/secret": ("beta", set())}
    assert adapters("acme") == {
        "french": (None, {"french@quiet"}),
        "secret": ("acme", {"secret@prod", "help"}),
    }
    assert set(adapters("admin")) == {"french", "secret", "team/secret"}
    assert models("beta") == {"french", "team/secret"}, "what was made for others is not kept"


def test_a_removed_adapter_stays_its_owners(tmp_path: Path, keys: Keyring) -> None:
    front = owned(tmp_path, keys)
    assert front.ask("DELETE", f"{ADAPTERS}/secret", **as_("acme")).status_code == 200
    assert front.get(ADAPTERS, **as_("acme")).json()["removed"] == ["secret"]
    assert front.get(ADAPTERS, **as_("beta")).json()["removed"] == []
    for who in ("beta", "acme"):
        reply = front.post("/generate", lorax(adapter_id="secret"), **as_(who))
        assert reply.status_code == 404
    for who, status in (("beta", 403), ("acme", 201)):
        assert front.post(ADAPTERS, {"name": "secret"}, **as_(who)).status_code == status
    assert front.post("/generate", lorax(adapter_id="secret"), **as_("beta")).status_code == 404
    assert front.post("/generate", lorax(adapter_id="secret"), **as_("acme")).status_code == 200


def test_owners_outlive_the_server(tmp_path: Path, keys: Keyring) -> None:
    front = owned(tmp_path, keys)
    state = front.registry.state
    front.registry.close()
    with closing(Registry(str(tmp_path / "registry"))) as registry:
        assert registry.state.owners == state.owners
        again = Front(engine=front.engine, registry=registry, keys=keys)
        reply = again.post("/generate", lorax(adapter_id="secret"), **as_("beta"))
        assert reply.status_code == 404


def test_an_owner_that_would_be_forgotten_is_refused(keys: Keyring) -> None:
    front = Front(keys=keys)
    body = {"name": "french", "owner": "acme"}
    reply = front.post(ADAPTERS, body, **as_("admin"))
    assert (reply.status_code, "--registry" in reply.text) == (400, True)
    body = {"name": "fr", "adapter_id": "french", "owner": "acme"}
    assert front.post(ADAPTERS, body, **as_("admin")).status_code == 201, "is gone with its owner"


# -- what a tenant may do --------------------------------------------------------------------


def test_a_tenant_gives_names_of_its_own_and_nobody_elses(tmp_path: Path, keys: Keyring) -> None:
    front = owned(tmp_path, keys)

    def register(who: str, **body: Any) -> httpx.Response:
        return front.post(ADAPTERS, body, **as_(who))

    assert register("acme", name="acme/fr", adapter_id="french").status_code == 201
    assert register("acme", name="acme/fr@prod", adapter_id="secret").status_code == 201
    assert register("acme", name="acme/fr", adapter_id="secret").status_code == 200
    hers = {"adapter_id": "secret"}
    for name in ("beta/fr", "fr", "acme", "acmeco/fr", "french"):
        assert register("acme", name=name, adapter_id="french").status_code == 403, name
    assert register("beta", name="beta/fr", **hers).status_code == 404
    assert register("acme", name="acme/x", adapter_id="french", owner="beta").status_code == 403
    assert front.registry.state.owners["acme/fr"] == "acme"
    assert front.post("/generate", lorax(adapter_id="acme/fr"), **as_("acme")).status_code == 200
    assert front.post("/generate", lorax(adapter_id="acme/fr"), **as_("beta")).status_code == 404
    assert front.ask("DELETE", f"{ADAPTERS}/acme/fr", **as_("beta")).status_code == 404
    assert front.ask("DELETE", f"{ADAPTERS}/acme/fr", **as_("acme")).status_code == 200
    assert "acme/fr" not in front.registry.state.owners


def test_a_tenant_changes_what_it_owns_and_nothing_else(tmp_path: Path, keys: Keyring) -> None:
    front = owned(tmp_path, keys)
    front.engine.orders.clear()
    for deed in ("load", "unload"):
        assert front.post(f"{ADAPTERS}/secret/{deed}", **as_("acme")).status_code == 200
        assert front.post(f"{ADAPTERS}/help/{deed}", **as_("acme")).status_code == 200
        assert front.post(f"{ADAPTERS}/french/{deed}", **as_("acme")).status_code == 403
    assert [adapter_id for _, adapter_id, _ in front.engine.orders] == ["secret"] * 4
    for deed in ("pin", "unpin"):
        refused = front.post(f"{ADAPTERS}/secret/{deed}", **as_("acme"))
        assert (refused.status_code, "admins" in refused.text) == (403, True)
    assert front.ask("DELETE", f"{ADAPTERS}/french", **as_("acme")).status_code == 403
    assert front.post("/generate", lorax(adapter_id="french"), **as_("acme")).status_code == 200
    refused = front.post(
        "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "french"}, **as_("acme")
    )
    assert refused.status_code == 403
    named = {"lora_name": "acme/x", "lora_path": "french"}
    assert front.post("/v1/load_lora_adapter", named, **as_("acme")).status_code == 200
    unload = {"lora_name": "acme/x"}
    assert front.post("/v1/unload_lora_adapter", unload, **as_("beta")).status_code == 404
    front.engine.orders.clear()
    assert front.post("/v1/unload_lora_adapter", unload, **as_("acme")).status_code == 200
    assert not front.engine.orders, "what is for all is not let go of by one"


def test_an_owner_moves_and_goes_by_an_admins_word(tmp_path: Path, keys: Keyring) -> None:
    front = owned(tmp_path, keys)

    def statuses() -> list[int]:
        return [
            front.post("/generate", lorax(adapter_id="secret"), **as_(who)).status_code
            for who in TENANTS
        ]

    assert statuses() == [200, 404]
    front.post(ADAPTERS, {"name": "secret", "owner": "beta"}, **as_("admin"))
    assert statuses() == [404, 200]
    front.post(ADAPTERS, {"name": "secret"}, **as_("admin"))
    assert statuses() == [404, 200]
    front.post(ADAPTERS, {"name": "secret", "owner": ""}, **as_("admin"))
    assert statuses() == [200, 200]
    refused = front.post(ADAPTERS, {"name": "secret", "owner": "a b"}, **as_("admin"))
    assert refused.status_code == 400


def test_a_public_name_of_a_private_adapter_leads_nowhere(tmp_path: Path, keys: Keyring) -> None:
    front = owned(tmp_path, keys)
    assert front.registry.target("help") == Target("secret")
    assert "help" not in front.registry.state.owners
    assert front.post("/generate", lorax(adapter_id="help"), **as_("beta")).status_code == 404


def test_a_name_does_not_take_an_owned_adapters_place(tmp_path: Path, keys: Keyring) -> None:
    """Registering it would have made the folder the tenant's, and forgetting it everybody's."""
    front = owned(tmp_path, keys)
    front.engine.adapters = (*front.engine.adapters, "acme/theirs")
    body = {"name": "acme/theirs", "owner": "beta"}
    assert front.post(ADAPTERS, body, **as_("admin")).status_code == 201
    taken = {"name": "acme/theirs", "adapter_id": "french"}
    assert front.post(ADAPTERS, taken, **as_("acme")).status_code == 403
    assert front.registry.state.owners["acme/theirs"] == "beta"


def test_a_tenants_names_are_bounded(
    tmp_path: Path, keys: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lory_router import rights

    monkeypatch.setattr(rights, "MAX_NAMES", 3)
    front = owned(tmp_path, keys)  # two are acme's
    statuses = [
        front.post(ADAPTERS, {"name": f"acme/{n}", "adapter_id": "french"}, **as_("acme"))
        for n in ("a", "b", "a")
    ]
    assert [reply.status_code for reply in statuses] == [201, 409, 200]


# -- uploads ---------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path, keys: Keyring) -> World:
    world = World(tmp_path, hub_url="http://127.0.0.1:9")
    world.keys = keys
    return world


def send(world: World, who: str, name: str, **more: Any) -> int:
    files = [(file, (file, body)) for file, body in ONE.items()]
    front = world.front(allows_upload=True)
    path = f"{ADAPTERS}/{name}/files"
    return front.ask("PUT", path, files=files, **as_(who), **more).status_code


def ask(world: World, who: str, name: str) -> int:
    front = world.front(allows_upload=True)
    return front.post("/generate", lorax(adapter_id=name), **as_(who)).status_code


def test_what_a_tenant_uploads_is_its_own_over_a_restart(world: World) -> None:
    assert send(world, "acme", "acme/x") == 201
    for _ in range(2):  # each front reads the folder anew
        answers = [ask(world, who, "upload:acme/x") for who in ("acme", "beta", "admin")]
        assert answers == [200, 404, 200]
    for who, is_shown in (("acme", True), ("beta", False), ("admin", True)):
        front = world.front(allows_upload=True)
        for path in ("/v1/models", ADAPTERS):
            ids = {one["id"] for one in front.get(path, **as_(who)).json()["data"]}
            assert ("upload:acme/x" in ids) == is_shown
        hidden = front.get(f"{ADAPTERS}/upload:acme/x", **as_(who))
        assert hidden.status_code == (200 if is_shown else 404)


def test_a_tenant_uploads_under_its_own_name(world: World) -> None:
    assert send(world, "acme", "x") == 403
    assert send(world, "acme", "beta/x") == 403
    assert send(world, "acme", "acme/x", params={"owner": "beta"}) == 403
    assert send(world, "admin", "acme/x", params={"owner": "a b"}) == 400
    assert send(world, "admin", "acme/x", params={"own": "acme"}) == 400
    assert send(world, "admin", "acme/x") == 201
    assert send(world, "acme", "acme/x") == 403, "an admin's upload is for all, and an admin's"
    assert ask(world, "beta", "upload:acme/x") == 200


def test_an_admin_uploads_for_a_tenant_and_the_owner_stays(world: World) -> None:
    assert send(world, "admin", "x", params={"owner": "acme"}) == 201
    assert [send(world, who, "x") for who in TENANTS] == [201, 403]
    assert send(world, "admin", "x") == 201
    assert [ask(world, who, "upload:x") for who in TENANTS] == [200, 404]
    assert send(world, "admin", "x", params={"owner": ""}) == 201
    assert [ask(world, who, "upload:x") for who in TENANTS] == [200, 200]


def test_a_tenant_takes_its_upload_away(world: World) -> None:
    send(world, "acme", "acme/x")
    path = f"{ADAPTERS}/upload:acme/x"
    front = world.front(allows_upload=True)
    unknown = front.ask("DELETE", f"{ADAPTERS}/upload:acme/y", **as_("beta"))
    hidden = front.ask("DELETE", path, **as_("beta"))
    assert told(hidden, "acme/x") == told(unknown, "acme/y")
    assert front.ask("DELETE", path, **as_("acme")).status_code == 200
    assert ask(world, "acme", "upload:acme/x") == 404
    assert send(world, "acme", "acme/x") == 201


def test_names_of_an_upload_are_its_tenants(world: World) -> None:
    send(world, "acme", "acme/x")
    front = world.front(allows_upload=True)
    body = {"name": "acme/help", "adapter_id": "upload:acme/x"}
    assert front.post(ADAPTERS, body, **as_("acme")).status_code == 201
    stolen = {"name": "beta/help", "adapter_id": "upload:acme/x"}
    assert front.post(ADAPTERS, stolen, **as_("beta")).status_code == 404
    assert [ask(world, who, "acme/help") for who in TENANTS] == [200, 404]
    asyncio.run(world.registry.register("open", Target("upload:acme/x")))
    assert [ask(world, who, "open") for who in TENANTS] == [200, 404]


def test_what_a_token_fetched_is_told_to_admins_alone(tmp_path: Path, keys: Keyring) -> None:
    world = World(tmp_path)
    world.keys = keys
    with world.hub.running():
        for name, token in (("hub:org/secret", "good"), ("hub:org/open", "")):
            wish = lorax(adapter_id=name, **({"api_token": token} if token else {}))
            assert world.front().post("/generate", wish, **as_("acme")).status_code == 200
        for who, is_shown in (("acme", False), ("admin", True)):
            front = world.front()
            for path in ("/v1/models", ADAPTERS):
                ids = {one["id"] for one in front.get(path, **as_(who)).json()["data"]}
                assert ("hub:org/secret" in ids) == is_shown
                assert "hub:org/open" in ids
        for method, deed in (("DELETE", ""), ("POST", "/load"), ("POST", "/pin"), ("GET", "")):
            replies = [
                world.front().ask(method, f"{ADAPTERS}/hub:org/{name}{deed}", **as_("acme"))
                for name in ("secret", "nothing")
            ]
            assert told(replies[0], "secret") == told(replies[1], "nothing")
            assert replies[0].status_code == 404
        for deed in ("load", "pin"):
            path = f"{ADAPTERS}/hub:org/open/{deed}"
            assert world.front().post(path, **as_("acme")).status_code == 403
