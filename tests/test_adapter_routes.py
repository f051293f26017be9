"""The adapters' routes: names, aliases, pins and removals, in OpenAI's shape and vLLM's."""

import asyncio
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from lory_router.engine import Unavailable
from lory_router.names import Target
from lory_router.registry import Registry
from lory_server.messages import Failure
from scripted_engine import BASE, REVISION, Answer, Front, ScriptedEngine, events

ADAPTERS = "/v1/adapters"


def error(response: httpx.Response, status: int, code: str = "") -> str:
    assert response.status_code == status, response.text
    told = response.json()["error"]
    assert set(told) == {"message", "type", "param", "code"}
    assert told["code"] == code or not code
    return told["message"]


def names(front: Front) -> list[str]:
    return [card["id"] for card in front.get("/v1/models").json()["data"]]


def register(front: Front, **body: Any) -> httpx.Response:
    return front.post(ADAPTERS, body)


# -- looking --------------------------------------------------------------------------------


def test_a_list_tells_what_is_known_of_each_adapter():
    front = Front()
    front.post(f"{ADAPTERS}/french/pin")
    register(front, name="french@prod")
    reply = front.get(ADAPTERS).json()
    assert (reply["object"], reply["removed"]) == ("list", [])
    french, german = reply["data"]
    assert abs(french.pop("last_used") + 5 - time.time()) < 2
    one = {
        "revision": REVISION,
        "state": "device",
        "matched": {"q_proj": {"modules": 2, "ranks": [4, 8]}},
        "invocation_tokens": [7, 8],
        "bytes": {"disk": 300, "host": 200, "device": 100},
        "requests": 0,
        "pinned": True,
    }
    assert french == {
        **one,
        "id": "french",
        "object": "adapter",
        "names": {"french@prod": REVISION},
        "revisions": [one],
        "refused": None,
        "owner": None,
        "fetching": None,
        "merged": None,
    }
    assert (german["id"], german["state"], german["matched"]) == ("org/german", "disk", None)
    assert (german["pinned"], german["revisions"], german["last_used"]) == (False, [], None)


@pytest.mark.parametrize("name", ["french", "org/german", f"french@{REVISION[:6]}"])
def test_one_adapter_is_found_by_any_of_its_names(name: str):
    reply = Front().get(f"{ADAPTERS}/{name}")
    assert reply.status_code == 200
    assert reply.json()["id"] == name.partition("@")[0]


@pytest.mark.parametrize("name", ["nothing", "french/nothing", "french@prod", "..", "a%00b", ""])
def test_what_is_not_there_is_404(name: str):
    front = Front()
    error(front.get(f"{ADAPTERS}/{name}"), 404)
    for deed in ("pin", "unpin", "load", "unload"):
        error(front.post(f"{ADAPTERS}/{name}/{deed}"), 404)
    error(front.ask("DELETE", f"{ADAPTERS}/{name}"), 404)


@pytest.mark.parametrize("is_read", [True, False])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/adapters/french@abcdef0"),
        ("GET", "/v1/models/french@abcdef0"),
        ("POST", "/v1/adapters/french@abcdef0/unload"),
        ("POST", "/v1/adapters/french@abcdef0/unpin"),
        ("DELETE", "/v1/adapters/french@abcdef0"),
        ("DELETE", "/v1/models/french@abcdef0"),
    ],
)
def test_a_revision_that_is_not_there_is_a_404_that_tells_those_there_are(
    method: str, path: str, is_read: bool
):
    """They answered as of the adapter itself: 200, or that no adapter is called so."""
    front = Front()
    register(front, name="french@prod")
    register(front, name="help", adapter_id="french")
    if is_read:
        front.post(f"{ADAPTERS}/french/load")
    else:
        front.engine.loaded.clear()
    told = error(front.ask(method, path), 404, "revision_not_found")
    there = f"; there is {REVISION}" if is_read else ""
    assert told == (
        f"Adapter 'french' has no revision 'abcdef0'{there}; aliases are french@prod, help"
    )


@pytest.mark.parametrize("deed", ["load", "pin"])
def test_what_would_be_loaded_at_an_unknown_revision_is_a_404(deed: str):
    front = Front()
    error(front.post(f"{ADAPTERS}/french@abcdef0/{deed}"), 404, "revision_not_found")
    error(front.ask("DELETE", f"{ADAPTERS}/nothing@abcdef0"), 404, "model_not_found")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"inputs": "a", "adapter_id": "french@abcdef0"}),
        ("/generate", {"inputs": "a", "parameters": {"adapter_id": "french@abcdef0"}}),
        ("/v1/completions", {"prompt": "a", "model": "french@abcdef0"}),
        ("/v1/adapters", {"name": "french@new", "adapter_id": "french@abcdef0"}),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "french@abcdef0"}),
        ("/v1/unload_lora_adapter", {"lora_name": "french@abcdef0"}),
    ],
)
def test_no_route_takes_an_unknown_revision(path: str, body: Any):
    front = Front()
    assert front.post(path, body).status_code == (400 if "lora_path" in body else 404)


