"""The SDK's `adapters` and `lory adapters`, against the routes themselves."""

import asyncio
import inspect
import json
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from lory_client import (
    Adapter,
    AdapterNotFoundError,
    Adapters,
    AsyncAdapters,
    AsyncClient,
    BadRequestError,
    Client,
    ConflictError,
    MatchedModules,
    adapter_calls,
)
from lory_router.cli import app
from lory_router.sources.multipart import MultipartReader, Part, boundary_of
from scripted_engine import REVISION, Front


@pytest.fixture
def url() -> Iterator[str]:
    with Front().served() as url:
        yield url


@pytest.fixture
def adapters(url: str) -> Iterator[Adapters]:
    with Client(url, max_retries=0) as client:
        yield client.adapters


def test_an_adapter_comes_back_with_all_that_is_known(adapters: Adapters) -> None:
    before = {adapter.id: adapter for adapter in adapters.list()}
    assert list(before) == ["french", "org/german"]
    assert (before["french"].state, before["french"].revision) == ("disk", None)
    adapter = adapters.pin("french")
    assert (adapter.state, adapter.revision, adapter.pinned) == ("device", REVISION, True)
    assert adapter.matched == {"q_proj": MatchedModules(2, (4, 8))}
    assert adapter.invocation_tokens == adapter.revisions[0].invocation_tokens == (7, 8)
    assert (adapter.disk_bytes, adapter.host_bytes, adapter.device_bytes) == (300, 200, 100)
    assert [one.revision for one in adapter.revisions] == [REVISION]
    assert adapters.get("french").pinned


def test_the_life_of_an_adapter(adapters: Adapters) -> None:
    assert adapters.load("org/german").state == "device"
    assert adapters.register("org/german@prod").names == {"org/german@prod": REVISION}
    assert adapters.register("help", "org/german").names["help"] is None
    assert adapters.get("org/german@prod").id == "org/german"
    adapters.pin("help")
    with pytest.raises(ConflictError, match="pinned"):
        adapters.unload("help")
    assert not adapters.unpin("help").pinned
    assert adapters.unload("help").state == "disk"
    adapters.delete("help")
    adapters.delete("org/german")
    with pytest.raises(AdapterNotFoundError):
        adapters.get("org/german")
    assert adapters.register("org/german").id == "org/german"


def test_what_cannot_be_is_an_error_of_its_own(adapters: Adapters) -> None:
    with pytest.raises(BadRequestError, match="is no name"):
        adapters.register("a b", "french")
    with pytest.raises(AdapterNotFoundError, match="alias"):
        adapters.get("french@prod")
    with pytest.raises(ValueError, match="a path"):
        adapters.get("../models")
    for hostile in ("french?x=1", "french#"):
        with pytest.raises(AdapterNotFoundError):
            adapters.get(hostile)
    with pytest.raises(ValueError, match="name an adapter"):
        adapters.delete("")


def test_an_answer_tells_its_revision(url: str) -> None:
    with Client(url) as client:
        for details in (True, False):
            answer = client.generate("a", "french", details=details, max_new_tokens=2)
            assert answer.adapter_revision == REVISION
        stream = client.generate_stream("a", "french", max_new_tokens=2)
        assert list(stream)
        assert stream.generation.adapter_revision == REVISION
        assert client.generate("a", max_new_tokens=2).adapter_revision is None


def test_what_is_sent_of_an_adapter_is_whole() -> None:
    weights, config = b"\x00\r\n--weights", {"r": 4}
    further = {"tokenizer.json": b"{}"}
    sent = [
        adapter_calls.upload("team/a", weights, config, None, None),
        adapter_calls.upload("a", weights, json.dumps(config), None, "acme"),
        adapter_calls.replace("a", weights, json.dumps(config).encode(), further, "a/b"),
    ]
    assert [(call.method, call.path) for call in sent] == [
        ("PUT", "/v1/adapters/team/a/files"),
        ("PUT", "/v1/adapters/a/files?owner=acme"),
        ("POST", "/v1/adapters/a/tensors?owner=a%2Fb"),
    ]
    for call in sent:
        boundary = boundary_of(call.content_type)
        assert boundary is not None
        reader, parts = MultipartReader(boundary), dict[str, bytes]()
        for event in reader.feed(call.body or b""):
            if isinstance(event, Part):
                parts[event.name] = b""
            else:
                parts[[*parts][-1]] += event
        assert reader.is_whole
        assert parts == {
            "adapter_config.json": b'{"r": 4}',
            "adapter_model.safetensors": weights,
            **(further if "/tensors" in call.path else {}),
        }
    raw = adapter_calls.replace("a", weights, None, None, None)
    assert (raw.body, raw.content_type) == (weights, "application/octet-stream")
    with pytest.raises(ValueError, match="give `config`"):
        adapter_calls.replace("a", weights, None, further, None)


