"""The SDK when things go wrong: retries, replies that break, servers that are silent or gone."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest

import lory_client
from lory_client import AsyncClient, Client

PROMPT = "why is the sky"

# -- retries ----------------------------------------------------------------------------------


class Script:
    """Answers from a list, in order, and keeps count; the last answer repeats."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.num_calls = 0
        self.slept_s: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.num_calls += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, httpx.TransportError):
            answer.request = request
        if isinstance(answer, Exception):
            raise answer
        return answer

    def client(self, **options: Any) -> Client:
        transport = httpx.MockTransport(self)
        return Client("http://h.example", transport=transport, sleep=self.slept_s.append, **options)

    def run_async(self, story: Callable[[AsyncClient], Awaitable[Any]]) -> Any:
        async def sleep(seconds: float) -> None:
            self.slept_s.append(seconds)

        async def run() -> Any:
            transport = httpx.MockTransport(self)
            async with AsyncClient("http://h.example", transport=transport, sleep=sleep) as client:
                return await story(client)

        return asyncio.run(run())


def text_reply(text: str = " ok") -> httpx.Response:
    return httpx.Response(200, json={"generated_text": text})


def refusal(status: int, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    body = {"error": "Model is overloaded", "error_type": "overloaded"}
    return httpx.Response(status, json=body, headers=named)


def test_an_overloaded_server_is_asked_again():
    script = Script(refusal(429), refusal(503), text_reply())
    with script.client() as client:
        assert client.generate(PROMPT).text == " ok"
    assert script.num_calls == 3
    first_s, second_s = script.slept_s
    assert 0.25 <= first_s <= 0.5 <= second_s <= 1.0


def test_the_async_client_asks_again_too():
    script = Script(refusal(429, retry_after="3"), text_reply())
    assert script.run_async(lambda client: client.generate(PROMPT)).text == " ok"
    (slept_s,) = script.slept_s
    assert 3.0 <= slept_s <= 3.125


def test_retries_end_and_the_last_error_is_raised():
    script = Script(refusal(429, retry_after="1"))
    with (
        script.client(max_retries=3) as client,
        pytest.raises(lory_client.OverloadedError, match="Model is overloaded") as caught,
    ):
        client.generate(PROMPT)
    assert (script.num_calls, caught.value.retry_after_s) == (4, 1.0)


def test_a_stream_is_asked_for_again_before_its_first_byte():
    events = b'data:{"token":null,"generated_text":"","details":null}\n\n'
    headers = {"content-type": "text/event-stream"}
    script = Script(refusal(503), httpx.Response(200, content=events, headers=headers))
    with script.client() as client:
        stream = client.generate_stream(PROMPT)
        assert list(stream) == []
    assert (stream.generation.text, script.num_calls) == ("", 2)


@pytest.mark.parametrize(
    "error_type", [httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout]
)
def test_a_connection_that_was_not_made_is_tried_again(error_type: type[httpx.TransportError]):
    script = Script(error_type("no route"), text_reply())
    with script.client() as client:
        assert client.generate(PROMPT).text == " ok"
    assert script.num_calls == 2


@pytest.mark.parametrize(
    ("error_type", "wanted"),
    [
        (httpx.ReadTimeout, lory_client.ReplyTimeoutError),
        (httpx.ReadError, lory_client.ConnectionFailedError),
        (httpx.RemoteProtocolError, lory_client.ConnectionFailedError),
    ],
)
def test_a_request_that_may_have_been_served_is_not_sent_twice(
    error_type: type[httpx.TransportError], wanted: type[Exception]
):
    script = Script(error_type("broken"), text_reply())
    with script.client() as client, pytest.raises(wanted, match=r"h\.example"):
        client.generate(PROMPT)
    assert script.num_calls == 1


@pytest.mark.parametrize("status", [400, 401, 404, 422, 424, 500, 504])
def test_other_errors_are_not_tried_again(status: int):
    script = Script(refusal(status), text_reply())
    with script.client() as client, pytest.raises(lory_client.StatusError):
        client.generate(PROMPT)
    assert (script.num_calls, script.slept_s) == (1, [])


def test_health_is_one_question():
    script = Script(refusal(503, retry_after="5"))
    with script.client() as client:
        assert client.health() is False
    assert (script.num_calls, script.slept_s) == (1, [])
    assert Script(refusal(503)).run_async(lambda client: client.health()) is False


# -- replies that break -----------------------------------------------------------------------


class BrokenBody(httpx.SyncByteStream, httpx.AsyncByteStream):
    """Some bytes, then an error; `closed` tells whether the reply was let go."""

    def __init__(self, data: bytes, error: Exception | None) -> None:
        self.data = data
        self.error = error
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        yield self.data
        if self.error:
            raise self.error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self:
            yield chunk

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


def event(text: str, whole: str | None = None) -> bytes:
    token = {"id": 1, "text": text, "logprob": -1.0, "special": False}
    data = {"token": token, "generated_text": whole, "details": None}
    return f"data:{json.dumps(data)}\n\n".encode()


def streamed(body: BrokenBody) -> Script:
    return Script(httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=body))


def collected(client: Client, into: list[str]) -> None:
    for token in client.generate_stream(PROMPT):
        into.append(token.text)