def test_a_model_is_found_by_its_revision_as_requests_find_it():
    front = Front()
    assert front.get(f"/v1/models/french@{REVISION[:8]}").json()["revision"] == REVISION


def test_an_alias_whose_bytes_are_gone_is_still_told():
    registry = Registry()
    front = Front(registry=registry)
    register(front, name="french@old")
    asyncio.run(registry.register("french@old", Target("french", "f" * 32), None))
    assert front.get(f"{ADAPTERS}/french@old").json()["names"] == {"french@old": "f" * 32}


def test_a_pin_at_a_revision_that_is_gone_can_be_taken_away():
    registry = Registry()
    front = Front(registry=registry)
    asyncio.run(registry.pin(Target("french", "f" * 32)))
    assert front.post(f"{ADAPTERS}/french@ffffff/unpin").status_code == 200
    assert not registry.state.pins


def test_an_unknown_alias_is_told_with_those_there_are():
    front = Front()
    register(front, name="french@prod")
    told = error(front.get(f"{ADAPTERS}/french@dev"), 404, "revision_not_found")
    assert "has no alias 'dev'; it has french@prod, and 6 to 32" in told


# -- memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["french", "org/german", f"french@{REVISION[:8]}"])
def test_load_pin_unpin_and_unload_reach_the_engine_and_tell_what_came_of_it(name: str):
    front = Front()
    wanted = tuple([*name.split("@"), ""][:2])
    assert front.post(f"{ADAPTERS}/{name}/load").json()["state"] == "device"
    assert front.post(f"{ADAPTERS}/{name}/pin").json()["pinned"]
    error(front.post(f"{ADAPTERS}/{name}/unload"), 409, "conflict")
    assert front.get(f"{ADAPTERS}/{name}").json()["pinned"]
    assert not front.post(f"{ADAPTERS}/{name}/unpin").json()["pinned"]
    assert front.post(f"{ADAPTERS}/{name}/unload").json()["state"] == "disk"
    kinds = ("load", "pin", "unload", "find", "unpin", "unload")
    assert front.engine.orders == [(kind, *wanted) for kind in kinds]


def test_a_pin_is_kept_with_the_whole_digest_where_a_revision_was_named():
    registry = Registry()
    front = Front(registry=registry)
    front.post(f"{ADAPTERS}/french/pin")
    front.post(f"{ADAPTERS}/french@{REVISION[:6]}/pin")
    assert registry.state.pins == {Target("french"), Target("french", REVISION)}
    front.post(f"{ADAPTERS}/french@{REVISION[:9]}/unpin")
    assert registry.state.pins == {Target("french")}
    front.post(f"{ADAPTERS}/french/unpin")
    assert not registry.state.pins


def test_a_refused_pin_is_not_kept():
    registry = Registry()
    front = Front(registry=registry)
    front.engine.refuses = Failure(code="adapter_capacity", message="adapter 'french' is too large")
    assert "too large" in error(front.post(f"{ADAPTERS}/french/pin"), 400, "adapter_capacity")
    assert not registry.state.pins


@pytest.mark.parametrize("name", ["french", f"french@{REVISION[:8]}"])
def test_a_pin_that_cannot_be_written_down_is_none(name: str, tmp_path: Path):
    registry = Registry(str(tmp_path / "registry"))
    front = Front(registry=registry)
    registry._connection.execute("PRAGMA query_only = 1")
    assert "nothing was changed" in error(front.post(f"{ADAPTERS}/{name}/pin"), 500)
    assert not front.engine.pinned
    registry._connection.execute("PRAGMA query_only = 0")
    assert front.post(f"{ADAPTERS}/{name}/pin").status_code == 200
    registry._connection.execute("PRAGMA query_only = 1")
    error(front.post(f"{ADAPTERS}/{name}/pin"), 500)
    assert front.engine.pinned == {"french"}
    registry.close()


def test_a_pin_of_an_adapter_that_is_no_more_can_be_taken_away():
    front = Front()
    front.post(f"{ADAPTERS}/french/pin")
    front.engine.adapters, front.engine.loaded = (), set()
    assert front.post(f"{ADAPTERS}/french/unpin").status_code == 200
    error(front.post(f"{ADAPTERS}/french/unpin"), 404)


