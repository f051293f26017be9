"""Adapters from sources are asked as those of the folder are: by their manifests and tokenizers."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import tiny_tokenizers
from lory_server.adapters.manner import MANIFEST_NAME
from lory_server.adapters.tokenizer_files import TOKENIZER_NAME
from scripted_engine import TEXT
from source_files import kept
from source_servers import Reply, Repo, Seen
from sourced_front import ONE, TWO, World, lorax
from test_source_upload import send

MANIFEST = {
    MANIFEST_NAME: json.dumps(
        {
            "manifest_version": 1,
            "template": "{text} ->",
            "generation": {"max_new_tokens": 3},
            "stop": ["END"],
        }
    ).encode()
}
FIELDS = {"inputs": {"text": "a"}, "parameters": {"adapter_id": "hub:org/open"}}
TEMPLATE_NAME = "chat_template.jinja"
CHAT = {"messages": [{"role": "user", "content": "x"}]}


def tokenizer_of() -> Tokenizer:
    """Of bytes as the base's, with one more token."""
    tokenizer = Tokenizer.from_str(tiny_tokenizers.byte_level().tokenizer.to_str())
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def file_of() -> dict[str, bytes]:
    return {TOKENIZER_NAME: tokenizer_of().to_str().encode()}


@pytest.fixture
def world(tmp_path: Path):
    world = World(tmp_path)
    with world.hub.running():
        yield world


def prompt_of(world: World) -> str:
    return TEXT.decode(world.engine.last.prompt_ids)


# -- manifests ------------------------------------------------------------------------------------


def test_a_fetched_adapter_is_asked_by_its_manifest(world: World) -> None:
    world.hub.repos["org/open"] = Repo({**ONE, **MANIFEST})
    front = world.front()
    reply = front.post("/generate", FIELDS)
    assert (reply.status_code, reply.headers["x-template"]) == (200, "adapter")
    assert prompt_of(world) == "a ->"
    assert world.engine.last.sampling.max_new_tokens == 3
    shown = front.get("/v1/adapters/hub:org/open").json()
    assert (shown["template"], shown["stop"]) == ("{text} ->", ["END"])


def test_a_push_changes_how_it_is_asked(world: World) -> None:
    repo = world.hub.repos["org/open"] = Repo({**ONE, **MANIFEST})
    front = world.front(recheck_s=0.0)

    async def story(client: Any) -> None:
        assert (await client.post("/generate", json=FIELDS)).status_code == 200
        changed = MANIFEST[MANIFEST_NAME].replace(b"{text} ->", b"<{text}>")
        repo.files, repo.commit = {**ONE, MANIFEST_NAME: changed}, "2" * 40
        repo.older[repo.commit] = repo.files
        assert (await client.post("/generate", json=FIELDS)).status_code == 200
        assert prompt_of(world) == "<a>"

    front.run(story)


@pytest.mark.parametrize("token", [None, "bad"])
def test_how_a_private_adapter_is_asked_is_told_to_nobody_else(
    world: World, token: str | None
) -> None:
    """The wrong field is a 422 that names the right ones to who may read it."""
    world.hub.repos["org/secret"] = Repo({**TWO, **MANIFEST}, readers={"good"})
    front = world.front()
    wish = {"inputs": {"q": "a"}, "parameters": {"adapter_id": "hub:org/secret"}}

    def asked(api_token: str | None) -> Any:
        parameters = {**wish["parameters"], "api_token": api_token}
        return front.post("/generate", {**wish, "parameters": parameters})

    assert "`inputs.text` is required" in asked("good").json()["error"]
    reply = asked(token)
    assert reply.status_code == 404
    assert "text" not in reply.json()["error"].replace("'hub:org/secret'", "")


def test_who_may_read_is_asked_though_the_manner_is_known(world: World) -> None:
    world.hub.repos["org/secret"] = Repo({**TWO, **MANIFEST}, readers={"good"})
    front = world.front()

    async def story(client: Any) -> None:
        wish = lorax(adapter_id="hub:org/secret", api_token="good")
        assert (await client.post("/generate", json=wish)).status_code == 200
        wish = lorax(adapter_id="hub:org/secret")
        assert (await client.post("/generate", json=wish)).status_code == 404

    front.run(story)
    assert len(world.engine.streams) == 1


def test_an_alias_of_a_fetched_adapter_is_asked_by_its_manifest(world: World) -> None:
    world.hub.repos["org/open"] = Repo({**ONE, **MANIFEST})
    front = world.front()
    assert front.post("/v1/adapters", {"name": "s", "adapter_id": "hub:org/open"}).status_code < 300
    assert front.post("/generate", {**FIELDS, "parameters": {"adapter_id": "s"}}).status_code == 200
    assert prompt_of(world) == "a ->"


# -- tokenizers -----------------------------------------------------------------------------------


