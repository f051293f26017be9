"""Names, owners, merges, revisions, pins and sources at once: what one of them promises holds
whatever the others do."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from lory_router.keys import Keyring
from lory_router.registry import Registry
from lory_server.recipes import MergeSource, Recipe, merged_id
from scripted_engine import BASE, REVISION, Front, ScriptedEngine
from sourced_front import World, lorax

ADAPTERS = "/v1/adapters"
MERGE = f"{ADAPTERS}/merge"
ADMIN, ACME, BETA = "admin", "acme", "beta"
OF_SECRET = merged_id(Recipe(sources=(MergeSource("secret", 1.0),)))
NOT_NAMES = (OF_SECRET, "+x", "+", "@upload-secret-0f1e", f"@{REVISION[:6]}", "@", "+{}", "@a/b")
"""What the engine, or nobody, calls adapters."""


@pytest.fixture
def keys(tmp_path: Path) -> Keyring:
    path = tmp_path / "keys"
    path.write_text(json.dumps([{"key": name, "tenant": name} for name in (ACME, BETA)]))
    return Keyring((ADMIN,), str(path))


@pytest.fixture
def front(tmp_path: Path, keys: Keyring) -> Front:
    """`secret` and `hidden` are acme's, `french` and `polite` everybody's."""
    engine = ScriptedEngine(adapters=("french", "polite", "secret", "hidden"))
    front = Front(engine=engine, registry=Registry(str(tmp_path / "registry")), keys=keys)
    for name in ("secret", "hidden"):
        assert post(front, ADMIN, ADAPTERS, {"name": name, "owner": ACME}).status_code == 201
    return front


def as_(who: str) -> dict[str, Any]:
    return {"headers": {"authorization": f"Bearer {who}"}}


def post(front: Front, who: str, path: str, body: Any = None) -> httpx.Response:
    return front.post(path, {} if body is None else body, **as_(who))


def ask(front: Front, who: str, name: str) -> httpx.Response:
    return post(front, who, "/generate", lorax(adapter_id=name))


def merged(names: list[str], **more: Any) -> dict[str, Any]:
    return lorax(merged_adapters={"ids": names, "weights": [1.0] * len(names)}, **more)


def save(front: Front, who: str, name: str, *sources: str) -> httpx.Response:
    adapters = [{"adapter_id": source, "weight": 1.0} for source in sources]
    return post(front, who, MERGE, {"name": name, "adapters": adapters})


def wishes(name: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Every way in which a caller can name an adapter."""
    chat = {"messages": [{"role": "user", "content": "a"}]}
    return [
        *(("POST", path, lorax(adapter_id=name)) for path in ("/generate", "/generate_stream")),
        ("POST", "/", {**lorax(adapter_id=name), "stream": True}),
        ("POST", "/generate", merged([name])),
        ("POST", "/generate_stream", merged(["french", name])),
        ("POST", "/v1/completions", {"model": name, "prompt": "a"}),
        ("POST", "/v1/completions", {"model": f"{BASE}:{name}", "prompt": "a", "stream": True}),
        ("POST", "/v1/chat/completions", {"model": name, **chat}),
        ("POST", "/v1/completions", {"model": BASE, "prompt": "a", **merged([name])["parameters"]}),
        ("POST", ADAPTERS, {"name": "beta/new", "adapter_id": name}),
        ("POST", ADAPTERS, {"name": "beta/new@prod", "adapter_id": name}),
        ("POST", MERGE, {"name": "beta/m", "adapters": [{"adapter_id": name, "weight": 1.0}]}),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "beta/new", "lora_path": name}),
        ("POST", "/v1/unload_lora_adapter", {"lora_name": name}),
        *(("POST", f"{ADAPTERS}/{name}/{deed}", {}) for deed in ("load", "unload", "pin", "unpin")),
        ("GET", f"{ADAPTERS}/{name}", {}),
        ("DELETE", f"{ADAPTERS}/{name}", {}),
        ("GET", f"/v1/models/{name}", {}),
    ]


def told(reply: httpx.Response, name: str) -> tuple[int, str, list[str]]:
    """A reply without the name that was asked for, which it may quote."""
    text = reply.text
    for part in (name, *name.split("@")):
        text = text.replace(part, "NAME")
    return reply.status_code, text, sorted(reply.headers)


# -- names that are the engine's ------------------------------------------------------------


