"""The front as a server: hostile bodies, keys, overload, deadlines, clients that leave or stall."""

import asyncio
import itertools
import json
import socket
import time
from typing import Any

import httpx
import pytest

from lory_router.engine import Unavailable
from lory_router.settings import RouterSettings
from scripted_engine import BASE, Answer, Front, ScriptedEngine, events, wait_until

GENERATE = {"inputs": "ab"}
COMPLETION = {"model": BASE, "prompt": "ab"}
POSTS = ("/", "/invocations", "/generate", "/generate_stream", "/tokenize", "/v1/completions")
ENDLESS = Answer(b"x", repeats=True, ends=False, delay_s=0.01, hangs=True)


def error_of(response: httpx.Response) -> str:
    """The message of an error body, whose shape is checked on the way."""
    assert response.headers["content-type"] == "application/json"
    reply = response.json()
    if response.request.url.path.startswith("/v1"):
        assert set(reply) == {"error"}
        assert set(reply["error"]) == {"message", "type", "param", "code"}
        return reply["error"]["message"]
    assert set(reply) == {"error", "error_type"}
    return reply["error"]


# -- bodies ---------------------------------------------------------------------------------

BAD_JSON = [
    b"",
    b"{",
    b'{"inputs": "a"',
    b"\xff\xfe",
    b'{"inputs": "\xe4"}',
    b'{"inputs": NaN}',
    b'{"inputs": "a", "parameters": {"temperature": NaN}}',
    b'{"inputs": "a", "parameters": {"temperature": Infinity}}',
    b'{"inputs": "a", "parameters": {"temperature": 1e400}}',
    b'{"inputs": "\\ud800 alone"}',
    b'{"inputs": "a\x00b"}',
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"1" * 10_000,
    b'{"inputs": "a"} trailing',
]