def test_a_text_is_cut_as_an_adapters_own_tokenizer_cuts_it(url: str) -> None:
    with Client(url) as client:
        assert client.tokenize("ab", adapter_id="french") == client.tokenize("ab")
        with pytest.raises(AdapterNotFoundError):
            client.tokenize("ab", adapter_id="none")


def test_owners_and_tokens_go_along(url: str) -> None:
    with Client(url) as client:
        adapter = client.adapters.register("help", "french", owner="acme")
        assert "help" in adapter.names
        with pytest.raises(BadRequestError, match="api_token"):
            client.adapters.register("other", "french", api_token="x")
        for deed in (client.adapters.load, client.adapters.pin):
            with pytest.raises(BadRequestError, match="api_token"):
                deed("french", api_token="x")


def test_async_calls_do_the_same(url: str) -> None:
    async def story() -> list[Adapter | tuple[Adapter, ...] | None]:
        async with AsyncClient(url, max_retries=0) as client:
            adapters = client.adapters
            return [
                await adapters.pin("french"),
                await adapters.unpin("french"),
                await adapters.load("french"),
                await adapters.register("french@prod", "french", REVISION[:8]),
                await adapters.get("french@prod"),
                await adapters.unload("french"),
                await adapters.delete("french"),
                await adapters.list(),
            ]

    replies: list[Any] = asyncio.run(story())
    assert [reply.state for reply in replies[:6]] == [*["device"] * 5, "disk"]
    assert [adapter.id for adapter in replies[-1]] == ["org/german"]


def test_both_clients_have_the_same_calls() -> None:
    def calls(kind: type) -> dict[str, list[str]]:
        found = inspect.getmembers(kind, inspect.isfunction)
        return {name: list(inspect.signature(call).parameters) for name, call in found}

    assert {**calls(Adapters), "__init__": []} == {**calls(AsyncAdapters), "__init__": []}


# -- the command line -----------------------------------------------------------------------


def invoke(url: str, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["adapters", *arguments, "--url", url])
    return result.exit_code, result.output + str(result.exception or "")


def test_the_command_does_and_tells(url: str) -> None:
    code, output = invoke(url, "pin", "french")
    assert code == 0
    assert "device, pinned" in output
    assert "2 x q_proj (rank 4/8)" in output
    assert "acts from tokens 7 8\n" in output
    assert REVISION in output
    code, output = invoke(url, "register", "help@prod", "--adapter", "french", "--json")
    assert json.loads(output)["names"] == {"help@prod": REVISION}
    assert "help@prod" in invoke(url, "show", "french")[1]
    assert "help@prod" in invoke(url, "list", "fren*")[1]
    assert "no adapters" in invoke(url, "list", "french?")[1]
    for deed, state in (("unpin", "device"), ("unload", "disk"), ("load", "device")):
        assert f"state     {state}\n" in invoke(url, deed, "french")[1]
    assert "not served any more; no file was touched" in invoke(url, "delete", "french")[1]
    code, output = invoke(url, "show", "french")
    assert code == 1
    assert "No adapter named" in output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["pin"], "needs the name"),
        (["pin", "french", "--revision", "abcdef"], "are for register"),
        (["polish", "french"], "polish"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused(arguments: list[str], says: str) -> None:
    code, output = invoke("http://127.0.0.1:9", *arguments)
    assert code != 0
    assert says in output