@pytest.mark.parametrize(
    ("who", "name"), [(BETA, OF_SECRET), *((ADMIN, name) for name in NOT_NAMES)]
)
def test_what_the_engine_calls_an_adapter_is_no_name_on_any_route(
    front: Front, who: str, name: str
) -> None:
    """A further name for a recipe would be another tenant's adapter, merged from it alone."""
    num_orders = len(front.engine.orders)
    for method, path, body in wishes(name):
        content = json.dumps(body) if body else None
        reply = front.ask(method, path, content=content, **as_(who))
        assert 400 <= reply.status_code < 500, (path, body, reply.text)
        assert reply.json().get("generated_text") != "hi"
    assert not front.engine.streams
    assert len(front.engine.orders) == num_orders
    for new in ("beta/new", "beta/new@prod", "beta/m"):
        assert ask(front, BETA, new).status_code == 404


@pytest.mark.parametrize("name", NOT_NAMES)
def test_no_new_name_reads_as_the_engines(front: Front, name: str) -> None:
    for path, body in (
        (ADAPTERS, {"name": name, "adapter_id": "french"}),
        (ADAPTERS, {"name": name}),
        (MERGE, {"name": name, "adapters": [{"adapter_id": "french", "weight": 1.0}]}),
        ("/v1/load_lora_adapter", {"lora_name": name, "lora_path": "french"}),
    ):
        assert post(front, ADMIN, path, body).status_code in (400, 404)
    assert not front.registry.state.names.keys() - {"secret", "hidden"}
    assert not front.registry.state.merges


# -- what one tenant has, to another --------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", f"@{REVISION[:6]}", "@prod", "@nothing"])
def test_a_hidden_adapter_is_as_one_that_is_not_there_in_every_way_of_naming_it(
    front: Front, suffix: str
) -> None:
    assert post(front, ADMIN, ADAPTERS, {"name": "secret@prod"}).status_code == 201
    pairs = zip(wishes(f"secret{suffix}"), wishes(f"absent{suffix}"), strict=True)
    for hidden, missing in pairs:
        replies = [
            front.ask(method, path, content=json.dumps(body) if body else None, **as_(BETA))
            for method, path, body in (hidden, missing)
        ]
        assert replies[0].status_code in (400, 404), hidden
        assert told(replies[0], f"secret{suffix}") == told(replies[1], f"absent{suffix}"), hidden


@pytest.mark.parametrize(
    ("hidden", "absent"),
    [
        (["secret", "hidden"], ["absent", "nobody"]),
        (["french", "secret", "hidden"], ["french", "absent", "nobody"]),
        (["hidden", "absent", "secret"], ["nobody", "absent", "none"]),
        (["secret@0123456", "hidden"], ["absent@0123456", "nobody"]),
        (["beta/help", "secret"], ["beta/heap", "absent"]),
    ],
)
def test_a_merge_of_several_hidden_adapters_blames_the_first_as_if_none_were_there(
    front: Front, hidden: list[str], absent: list[str]
) -> None:
    for path in ("/generate", "/generate_stream"):
        replies = [post(front, BETA, path, merged(names)) for names in (hidden, absent)]
        first = next(i for i, name in enumerate(hidden) if name != "french")
        assert told(replies[0], hidden[first]) == told(replies[1], absent[first])
        assert replies[0].status_code == 404
    replies = [save(front, BETA, "beta/m", *names) for names in (hidden, absent)]
    assert told(replies[0], hidden[first]) == told(replies[1], absent[first])


def test_a_tenant_gives_aliases_of_what_it_was_given_and_of_nothing_else(front: Front) -> None:
    assert post(front, ACME, ADAPTERS, {"name": "secret@prod"}).status_code == 201
    assert ask(front, ACME, "secret@prod").status_code == 200
    assert front.registry.state.owners["secret@prod"] == ACME
    for who, name in ((BETA, "secret@mine"), (ACME, "french@mine"), (ACME, "absent@mine")):
        assert post(front, who, ADAPTERS, {"name": name}).status_code == 403
    replies = [
        post(front, BETA, ADAPTERS, {"name": name, "adapter_id": "french"})
        for name in ("secret@prod", "absent@prod")
    ]
    assert told(replies[0], "secret@prod") == told(replies[1], "absent@prod")
    assert post(front, ADMIN, ADAPTERS, {"name": "hidden@ours", "owner": ""}).status_code == 201
    assert post(front, ACME, ADAPTERS, {"name": "hidden@ours"}).status_code == 403


# -- merges, whatever becomes of their sources ----------------------------------------------