@pytest.mark.parametrize("path", ["/generate", "/", "/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("body", BAD_JSON, ids=lambda body: repr(body[:30]))
def test_what_is_not_json_is_refused_as_json(path: str, body: bytes):
    front = Front()
    response = front.ask("POST", path, content=body)
    assert response.status_code in (400, 422)
    assert response.status_code == 400 or body == b"1" * 10_000
    assert error_of(response)
    assert not front.engine.streams


def test_of_duplicate_keys_the_last_counts():
    front = Front()
    front.ask("POST", "/generate", content=b'{"inputs": "a", "inputs": "bc"}')
    assert bytes(front.engine.last.prompt_ids) == b"bc"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded"])
def test_other_media_types_are_refused(kind: str):
    response = Front().ask("POST", "/generate", content=b"{}", headers={"content-type": kind})
    assert response.status_code == 415
    assert "application/json" in error_of(response)


def test_compressed_bodies_are_refused():
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    assert Front().ask("POST", "/generate", content=b"x", headers=headers).status_code == 415


@pytest.mark.parametrize("path", POSTS)
def test_a_body_over_the_limit_is_refused_unread_however_it_is_sent(path: str):
    front = Front(max_body_bytes=1000)
    big = json.dumps({"inputs": "a" * 2000}).encode()

    async def chunked():
        for start in range(0, len(big), 100):
            yield big[start : start + 100]

    for content in (big, chunked()):
        response = front.ask("POST", path, content=content)
        assert response.status_code == 413
        assert "1000 bytes" in error_of(response)
    assert not front.engine.streams


def test_a_body_that_never_ends_is_read_no_further_than_the_discard_limit():
    front, num_sent = Front(max_body_bytes=1000), 0

    async def endless():
        nonlocal num_sent
        while True:
            num_sent += 1
            yield b"a" * 100

    assert front.ask("POST", "/generate", content=endless()).status_code == 413
    assert num_sent < 200


def test_a_declared_length_far_over_the_limit_is_refused_at_once():
    with Front(max_body_bytes=1000).served() as url, _connection(url) as wire:
        wire.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n")
        assert wire.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_sender_of_ten_megabytes_sees_the_413():
    with Front().served() as url:
        response = httpx.post(f"{url}/generate", content=b"a" * 10_000_000)
        assert response.status_code == 413


def test_who_closes_after_the_reply_sees_the_413_too():
    """Its connection is closed with the reply: with bytes on their way that is a reset."""
    with Front(max_body_bytes=1_000_000).served() as url, _connection(url) as wire:
        head = "POST /generate HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        wire.sendall(f"{head}content-length: 10000000\r\n\r\n".encode())
        for _ in range(10):
            wire.sendall(b"a" * 1_000_000)
            time.sleep(0.02)
        assert wire.recv(4096).startswith(b"HTTP/1.1 413")


def test_the_413_of_a_body_that_has_arrived_is_not_held_back():
    """What was left of it was awaited for two seconds although nothing was."""
    start = time.perf_counter()
    with Front(max_body_bytes=1000).served() as url:
        assert httpx.post(f"{url}/generate", content=b"a" * 1001).status_code == 413
    assert time.perf_counter() - start < 1.5


def test_open_bodies_are_bounded_together_and_small_ones_always_fit():
    front = Front(max_body_bytes=200_000, max_held_body_bytes=200_000)
    large = json.dumps({"inputs": "ab"}).encode().ljust(180_000)
    with front.served() as url, _connection(url) as wire:
        head = f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: {len(large)}\r\n\r\n"
        wire.sendall(head.encode() + large[:-1])
        time.sleep(0.2)
        refused = httpx.post(f"{url}/generate", content=large)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
        assert "large bodies" in error_of(refused)
        assert httpx.post(f"{url}/generate", json=GENERATE).status_code == 200
        wire.sendall(large[-1:])
        assert wire.recv(4096).startswith(b"HTTP/1.1 200")
        assert httpx.post(f"{url}/generate", content=large).status_code == 200


def test_a_body_that_dribbles_is_timed_out():
    with Front(body_timeout_s=0.1).served() as url, _connection(url) as wire:
        wire.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        assert wire.recv(4096).startswith(b"HTTP/1.1 408")


def test_a_long_prompt_does_not_stall_the_others():
    """Tokenising runs in a thread; the event loop goes on."""
    front = Front(max_body_bytes=8_000_000)

    async def work(client):
        long = asyncio.ensure_future(client.post("/tokenize", json={"inputs": "a b " * 30_000}))
        await asyncio.sleep(0.01)
        start = time.perf_counter()
        health = await client.get("/health")
        return health.status_code, time.perf_counter() - start, (await long).status_code

    status, seconds, long_status = front.run(work)
    assert (status, long_status) == (200, 200)
    assert seconds < 2.0


# -- paths and keys -------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/nothing", "/v1/nothing", "/v1", "/generate/", "/docs"])
def test_unknown_paths_are_404_in_the_dialect_of_their_prefix(path: str):
    response = Front().get(path)
    assert response.status_code == 404
    assert error_of(response).startswith(f"No such path: '{path}'")


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/tokenize"])
def test_other_methods_are_405(path: str):
    response = Front().get(path)
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert error_of(response)


EVERY_ROUTE = [
    *[("POST", path) for path in (*POSTS, "/v1/chat/completions")],
    *[("GET", p) for p in ("/", "/info", "/metrics", "/v1/models", "/v1/models/x", "/nothing")],
]


@pytest.mark.parametrize(("method", "path"), EVERY_ROUTE)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer "},
        {"authorization": "Basic a2V5"},
        {"authorization": "key"},
        {"host": "x/health?", "authorization": "Bearer nope"},
        {"authorization": "Bearer \u00e9"},
    ],
)
def test_with_keys_every_route_asks_for_one(method: str, path: str, headers: dict[str, str]):
    front = Front(api_keys=("key", "other"))
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    response = front.ask(method, path, headers=raw)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert "key" in error_of(response)
    assert not front.ledger.started


@pytest.mark.parametrize("key", ["key", "other"])
def test_a_valid_key_opens_every_route(key: str):
    front = Front(api_keys=("key", "other"))
    headers = {"authorization": f"Bearer {key}"}
    assert front.post("/generate", GENERATE, headers=headers).status_code == 200
    assert front.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ping"])
def test_probes_need_no_key(path: str):
    assert Front(api_keys=("key",)).get(path).status_code == 200


EVERY_REPLY = [
    *EVERY_ROUTE,
    *[("GET", path) for path in ("/health", "/ping", "/v1/nothing", "/generate")],
]