def test_a_fetched_adapters_tokenizer_makes_its_prompts(world: World) -> None:
    world.hub.repos["org/open"] = Repo({**ONE, **file_of()})
    front = world.front()
    wish = {"inputs": "a<tool>", "parameters": {"adapter_id": "hub:org/open"}}
    reply = front.post("/generate", wish)
    added = tokenizer_of().token_to_id("<tool>")
    assert "outside 0..257" in reply.json()["error"], "the base has no row for it"
    told = front.post("/tokenize", {"inputs": "a<tool>", "adapter_id": "hub:org/open"}).json()
    assert [token["id"] for token in told] == [97, added]
    assert len(front.post("/tokenize", {"inputs": "a<tool>"}).json()) == 7


def test_a_strangers_chat_template_is_not_run_and_its_prompts_are(world: World) -> None:
    """{% for i in range(10**5) %} within another is a day's work."""
    files = {**ONE, **file_of(), TEMPLATE_NAME: b"<{{ messages[0]['content'] }}>"}
    world.hub.repos["org/open"] = Repo(files)
    wish = {"model": "hub:org/open", **CHAT}
    reply = world.front().post("/v1/chat/completions", wish)
    assert reply.status_code == 400
    assert "--trust-templates" in reply.json()["error"]["message"]
    assert world.front().post("/generate", lorax(adapter_id="hub:org/open")).status_code == 200
    world.settings = {"trusted_templates": frozenset(("hub",))}
    assert world.front().post("/v1/chat/completions", wish).status_code == 200
    assert prompt_of(world) == "<x>"


def test_the_bases_chat_template_is_run_whoever_brings_it(world: World) -> None:
    files = {**ONE, **file_of(), TEMPLATE_NAME: tiny_tokenizers.TEMPLATE.encode()}
    world.hub.repos["org/open"] = Repo(files)
    wish = {"model": "hub:org/open", **CHAT}
    assert world.front().post("/v1/chat/completions", wish).status_code == 200
    assert prompt_of(world) == "<user>x\n<assistant>"


# -- uploads --------------------------------------------------------------------------------------


def test_an_upload_brings_its_tokenizer_along(world: World) -> None:
    files = {**ONE, **MANIFEST, **file_of(), "tokenizer_config.json": b'{"eos_token": "</s>"}'}
    front = world.front(allows_upload=True)
    assert send(front, "support", files).status_code == 201
    assert list(kept(world.folder).values()) == [files]
    told = front.post("/tokenize", {"inputs": "<tool>", "adapter_id": "upload:support"}).json()
    assert len(told) == 1
    assert front.post("/tokenize", {"inputs": "a", "adapter_id": "upload:x"}).status_code == 404
    wish = {**FIELDS, "parameters": {"adapter_id": "upload:support"}}
    assert front.post("/generate", wish).status_code == 200
    assert prompt_of(world) == "a ->"


def test_a_replacement_by_parts_brings_its_tokenizer_along(world: World) -> None:
    files = {**ONE, **file_of()}
    front = world.front(allows_upload=True)
    sent = [(name, (name, body)) for name, body in files.items()]
    assert front.ask("POST", "/v1/adapters/p/tensors", files=sent).status_code == 201
    assert list(kept(world.folder).values()) == [files]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({TEMPLATE_NAME: b"x"}, f"needs `{TOKENIZER_NAME}`"),
        ({TOKENIZER_NAME: b"{"}, TOKENIZER_NAME),
        ({TOKENIZER_NAME: b"[]"}, TOKENIZER_NAME),
    ],
)
def test_half_a_tokenizer_is_refused_and_nothing_is_kept(
    world: World, more: dict[str, bytes], told: str
) -> None:
    reply = send(world.front(allows_upload=True), "support", {**ONE, **more})
    assert reply.status_code == 400
    assert told in reply.json()["error"]["message"]
    assert not kept(world.folder)


# -- streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/generate_stream", "/v1/completions"])
def test_a_stream_says_that_it_is_alive_while_its_adapter_is_on_its_way(
    world: World, path: str
) -> None:
    world.hub.front.rules.insert(0, _slow_config)
    world.settings = {"first_token_header_wait_s": 0.02, "keepalive_s": 0.05}
    wish: dict[str, Any] = lorax(adapter_id="hub:org/open")
    if path != "/generate_stream":
        wish = {"model": "hub:org/open", "prompt": "a", "stream": True}
    reply = world.front().post(path, wish)
    assert reply.status_code == 200
    assert reply.text.startswith(":\n\n")
    assert reply.text.count(":\n\n") > 2
    assert ('"generated_text":"hi"' if path == "/generate_stream" else "[DONE]") in reply.text


def _slow_config(seen: Seen) -> Reply | None:
    if seen.method == "GET" and seen.path.endswith("adapter_config.json"):
        return Reply(200, {}, ONE["adapter_config.json"], delay_s=0.2)
    return None