@pytest.mark.parametrize(
    ("data", "error", "wanted"),
    [
        (event(" a"), None, lory_client.IncompleteStreamError),
        (event(" a"), httpx.ReadError("reset"), lory_client.IncompleteStreamError),
        (event(" a"), httpx.RemoteProtocolError("cut"), lory_client.IncompleteStreamError),
        (event(" a"), httpx.ReadTimeout("late"), lory_client.ReplyTimeoutError),
        (event(" a") + b"data: {\n\n", None, lory_client.ProtocolError),
        (
            event(" a") + b'data:{"error":"boom","error_type":"generation"}\n\n',
            None,
            lory_client.GenerationError,
        ),
    ],
)
def test_a_stream_that_breaks_gives_its_tokens_then_the_error_and_is_not_repeated(
    data: bytes, error: httpx.TransportError | None, wanted: type[Exception]
):
    if error:
        error.request = httpx.Request("POST", "http://h.example")
    body = BrokenBody(data, error)
    script = streamed(body)
    texts: list[str] = []
    with script.client() as client, pytest.raises(wanted):
        collected(client, texts)
    assert (texts, script.num_calls, script.slept_s) == ([" a"], 1, [])
    assert body.closed


@pytest.mark.parametrize(
    ("tail", "wanted"),
    [
        (b"", lory_client.IncompleteStreamError),
        (b'data:{"error":"boom","error_type":"generation"}\n\n', lory_client.GenerationError),
    ],
)
def test_an_async_stream_that_breaks_is_let_go(tail: bytes, wanted: type[Exception]):
    body = BrokenBody(event(" a") + tail, None)
    texts: list[str] = []

    async def story(client: AsyncClient) -> None:
        async for token in client.generate_stream(PROMPT):
            texts.append(token.text)

    with pytest.raises(wanted):
        streamed(body).run_async(story)
    assert (texts, body.closed) == ([" a"], True)


@pytest.mark.parametrize("status", [200, 500])
def test_a_whole_reply_that_breaks_is_let_go(status: int):
    def broken() -> tuple[BrokenBody, Script]:
        error = httpx.ReadError("reset", request=httpx.Request("POST", "http://h.example"))
        body = BrokenBody(b"{", error)
        return body, Script(httpx.Response(status, stream=body))

    body, script = broken()
    with script.client() as client, pytest.raises(lory_client.ConnectionFailedError):
        client.generate(PROMPT)
    assert (body.closed, script.num_calls) == (True, 1)
    body, script = broken()
    with pytest.raises(lory_client.ConnectionFailedError):
        script.run_async(lambda client: client.generate(PROMPT))
    assert (body.closed, script.num_calls) == (True, 1)


def test_an_async_with_block_lets_the_reply_go_before_it_is_left():
    body = BrokenBody(event(" a") + event(" b"), None)

    async def story(client: AsyncClient) -> bool:
        async with client.generate_stream(PROMPT) as stream:
            await stream.__anext__()
        return body.closed

    assert streamed(body).run_async(story)


def test_a_break_behind_the_final_event_does_not_spoil_the_answer():
    error = httpx.ReadError("reset", request=httpx.Request("POST", "http://h.example"))
    with streamed(BrokenBody(event(" a", " a"), error)).client() as client:
        stream = client.generate_stream(PROMPT)
        assert [t.text for t in stream] == [" a"]
        assert stream.generation.text == " a"


def test_a_web_page_instead_of_a_stream_says_so():
    page = httpx.Response(200, html="<h1>hello</h1>", headers={"x-request-id": "r5"})
    with Script(page).client() as client:
        with pytest.raises(lory_client.ProtocolError, match="is this a Lory server") as caught:
            next(client.generate_stream(PROMPT))
        assert caught.value.request_id == "r5"
        with pytest.raises(lory_client.ProtocolError, match="is this a Lory server") as caught:
            client.generate(PROMPT)
        assert (caught.value.request_id, caught.value.status) == ("r5", 200)


def test_a_broken_encoding_is_a_protocol_error():
    reply = httpx.Response(200, content=iter([b"not gzip"]), headers={"content-encoding": "gzip"})
    with Script(reply).client() as client, pytest.raises(lory_client.ProtocolError):
        client.generate(PROMPT)


# -- sockets ----------------------------------------------------------------------------------


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_server_that_is_silent_is_given_up_in_time(silent_port: int):
    with Client(f"http://127.0.0.1:{silent_port}", timeout=0.2) as client:
        began = time.monotonic()
        with pytest.raises(lory_client.ReplyTimeoutError, match=f"no reply from .*{silent_port}"):
            client.generate(PROMPT)
        with pytest.raises(lory_client.ReplyTimeoutError):
            client.generate(PROMPT, timeout=0.1)
        assert time.monotonic() - began < 5


def test_no_server_is_a_connection_error_after_the_retries():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    slept_s: list[float] = []
    with Client(f"http://127.0.0.1:{port}", sleep=slept_s.append) as client:
        with pytest.raises(lory_client.ConnectionFailedError, match=f"no reply from .*:{port}"):
            client.generate(PROMPT)
        assert len(slept_s) == 2
        with pytest.raises(lory_client.ConnectionFailedError):
            client.health()


def raw_server(*pieces: bytes) -> tuple[socket.socket, threading.Thread]:
    """Serves one connection with exactly these bytes, each a packet of its own."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(0.001)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return listener, thread


def test_a_stream_in_single_bytes_is_read_whole():
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
    text = "caf\u00e9 \U0001f600"
    stream = b": hi\r\n\r\n" + event(text, text).replace(b"\n", b"\r\n")
    listener, thread = raw_server(head, *[stream[i : i + 1] for i in range(len(stream))])
    with listener, Client(f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
        assert [t.text for t in client.generate_stream(PROMPT)] == [text]
        thread.join(5)


def test_a_server_that_dies_in_mid_stream_leaves_an_incomplete_stream():
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 9999\r\n\r\n"
    listener, thread = raw_server(head + event(" a"))
    texts: list[str] = []
    with listener, Client(f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
        with pytest.raises(lory_client.IncompleteStreamError, match="broke off"):
            collected(client, texts)
        thread.join(5)
    assert texts == [" a"]