@pytest.mark.parametrize(("method", "path"), EVERY_REPLY)
def test_every_reply_names_its_request(method: str, path: str):
    for keys in ((), ("key",)):
        front = Front(api_keys=keys)
        own = [front.ask(method, path).headers["x-request-id"] for _ in range(2)]
        assert len(own[0]) == 32
        assert own[0] != own[1]
        given = front.ask(method, path, headers={"x-request-id": "trace-1:a_b.C"})
        assert given.headers.get_list("x-request-id") == ["trace-1:a_b.C"]


@pytest.mark.parametrize("given", ["", "a b", "a" * 129, "a\u00e9", "<script>"])
def test_a_request_id_that_a_log_should_not_hold_is_not_taken_over(given: str):
    headers = [(b"x-request-id", given.encode("latin-1"))]
    assert len(Front().get("/health", headers=headers).headers["x-request-id"]) == 32


def test_a_request_is_called_in_its_body_as_in_its_header():
    reply = Front().post("/v1/completions", COMPLETION, headers={"x-request-id": "mine"})
    assert reply.json()["id"] == "cmpl-mine"


# -- the list of models ---------------------------------------------------------------------


def test_adapters_are_listed_once_for_all_who_ask_within_a_while(monkeypatch):
    monkeypatch.setattr("lory_router.listing.LISTING_S", 0.5)
    front, num_asked = Front(), 0
    listed = front.engine.list_adapters

    async def counted():
        nonlocal num_asked
        num_asked += 1
        await asyncio.sleep(0.05)
        return await listed()

    front.engine.list_adapters = counted  # type: ignore[method-assign]

    async def work(client):
        leaver = asyncio.ensure_future(client.get("/v1/models"))
        await asyncio.sleep(0.01)
        leaver.cancel()
        replies = await asyncio.gather(*(client.get("/v1/models") for _ in range(20)))
        replies.append(await client.get("/v1/models/french"))
        return [reply.status_code for reply in replies]

    assert set(front.run(work)) == {200}
    assert num_asked == 1
    time.sleep(0.6)
    front.get("/v1/models")
    assert num_asked == 2


def test_a_failed_listing_is_not_kept():
    front = Front()
    front.engine.down = Unavailable("down", "the engine restarts")
    assert front.get("/v1/models").status_code == 503
    front.engine.down = None
    assert front.get("/v1/models").status_code == 200


# -- states of the engine -------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/health", "/ping"])
def test_health_is_200_and_empty_only_while_requests_would_be_taken(path: str):
    front = Front()
    response = front.get(path)
    assert (response.status_code, response.content) == (200, b"")
    front.engine.ready = False
    response = front.get(path)
    assert response.status_code == 503
    assert response.json() == {"error": "unhealthy", "error_type": "healthcheck"}
    front.engine.ready, front.engine.draining = True, True
    assert front.get(path).status_code == 503


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/", "/v1/completions"])
def test_a_draining_server_refuses_new_requests(path: str):
    front = Front()
    front.engine.draining = True
    response = front.post(path, COMPLETION if path.startswith("/v1") else GENERATE)
    assert response.status_code == 503
    assert 1 <= int(response.headers["retry-after"]) <= 120
    assert "shutting down" in error_of(response)


def test_draining_lets_running_requests_finish():
    front = Front(Answer(b"ab", delay_s=0.05))

    async def work(client):
        running = asyncio.ensure_future(client.post("/generate", json=GENERATE))
        await asyncio.sleep(0.02)
        front.engine.draining = True
        refused = await client.post("/generate", json=GENERATE)
        return refused, await running

    refused, finished = front.run(work)
    assert (refused.status_code, finished.status_code) == (503, 200)
    assert finished.json() == {"generated_text": "ab"}


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/completions", "/info"])
def test_a_base_that_is_still_loading_is_503(path: str):
    front = Front(engine=ScriptedEngine(info=None))
    body = COMPLETION if path.startswith("/v1") else GENERATE
    response = front.get(path) if path == "/info" else front.post(path, body)
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert "loading" in error_of(response)


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/completions", "/v1/models"])
def test_an_engine_that_is_down_is_503_streamed_or_not(path: str):
    front = Front()
    front.engine.down = Unavailable("down", "the engine restarts", 7)
    body = COMPLETION if path.startswith("/v1") else GENERATE
    response = front.get(path) if path == "/v1/models" else front.post(path, body)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "7"
    assert error_of(response) == "the engine restarts"


