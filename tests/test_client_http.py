"""The SDK over HTTP: whole round trips, and streams that are left early."""

import asyncio
import gc
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import lory_client
from clients import stub_server
from lory_client import AsyncClient, Client

PROMPT = "why is the sky"
MESSAGES: list[lory_client.ChatMessage] = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def server() -> Iterator[stub_server.StubServer]:
    with stub_server.running() as running:
        yield running


@pytest.fixture
def client(server: stub_server.StubServer) -> Iterator[Client]:
    with Client(server.url, max_retries=0) as client:
        yield client


def in_async(server: stub_server.StubServer, story: Callable[[AsyncClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with AsyncClient(server.url, max_retries=0) as client:
            return await story(client)

    return asyncio.run(run())


# -- round trips ------------------------------------------------------------------------------


def test_a_generation_comes_back_whole(client: Client):
    answer = client.generate(PROMPT, "shout", max_new_tokens=5)
    assert (len(answer.tokens), answer.finish_reason) == (5, "length")
    assert answer.usage == lory_client.Usage(4, 5)
    assert answer.request_id == "req-1"
    assert client.generate(PROMPT, max_new_tokens=5).text != answer.text


def test_a_stream_says_what_the_whole_reply_says(client: Client):
    whole = client.generate(PROMPT, "shout", max_new_tokens=5)
    stream = client.generate_stream(PROMPT, "shout", max_new_tokens=5)
    assert tuple(stream) == whole.tokens
    assert stream.generation.text == whole.text
    assert (stream.generation.adapter_id, stream.request_id) == ("shout", "req-1")
    assert list(stream) == []


def test_chat_and_its_stream_agree(client: Client):
    whole = client.chat(MESSAGES, "polite", max_tokens=6, n=2, temperature=1.0, seed=3)
    stream = client.chat_stream(MESSAGES, "polite", max_tokens=6, n=2, temperature=1.0, seed=3)
    texts = {0: "", 1: ""}
    for piece in stream:
        texts[piece.index] += piece.text
    assert [c.text for c in whole.choices] == [texts[0], texts[1]]
    assert stream.completion.choices == whole.choices
    assert stream.completion.usage == whole.usage


def test_the_server_describes_itself(client: Client):
    assert client.health() is True
    assert [m.parent for m in client.models()] == [None, "stub-base", "stub-base"]
    assert client.info().model_id == "stub-base"
    assert "".join(t.text for t in client.tokenize("a bc")) == "a bc"


def test_the_async_client_says_the_same(client: Client, server: stub_server.StubServer):
    async def story(other: AsyncClient) -> list[Any]:
        stream = other.generate_stream(PROMPT, "shout")
        tokens = [token async for token in stream]
        chat = other.chat_stream(MESSAGES, "shout", max_tokens=3, temperature=0.0)
        async with chat:
            text = "".join([piece.text async for piece in chat])
        return [
            await other.generate(PROMPT, "shout"),
            tuple(tokens),
            stream.generation.text,
            await other.chat(MESSAGES, "shout", max_tokens=3, temperature=0.0),
            text,
            await other.models(),
            await other.health(),
            (await other.info()).model_id,
            await other.tokenize("a bc"),
        ]

    whole = client.generate(PROMPT, "shout")
    chat = client.chat(MESSAGES, "shout", max_tokens=3, temperature=0.0)
    assert in_async(server, story) == [
        whole,
        whole.tokens,
        whole.text,
        chat,
        chat.text,
        client.models(),
        True,
        client.info().model_id,
        client.tokenize("a bc"),
    ]


def test_concurrent_requests_get_their_own_answers(server: stub_server.StubServer):
    async def story(client: AsyncClient) -> list[str]:
        prompts = [f"prompt {i}" for i in range(12)]
        many = await asyncio.gather(*(client.generate(p, "shout") for p in prompts))
        alone = [await client.generate(p, "shout") for p in prompts]
        assert [m.text for m in many] == [a.text for a in alone]
        return [m.text for m in many]

    assert len(set(in_async(server, story))) == 12


def test_the_key_is_sent_and_never_shown():
    with stub_server.running(api_key="sesame") as server:
        with Client(server.url, api_key="sesame") as client:
            assert client.generate(PROMPT).text
            assert "sesame" not in repr(client) + repr(vars(client))
        with Client(server.url) as client, pytest.raises(lory_client.AuthenticationError):
            client.generate(PROMPT)


def test_a_path_before_the_routes_is_kept():
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(str(request.url))
        return httpx.Response(200)

    with Client("https://h.example/lory/", transport=httpx.MockTransport(answer)) as client:
        assert client.health()
    assert seen == ["https://h.example/lory/health"]


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://host", "http://", ""])
def test_a_base_url_that_cannot_work_is_refused_at_once(url: str):
    with pytest.raises(ValueError, match="base_url should be like"):
        Client(url)
    with pytest.raises(ValueError, match="base_url should be like"):
        AsyncClient(url)


def test_errors_of_the_server_come_as_their_class(client: Client):
    with pytest.raises(lory_client.AdapterNotFoundError, match="no adapter named 'x'") as caught:
        client.generate(PROMPT, "x")
    assert caught.value.code == "adapter_not_found"
    with pytest.raises(lory_client.AdapterNotFoundError):
        next(client.generate_stream(PROMPT, "x"))
    with pytest.raises(lory_client.ValidationError, match="max_new_tokens must be"):
        client.generate(PROMPT, max_new_tokens=0)
    with pytest.raises(lory_client.AdapterNotFoundError):
        client.chat(MESSAGES, "x")
    with pytest.raises(lory_client.BadRequestError, match="messages is empty"):
        client.chat([])


# -- streams left early -----------------------------------------------------------------------


LONG = 200_000


def test_a_loop_left_early_closes_the_connection(client: Client, server: stub_server.StubServer):
    server.abandoned.clear()
    for _ in client.generate_stream(PROMPT, "shout", max_new_tokens=LONG):
        break
    assert server.abandoned.wait(10)


def test_a_with_block_left_early_closes_the_connection(
    client: Client, server: stub_server.StubServer
):
    server.abandoned.clear()
    with client.generate_stream(PROMPT, "shout", max_new_tokens=LONG) as stream:
        next(stream)
    assert server.abandoned.wait(10)
    assert list(stream) == []
    with pytest.raises(lory_client.IncompleteStreamError):
        _ = stream.generation


def test_an_error_in_the_loop_closes_the_connection(client: Client, server: stub_server.StubServer):
    server.abandoned.clear()
    with (
        pytest.raises(ZeroDivisionError),
        client.generate_stream(PROMPT, max_new_tokens=LONG) as stream,
    ):
        raise ZeroDivisionError(next(stream))
    assert server.abandoned.wait(10)


def test_an_async_loop_left_early_closes_the_connection(server: stub_server.StubServer):
    async def story(client: AsyncClient) -> None:
        async for _ in client.generate_stream(PROMPT, "shout", max_new_tokens=LONG):
            break
        gc.collect()
        assert await asyncio.to_thread(server.abandoned.wait, 10)

    server.abandoned.clear()
    in_async(server, story)


def test_an_async_with_block_left_early_closes_the_connection(server: stub_server.StubServer):
    async def story(client: AsyncClient) -> None:
        async with client.generate_stream(PROMPT, "shout", max_new_tokens=LONG) as stream:
            await stream.__anext__()
        assert await asyncio.to_thread(server.abandoned.wait, 10)

    server.abandoned.clear()
    in_async(server, story)


def test_a_cancelled_task_closes_the_connection(server: stub_server.StubServer):
    async def story(client: AsyncClient) -> None:
        started = asyncio.Event()

        async def read() -> None:
            async for _ in client.generate_stream(PROMPT, max_new_tokens=LONG):
                started.set()

        task = asyncio.create_task(read())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.abandoned.wait, 10)

    server.abandoned.clear()
    in_async(server, story)


def test_a_stream_that_is_never_read_sends_nothing(client: Client, server: stub_server.StubServer):
    before = len(server.requests)
    stream = client.generate_stream(PROMPT)
    stream.close()
    with pytest.raises(lory_client.IncompleteStreamError, match="not been read"):
        _ = stream.generation
    assert len(server.requests) == before


def test_streams_read_to_their_end_reuse_one_connection(server: stub_server.StubServer):
    opened: list[Any] = []
    with Client(server.url) as client:
        for _ in range(3):
            assert list(client.generate_stream(PROMPT, max_new_tokens=3))
        opened = client._http._transport._pool.connections  # type: ignore[attr-defined]
        assert len(opened) == 1


def test_both_clients_have_the_same_methods():
    def public(kind: type) -> set[str]:
        return {name.replace("aclose", "close") for name in vars(kind) if name[0] != "_"}

    assert public(Client) == public(AsyncClient)
    for name in ("generate", "generate_stream", "chat", "chat_stream", "tokenize"):
        ours, theirs = getattr(Client, name), getattr(AsyncClient, name)
        assert ours.__kwdefaults__ == theirs.__kwdefaults__
        assert ours.__code__.co_varnames[:4] == theirs.__code__.co_varnames[:4]


def test_the_round_trip_script_for_other_pythons_passes_on_this_one():
    script = Path(__file__).parent / "clients" / "sdk_script.py"
    packages = str(Path(lory_client.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        env={**os.environ, "PYTHONPATH": packages},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