def test_a_body_where_none_belongs_is_refused():
    front = Front()
    assert front.post(f"{ADAPTERS}/french/load", {}).status_code == 200
    assert "unknown field" in error(front.post(f"{ADAPTERS}/french/load", {"force": True}), 400)


def test_an_engine_that_is_down_is_told_as_everywhere():
    front = Front()
    front.engine.down = Unavailable("down", "the engine has ended", 3)
    for reply in (front.get(ADAPTERS), front.post(f"{ADAPTERS}/french/load")):
        error(reply, 503)
        assert reply.headers["retry-after"] == "3"


# -- names ----------------------------------------------------------------------------------


def test_an_alias_stands_for_the_revision_of_the_moment():
    front = Front()
    reply = register(front, name="french@prod")
    assert (reply.status_code, reply.json()["names"]) == (201, {"french@prod": REVISION})
    assert register(front, name="french@prod", revision=REVISION[:8]).status_code == 200
    assert register(front, name="french@next", adapter_id="french@prod").status_code == 201
    front.post("/generate", {"inputs": "a", "parameters": {"adapter_id": "french@prod"}})
    assert (front.engine.last.adapter_id, front.engine.last.adapter_revision) == (
        "french",
        REVISION,
    )
    front.post("/v1/completions", {"model": f"{BASE}:french@next", "prompt": "a"})
    assert front.engine.last.adapter_revision == REVISION
    assert names(front) == [BASE, "french", "org/german", "french@next", "french@prod"]
    assert front.get("/v1/models/french@prod").json()["revision"] == REVISION


def test_a_further_name_follows_the_adapter():
    front = Front()
    assert register(front, name="team/help", adapter_id="french").json()["names"] == {
        "team/help": None
    }
    body = {"inputs": "a", "parameters": {"adapter_id": "team/help"}}
    reply = front.post("/generate", body)
    assert reply.headers["x-adapter-id"] == "team/help"
    assert (front.engine.last.adapter_id, front.engine.last.adapter_revision) == ("french", "")
    assert front.ledger.records[-1].adapter_id == "french", "costs are counted under it"


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({}, 400, "`name` is required"),
        ({"name": "french@prod", "revison": "x"}, 400, "did you mean `revision`?"),
        ({"name": "nothing"}, 404, "No adapter named 'nothing'"),
        ({"name": "new", "adapter_id": "nothing"}, 404, "No adapter named 'nothing'"),
        ({"name": "new", "adapter_id": "french@prod"}, 404, "has no alias 'prod'"),
        ({"name": "new", "adapter_id": "french", "revision": "0000000"}, 404, "not in memory"),
        ({"name": "new", "adapter_id": "french", "revision": "prod"}, 400, "hexadecimal digits"),
        ({"name": "a b", "adapter_id": "french"}, 400, "is no name"),
        ({"name": "a/b/c", "adapter_id": "french"}, 400, "is no name"),
        ({"name": "french@", "adapter_id": "french"}, 400, "nothing behind its '@'"),
        ({"name": "french@abcdef"}, 400, "reads as a revision"),
        ({"name": BASE, "adapter_id": "french"}, 400, "the base's name"),
        ({"name": "org/german", "adapter_id": "french"}, 409, "An adapter is called"),
        ({"name": "french", "revision": REVISION}, 400, "needs another name"),
        ({"name": 5}, 400, "`name`"),
    ],
)
def test_what_cannot_be_registered_is_refused_by_name(body: Any, status: int, says: str):
    front = Front()
    assert says in error(register(front, **body), status)
    assert names(front) == [BASE, "french", "org/german"]


def test_a_damaged_adapter_is_not_registered():
    front = Front()
    front.engine.refuses = Failure(code="adapter_invalid", message="tensor x is missing")
    said = error(register(front, name="french@prod"), 400, "adapter_invalid")
    assert said == "adapter 'french': tensor x is missing"


# -- removal --------------------------------------------------------------------------------