def test_requests_over_the_limit_are_refused_at_once_and_room_is_given_back():
    front = Front(Answer(b"a", delay_s=0.1), max_concurrent_requests=2)

    async def work(client):
        posts = (client.post("/generate", json=GENERATE) for _ in range(5))
        return await asyncio.gather(*posts), await client.post("/generate", json=GENERATE)

    responses, later = front.run(work)
    assert sorted(r.status_code for r in responses) == [200, 200, 429, 429, 429]
    refused = next(r for r in responses if r.status_code == 429)
    assert refused.json() == {"error": "Model is overloaded", "error_type": "overloaded"}
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    assert later.status_code == 200


# -- deadlines ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_a_request_past_its_deadline_is_504_and_cancelled_as_timed_out(path: str):
    front = Front(Answer(b"", ends=False, hangs=True), request_timeout_s=0.05)
    response = front.post(path, COMPLETION if path.startswith("/v1") else GENERATE)
    assert response.status_code == 504
    assert "deadline" in error_of(response)
    assert front.engine.streams[0].cancels[0] == "timeout"
    assert front.ledger.records[0].outcome == "timeout"


def test_a_stream_past_its_deadline_ends_in_an_error_event():
    front = Front(Answer(b"ab", ends=False, hangs=True), request_timeout_s=0.05)
    found = [json.loads(event) for event in events(front.post("/generate_stream", GENERATE))]
    assert [event["token"]["text"] for event in found[:-1]] == ["a", "b"]
    assert found[-1]["error_type"] == "timeout"


def test_an_error_event_ends_an_openai_stream_without_done():
    front = Front(Answer(b"ab", ends=False, hangs=True), request_timeout_s=0.05)
    found = events(front.post("/v1/completions", {**COMPLETION, "stream": True}))
    assert json.loads(found[-1])["error"]["code"] == "timeout"
    assert "[DONE]" not in found


def test_our_own_bug_is_500_without_its_details():
    front = Front()

    async def broken(request: Any) -> Any:
        raise RuntimeError("canary")

    front.engine.submit = broken
    for path, body in (("/generate", GENERATE), ("/v1/completions", COMPLETION)):
        response = front.post(path, body)
        assert response.status_code == 500
        assert "canary" not in error_of(response)
    assert front.ledger.records[0].outcome == "error"


# -- streams on a real socket ---------------------------------------------------------------


def test_tokens_arrive_one_by_one_while_they_are_generated():
    front = Front(Answer(b"abc", delay_s=0.1))
    with front.served() as url, httpx.stream("POST", f"{url}/generate_stream", json=GENERATE) as r:
        times = [time.perf_counter() for line in r.iter_lines() if line]
    assert len(times) == 4
    assert all(later - earlier > 0.05 for earlier, later in itertools.pairwise(times))


def test_headers_do_not_wait_for_ever_and_silence_is_filled_with_comments():
    answer = Answer(b"a", first_delay_s=0.4)
    front = Front(answer, first_token_header_wait_s=0.05, keepalive_s=0.1)
    with front.served() as url:
        start = time.perf_counter()
        with httpx.stream("POST", f"{url}/generate_stream", json=GENERATE) as response:
            headers_after = time.perf_counter() - start
            text = response.read().decode()
    assert headers_after < 0.3
    assert text.startswith(":\n\n:\n\n")
    assert json.loads(text.split("data:")[-1])["generated_text"] == "a"


def test_an_error_after_early_headers_is_an_event():
    late = Answer(b"", ends=False, fails="adapter_not_found", first_delay_s=0.1)
    front = Front(late, first_token_header_wait_s=0.01)
    response = front.post("/generate_stream", GENERATE)
    assert response.status_code == 200
    assert json.loads(events(response)[-1])["error_type"] == "adapter_not_found"


@pytest.mark.parametrize("path", ["/generate", "/", "/generate_stream", "/v1/completions"])
@pytest.mark.parametrize("answer", [ENDLESS, Answer(b"", ends=False, hangs=True)])
def test_a_client_that_leaves_is_noticed_streamed_or_not_queued_or_running(path, answer):
    front = Front(answer, first_token_header_wait_s=0.01)
    body = COMPLETION if path.startswith("/v1") else GENERATE
    with front.served() as url:
        with _connection(url) as wire:
            wire.sendall(_raw_post(path, body))
            wait_until(lambda: bool(front.engine.streams))
        wait_until(lambda: bool(front.engine.streams[0].cancels))
        wait_until(lambda: bool(front.ledger.records))
    assert front.ledger.records[0].outcome == "cancelled"
    assert len(front.ledger.records) == len(front.ledger.started) == 1