def test_a_merge_goes_and_comes_with_the_rights_to_its_sources(
    front: Front, tmp_path: Path
) -> None:
    assert save(front, ADMIN, "blend", "french", "polite").status_code == 201
    assert post(front, ADMIN, ADAPTERS, {"name": "blend@v1"}).status_code == 201
    assert post(front, ADMIN, ADAPTERS, {"name": "best", "adapter_id": "blend"}).status_code == 201
    assert post(front, ADMIN, f"{ADAPTERS}/blend/pin").status_code == 200
    names = ("blend", "blend@v1", "best", f"blend@{REVISION[:6]}")
    assert [ask(front, BETA, name).status_code for name in names] == [200] * 4
    assert post(front, ADMIN, ADAPTERS, {"name": "polite", "owner": ACME}).status_code == 201
    listed = front.get(ADAPTERS, **as_(BETA)).text + front.get("/v1/models", **as_(BETA)).text
    assert not any(name in listed for name in ("blend", "best", "polite"))
    for name, absent in zip(
        names, ("absent", "absent@v1", "absent", f"absent@{REVISION[:6]}"), strict=True
    ):
        assert told(ask(front, BETA, name), name) == told(ask(front, BETA, absent), absent)
        assert ask(front, ACME, name).status_code == 200
    assert post(front, ADMIN, ADAPTERS, {"name": "polite", "owner": ""}).status_code == 200
    assert [ask(front, BETA, name).status_code for name in names] == [200] * 4
    assert front.ask("DELETE", f"{ADAPTERS}/polite", **as_(ADMIN)).status_code == 200
    for name in names:
        reply = ask(front, BETA, name)
        assert (reply.status_code, reply.json()["error_type"]) == (404, "adapter_not_found")
    front.registry.close()
    again = Registry(str(tmp_path / "registry"))
    assert again.state == front.registry.state
    again.close()


def test_a_merge_that_is_deleted_takes_its_names_and_pins_and_nothing_else(front: Front) -> None:
    assert save(front, ADMIN, "blend", "french", "polite").status_code == 201
    for body in ({"name": "blend@v1"}, {"name": "best", "adapter_id": "blend"}, {"name": "blend"}):
        assert post(front, ADMIN, ADAPTERS, body).status_code == 201
    for name in ("blend", "blend@v1", "french"):
        assert post(front, ADMIN, f"{ADAPTERS}/{name}/pin").status_code == 200
    assert front.ask("DELETE", f"{ADAPTERS}/blend", **as_(ADMIN)).status_code == 200
    state = front.registry.state
    assert not state.merges
    assert state.names.keys() == {"secret", "hidden"}
    assert {pin.adapter_id for pin in state.pins} == {"french"}
    assert front.engine.pinned == {"french"}
    assert not state.removed
    assert save(front, ADMIN, "blend", "french").status_code == 201


def test_a_tenants_name_over_its_merge_that_it_no_longer_sees_is_refused(front: Front) -> None:
    """It would be told that it was given, and not be there."""
    assert save(front, ACME, "acme/blend", "secret", "french").status_code == 201
    assert post(front, ADMIN, ADAPTERS, {"name": "secret", "owner": BETA}).status_code == 200
    assert ask(front, ACME, "acme/blend").status_code == 404
    reply = post(front, ACME, ADAPTERS, {"name": "acme/blend", "adapter_id": "french"})
    assert reply.status_code == 409, reply.text
    assert front.ask("DELETE", f"{ADAPTERS}/acme/blend", **as_(BETA)).status_code == 404
    assert front.ask("DELETE", f"{ADAPTERS}/acme/blend", **as_(ACME)).status_code == 200
    assert not front.registry.state.merges
    again = post(front, ACME, ADAPTERS, {"name": "acme/blend", "adapter_id": "french"})
    assert again.status_code == 201


# -- sources --------------------------------------------------------------------------------


def test_a_token_is_for_one_place_whatever_is_merged_beside(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.hub.repos["org/other"] = world.hub.repos["org/open"]
    with world.hub.running():
        front = world.front()
        body = merged(["hub:org/secret", "https://models.example.com/a"], api_token="good")
        reply = front.post("/generate", body)
        assert (reply.status_code, reply.json()["error_type"]) == (422, "validation")
        assert "api_token" in reply.text
        both = merged(["hub:org/secret", "hub:org/open", "french"], api_token="good")
        assert front.post("/generate", both).status_code == 200