def test_a_removed_adapter_is_404_at_once_under_all_its_names_until_registered_again():
    front = Front()
    register(front, name="french@prod")
    front.post(f"{ADAPTERS}/french/pin")
    reply = front.ask("DELETE", f"{ADAPTERS}/french")
    assert reply.json() == {"id": "french", "object": "adapter", "deleted": True}
    assert front.engine.orders[-1] == ("drop", "french", "")
    for name in ("french", "french@prod", f"french@{REVISION[:6]}"):
        body = {"inputs": "a", "parameters": {"adapter_id": name}}
        assert front.post("/generate", body).json()["error_type"] == "adapter_not_found"
        error(front.post("/v1/completions", {"model": name, "prompt": "a"}), 404, "model_not_found")
        error(front.get(f"{ADAPTERS}/{name}"), 404)
    assert not front.engine.streams
    assert names(front) == [BASE, "org/german"]
    assert front.get(ADAPTERS).json()["removed"] == ["french"]
    error(front.ask("DELETE", f"{ADAPTERS}/french"), 404)
    error(register(front, name="french@prod"), 404)
    assert register(front, name="french").status_code == 201
    assert names(front) == [BASE, "french", "org/german"]
    assert front.post("/v1/completions", {"model": "french", "prompt": "a"}).status_code == 200


def test_removing_a_name_leaves_the_adapter():
    front = Front()
    register(front, name="french@prod")
    register(front, name="help", adapter_id="french")
    for name in ("french@prod", "help"):
        assert front.ask("DELETE", f"{ADAPTERS}/{name}").json()["deleted"]
        error(front.get(f"{ADAPTERS}/{name}"), 404)
    assert names(front) == [BASE, "french", "org/german"]
    assert "drop" not in {kind for kind, _, _ in front.engine.orders}


def test_a_revision_cannot_be_removed():
    said = error(Front().ask("DELETE", f"{ADAPTERS}/french@{REVISION[:6]}"), 400)
    assert "unload it" in said


def test_decisions_outlive_the_server(tmp_path: Path):
    path = str(tmp_path / "registry")
    with closing(Registry(path)) as registry:
        front = Front(registry=registry)
        register(front, name="help@prod", adapter_id="french")
        front.ask("DELETE", f"{ADAPTERS}/org/german")
    with closing(Registry(path)) as registry:
        front = Front(registry=registry)
        assert names(front) == [BASE, "french", "help@prod"]
        front.post("/v1/completions", {"model": "help@prod", "prompt": "a"})
        assert front.engine.last.adapter_revision == REVISION


def test_every_route_asks_for_the_key():
    front = Front(api_keys=("secret",))
    paths = ["", "/french", "/french/pin", "/french/unpin", "/french/load", "/french/unload"]
    for path in (*(f"{ADAPTERS}{p}" for p in paths), "/v1/load_lora_adapter"):
        for method in ("GET", "POST", "DELETE"):
            error(front.ask(method, path), 401, "invalid_api_key")
    assert not front.engine.orders
    headers = {"authorization": "Bearer secret"}
    assert front.get(ADAPTERS, headers=headers).status_code == 200


# -- the revision of an answer --------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_names_the_revision_that_gave_it(stream: bool):
    front = Front()
    native = "/generate_stream" if stream else "/generate"
    body = {"inputs": "a", "parameters": {"adapter_id": "french", "max_new_tokens": 2}}
    assert front.post(native, body).headers["x-adapter-revision"] == REVISION
    chat = {"model": "french", "prompt": "a", "stream": stream, "n": 2}
    reply = front.post("/v1/completions", chat)
    assert reply.headers["x-adapter-revision"] == REVISION
    assert "x-adapter-revision" not in front.post("/generate", {"inputs": "a"}).headers


def test_a_revision_that_is_gone_is_a_404_that_says_so():
    front = Front()
    body = {"model": "french@abcdef0", "prompt": "a", "stream": True}
    told = error(front.post("/v1/completions", body), 404, "revision_not_found")
    assert told == "not in memory any more"
    native = {"inputs": "a", "parameters": {"adapter_id": "french@abcdef0"}}
    reply = front.post("/generate", native)
    assert (reply.status_code, reply.json()["error_type"]) == (404, "adapter_not_found")
    assert front.engine.orders[-1] == ("find", "french", "abcdef0")


def test_a_revision_that_goes_while_a_request_comes_is_the_same_404():
    front = Front(Answer(text=b"", ends=False, fails="revision_not_found"))
    body = {"model": f"french@{REVISION[:7]}", "prompt": "a", "stream": True}
    assert error(front.post("/v1/completions", body), 404, "revision_not_found") == "it broke"
    assert front.engine.last.adapter_revision == REVISION[:7]


# -- vLLM's routes --------------------------------------------------------------------------


def load_lora(front: Front, name: str, path: str, **more: Any) -> httpx.Response:
    body = {"lora_name": name, "lora_path": path, **more}
    return front.post("/v1/load_lora_adapter", body)