def test_a_client_that_leaves_frees_its_place():
    front = Front(ENDLESS, max_concurrent_requests=1)
    with front.served() as url:
        for _ in range(3):
            with _connection(url) as wire:
                wire.sendall(_raw_post("/generate_stream", GENERATE))
                assert b"200" in wire.recv(1024)
            wait_until(lambda: bool(front.engine.streams[-1].cancels))
            num = len(front.engine.streams)
            wait_until(lambda num=num: len(front.ledger.records) == num)


def test_two_requests_on_one_connection_are_answered_in_order():
    front = Front(Answer(b"a"), Answer(b"b"))
    with front.served() as url, httpx.Client() as client:
        texts = [client.post(f"{url}/generate", json=GENERATE).json() for _ in range(2)]
    assert [reply["generated_text"] for reply in texts] == ["a", "b"]


# -- records --------------------------------------------------------------------------------


def test_a_served_request_is_recorded_once_with_its_figures():
    front = Front(Answer(b"hi", delay_s=0.01))
    front.post("/generate", {"inputs": "ab", "parameters": {"adapter_id": "french"}})
    assert front.ledger.started == ["/generate"]
    (record,) = front.ledger.records
    assert (record.route, record.adapter_id, record.status) == ("/generate", "french", 200)
    assert (record.outcome, record.queue_s) == ("stop", 0.25)
    assert (record.prompt_tokens, record.generated_tokens, record.cached_tokens) == (2, 3, 3)
    assert record.time_to_first_token_s is not None
    assert record.time_per_token_s is not None
    assert 0 < record.time_to_first_token_s <= record.duration_s


@pytest.mark.parametrize(
    ("path", "body", "status", "outcome"),
    [
        ("/generate", {"inputs": ""}, 422, "refused"),
        ("/generate", {"inputs": "a", "parameters": {"adapter_id": "evil"}}, 404, "refused"),
        ("/v1/completions", {"model": "evil", "prompt": "a"}, 404, "refused"),
        ("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 1}}, 200, "length"),
    ],
)
def test_records_never_carry_a_name_that_no_adapter_has(path, body, status, outcome):
    front = Front()
    front.post(path, body)
    (record,) = front.ledger.records
    served = "" if status == 200 else None
    assert (record.status, record.outcome, record.adapter_id) == (status, outcome, served)


def test_a_request_cancelled_before_its_first_token_was_served_by_no_adapter():
    """Floods of these once counted as the base's, and made its million tokens cheap."""
    front = Front(Answer(b"", ends=False, hangs=True), request_timeout_s=0.05)
    front.post("/generate", {"inputs": "ab", "parameters": {"adapter_id": "french"}})
    (record,) = front.ledger.records
    assert (record.outcome, record.adapter_id) == ("timeout", None)


@pytest.mark.parametrize(
    ("path", "body", "num_prompt", "num_cached"),
    [
        ("/v1/completions", {"model": BASE, "prompt": ["ab", "c"], "n": 3}, 3, 6),
        (
            "/generate",
            {"inputs": "ab", "parameters": {"best_of": 3, "do_sample": True}},
            2,
            3,
        ),
    ],
)
def test_a_prompt_shared_by_several_sequences_is_recorded_once(path, body, num_prompt, num_cached):
    front = Front(Answer(b"hi"))
    response = front.post(path, body)
    assert response.headers["x-prompt-tokens"] == str(num_prompt)
    (record,) = front.ledger.records
    assert (record.prompt_tokens, record.cached_tokens) == (num_prompt, num_cached)
    assert record.generated_tokens == 3 * len(front.engine.streams)


def test_metrics_are_the_sinks():
    response = Front().get("/metrics")
    assert response.text == "lory_up 1\n"
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")


@pytest.mark.parametrize("wrong", [{"model_names": ()}, {"model_names": ("a",), "api_keys": ("",)}])
def test_settings_that_would_serve_openly_or_namelessly_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=r"model_names|api_keys"):
        RouterSettings(**wrong)


def _connection(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=5)


def _raw_post(path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
    return head.encode() + content