def unload_lora(front: Front, name: str) -> httpx.Response:
    return front.post("/v1/unload_lora_adapter", {"lora_name": name})


def test_vllms_routes_load_and_unload(tmp_path: Path):
    front = Front(adapters_dir=str(tmp_path))
    reply = load_lora(front, "sql", f"{tmp_path}/french")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain")
    assert reply.text == "Success: LoRA adapter 'sql' added successfully."
    assert front.engine.orders == [("load", "french", "")]
    assert "sql" in names(front)
    assert front.post("/v1/completions", {"model": "sql", "prompt": "a"}).status_code == 200
    said = error(load_lora(front, "sql", "french"), 400)
    assert said.endswith("set 'load_inplace' to True.")
    assert load_lora(front, "sql", "org/german/", load_inplace=True).status_code == 200
    reply = unload_lora(front, "sql")
    assert reply.text == "Success: LoRA adapter 'sql' removed successfully."
    assert front.engine.orders[-1] == ("unload", "org/german", "")
    error(front.post("/v1/completions", {"model": "sql", "prompt": "a"}), 404)
    error(unload_lora(front, "sql"), 404)


def test_an_adapter_loaded_under_its_own_name_is_gone_when_unloaded():
    front = Front()
    assert load_lora(front, "french", "french").status_code == 200
    error(load_lora(front, "french", "french"), 400)
    assert unload_lora(front, "french").status_code == 200
    error(front.post("/v1/completions", {"model": "french", "prompt": "a"}), 404)
    assert load_lora(front, "french", "french").status_code == 200
    assert front.post("/v1/completions", {"model": "french", "prompt": "a"}).status_code == 200


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../french", "french/../..", "{root}/../french", "{root}"]
)
def test_a_path_from_a_caller_is_only_ever_a_name_below_the_folder(path: str, tmp_path: Path):
    front = Front(adapters_dir=str(tmp_path))
    said = error(load_lora(front, "sql", path.format(root=tmp_path)), 400, "invalid_value")
    assert "is not in the adapters folder" in said
    assert not front.engine.orders


def test_a_link_to_the_folder_is_the_folder(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    front = Front(adapters_dir=str(tmp_path / "link"))
    for number, root in enumerate(("real", "link")):
        assert load_lora(front, f"sql{number}", f"{tmp_path}/{root}/french").status_code == 200


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"lora_name": "", "lora_path": "french"}, "must be provided"),
        ({"lora_name": "sql", "lora_path": ""}, "must be provided"),
        ({"lora_name": "sql"}, "`lora_path` is required"),
        ({"lora_name": "a b", "lora_path": "french"}, "`lora_name`"),
        ({"lora_name": "sql", "lora_path": "french", "weights": "x"}, "unknown field"),
        ({"lora_name": "sql", "lora_path": "french", "is_3d_lora_weight": True}, "unknown field"),
        ({"lora_name": "sql", "lora_path": "french", "lora_int_id": 7}, "unknown field"),
    ],
)
def test_a_load_that_says_too_little_or_too_much_is_refused(body: Any, says: str):
    front = Front()
    assert says in error(front.post("/v1/load_lora_adapter", body), 400)
    assert not front.engine.orders


def test_fields_that_clients_of_vllm_leave_unset_are_passed_over():
    front = Front()
    unset = {"lora_int_id": None, "is_3d_lora_weight": False}
    assert load_lora(front, "sql", "french", load_inplace=False, **unset).status_code == 200
    body = {"lora_name": "sql", "lora_int_id": None}
    assert front.post("/v1/unload_lora_adapter", body).status_code == 200


def test_a_load_that_fails_registers_nothing():
    front = Front(engine=ScriptedEngine(refuses=Failure(code="adapter_invalid", message="bad")))
    error(load_lora(front, "sql", "french"), 400, "adapter_invalid")
    assert names(front) == [BASE, "french", "org/german"]


def test_streams_go_on_when_their_adapter_is_removed():
    front = Front(Answer(text=b"abcdef", delay_s=0.02))

    async def work(client: httpx.AsyncClient) -> tuple[list[str], int]:
        body = {"model": "french", "prompt": "a", "stream": True}
        stream = asyncio.ensure_future(client.post("/v1/completions", json=body))
        await asyncio.sleep(0.05)
        removed = await client.delete(f"{ADAPTERS}/french")
        assert removed.status_code == 200
        late = await client.post("/v1/completions", json=body)
        return events(await stream), late.status_code

    told, late_status = front.run(work)
    assert told[-1] == "[DONE]"
    assert len(told) == 8
    assert late_status == 404
