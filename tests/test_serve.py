"""A whole server as its operator sees it: signals, exit codes, and what its log says."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lory_router import serve

SERVER = str(Path(__file__).with_name("serve_with_fake_engine.py"))


@dataclass
class Server:
    """A server process, and its replies."""

    process: subprocess.Popen[str]
    url: str = ""
    replies: list[tuple[int, list[dict[str, Any]]]] = field(default_factory=list)

    def engine_pid(self) -> int:
        return psutil.Process(self.process.pid).children()[0].pid

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def end(self, timeout_s: float = 8.0) -> tuple[int, str]:
        """The exit code and the log."""
        _, log = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, log

    def ask(self, adapter_id: str, num_tokens: int) -> threading.Thread:
        """Start a streamed request; its status and events join `replies`."""
        thread = threading.Thread(target=self._ask, args=(adapter_id, num_tokens))
        thread.start()
        return thread

    def _ask(self, adapter_id: str, num_tokens: int) -> None:
        parameters: dict[str, Any] = {"max_new_tokens": num_tokens, "details": True}
        if adapter_id:
            parameters["adapter_id"] = adapter_id
        body = {"inputs": "abc", "parameters": parameters}
        with (
            contextlib.suppress(httpx.RemoteProtocolError),
            httpx.stream("POST", f"{self.url}/generate_stream", json=body, timeout=20) as reply,
        ):
            lines = [line for line in reply.iter_lines() if line.startswith("data:")]
            self.replies.append((reply.status_code, [json.loads(line[5:]) for line in lines]))

    def wait_for_metric(self, line: str) -> None:
        deadline = time.monotonic() + 8
        while line not in httpx.get(f"{self.url}/metrics").text:
            assert time.monotonic() < deadline, f"never saw {line}"
            time.sleep(0.02)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of single bytes, all the front reads of a base."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("base")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@contextmanager
def serving(base: Path, *arguments: str, **flags: Any) -> Iterator[Server]:
    """A server over a fake engine; ready, unless `arguments` keep it from ever being."""
    values = {"model": str(base), "port": 0, "step_timeout": 0.5, "drain_timeout": 5.0} | flags
    process = subprocess.Popen(
        [sys.executable, SERVER, json.dumps(values), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    server = Server(process)
    try:
        if not arguments:
            assert process.stdout is not None
            server.url = process.stdout.readline().strip()
        yield server
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_stops_at_once_with_code_0(base: Path, number: int) -> None:
    with serving(base) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        engine = server.engine_pid()
        server.signal(number)
        code, log = server.end(4)
        assert (code, "Traceback" in log) == (0, False)
        assert not psutil.pid_exists(engine)


def test_the_collector_does_not_look_through_what_lasts(base: Path) -> None:
    """Each time that it did, no stream got a token for 50 ms."""
    with serving(base) as server:
        assert server.process.stdout is not None
        assert int(server.process.stdout.readline()) > 10_000


def test_running_requests_finish_while_new_ones_are_refused(base: Path) -> None:
    with serving(base) as server:
        running = server.ask("slow", 60)
        server.wait_for_metric("lory_running_requests 1.0")
        server.signal()
        time.sleep(0.2)
        refused = httpx.post(f"{server.url}/generate", json={"inputs": "a"})
        assert refused.status_code == 503
        assert httpx.get(f"{server.url}/health").status_code == 503
        running.join()
        code, log = server.end()
        assert (code, "Traceback" in log) == (0, False)
        ((status, events),) = server.replies
        assert status == 200
        assert events[-1]["details"]["generated_tokens"] == 60


def test_the_drains_deadline_ends_what_is_left_with_an_event(base: Path) -> None:
    with serving(base, drain_timeout=0.3) as server:
        running = server.ask("slow", 4000)
        server.wait_for_metric("lory_running_requests 1.0")
        server.signal()
        code, log = server.end()
        running.join()
        assert (code, "Traceback" in log) == (0, False)
        assert "1 requests did not finish" in log
        ((_, events),) = server.replies
        assert events[-1]["error_type"] == "unavailable"
        assert "shutting down" in events[-1]["error"]


def test_the_drains_deadline_ends_a_plain_request_with_503(base: Path) -> None:
    """It was a 500 that named no cause, and nothing to wait for."""
    body = {"inputs": "abc", "parameters": {"adapter_id": "slow", "max_new_tokens": 4000}}
    replies: list[httpx.Response] = []
    with serving(base, drain_timeout=0.3) as server:
        url = f"{server.url}/generate"
        asking = threading.Thread(target=lambda: replies.append(httpx.post(url, json=body)))
        asking.start()
        server.wait_for_metric("lory_running_requests 1.0")
        server.signal()
        code, log = server.end()
        asking.join()
    assert (code, "Traceback" in log) == (0, False)
    (reply,) = replies
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "2")
    assert "shutting down" in reply.json()["error"]


def test_a_client_stuck_in_its_request_does_not_hold_up_the_end(base: Path) -> None:
    with serving(base) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as half:
            half.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{")
            server.wait_for_metric("lory_open_requests 1.0")
            start = time.monotonic()
            server.signal()
            code, log = server.end()
            assert time.monotonic() - start < 2
    assert (code, log.count("Traceback"), log.count("Cancel")) == (0, 0, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_wait(base: Path, number: int) -> None:
    with serving(base, drain_timeout=60.0) as server:
        running = server.ask("stuck", 4000)
        server.wait_for_metric("lory_running_requests 1.0")
        server.signal()
        server.signal()
        time.sleep(0.8)
        assert server.process.poll() is None
        start = time.monotonic()
        server.signal(number)
        code, log = server.end(6)
        assert time.monotonic() - start < 1
        assert code == 128 + number
        assert "Traceback" not in log
        assert "starting another" not in log
        running.join()


def test_a_killed_engine_ends_streams_in_an_error_and_requests_go_on_later(base: Path) -> None:
    with serving(base) as server:
        running = server.ask("slow", 4000)
        server.wait_for_metric("lory_running_requests 1.0")
        os.kill(server.engine_pid(), signal.SIGKILL)
        running.join(2.5)
        assert not running.is_alive()
        ((_, events),) = server.replies
        assert "error" in events[-1]
        server.wait_for_metric("lory_engine_up 1.0")
        server.wait_for_metric("lory_engine_restarts_total 1.0")
        server.ask("", 3).join()
        assert server.replies[-1][1][-1]["details"]["generated_tokens"] == 3
        server.signal()
        assert server.end()[0] == 0


def test_an_engine_that_cannot_start_ends_the_server_with_its_words(base: Path) -> None:
    with serving(base, "--fatal", "config.json: no such file") as server:
        start = time.monotonic()
        code, log = server.end()
        assert code == 1
        assert time.monotonic() - start < 5
        assert "config.json: no such file" in log
        assert "Traceback" not in log


def test_a_crash_loop_ends_the_server(base: Path, tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    with serving(base, "--starts", str(starts), "--crash-starts", "99") as server:
        code, log = server.end()
        assert code == 1
        assert "exited with code 9 (3 times in a row" in log


def test_the_engine_does_not_outlive_a_killed_server(base: Path) -> None:
    with serving(base) as server:
        engine = psutil.Process(server.engine_pid())
        server.process.kill()
        engine.wait(3)


def test_not_even_a_stopped_engine_outlives_a_killed_server(base: Path) -> None:
    """It cannot read that its socket has ended."""
    with serving(base) as server:
        engine = psutil.Process(server.engine_pid())
        engine.suspend()
        server.process.kill()
        try:
            engine.wait(3)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                engine.kill()


def test_a_busy_port_is_one_line(base: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with serving(base, "--unused", port=port) as server:
            code, log = server.end()
    assert code == 1
    assert log.splitlines() == [
        f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port"
    ]


def test_an_adapter_called_as_the_base_is_told_at_start(base: Path) -> None:
    with serving(base, served_model_name="slow") as server:
        server.signal()
        _, log = server.end()
    assert "INFO lory loading " in log.splitlines()[0]
    assert log.splitlines()[-1].endswith("INFO lory stopped")
    assert "adapter 'slow' has the base's name: as OpenAI's `model` it is 'slow:slow'" in log


@pytest.mark.parametrize(
    ("is_given", "told"), [(True, "adapters in "), (False, "no --adapters: the base alone")]
)
def test_how_many_adapters_are_served_is_said(
    base: Path, tmp_path: Path, is_given: bool, told: str
) -> None:
    with serving(base, **({"adapters": str(tmp_path)} if is_given else {})) as server:
        server.signal()
        assert told in server.end()[1]


def test_a_door_open_to_the_network_is_said_aloud(base: Path) -> None:
    for flags, is_warned in (({}, True), ({"api_key": "k"}, False)):
        with serving(base, "--fatal", "enough", host="0.0.0.0", **flags) as server:
            assert ("set --api-key" in server.end()[1]) == is_warned


def test_a_base_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    with serving(tmp_path, "--unused") as server:
        code, log = server.end()
    assert code == 1
    assert "tokenizer.json" in log
    assert len(log.splitlines()) == 1


def test_replies_are_not_held_back_to_be_sent_together() -> None:
    """asyncio leaves Nagle's delay on for sockets that do not name TCP: 40 ms a reply."""
    from lory_router.listener import listen

    async def accepted_nodelay() -> int:
        told: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def note(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted = writer.get_extra_info("socket")
            told.set_result(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = listen("127.0.0.1", 0)
        server = await asyncio.start_server(note, sock=listener)
        async with server:
            _, writer = await asyncio.open_connection(*listener.getsockname())
            value = await asyncio.wait_for(told, 5)
            writer.close()
            await writer.wait_closed()
        return value

    assert asyncio.run(accepted_nodelay()) == 1


def test_a_warm_up_that_is_not_there_ends_the_server_in_one_line(base: Path) -> None:
    flags = {"adapters": str(base), "warm_up": "slow,missing"}
    with serving(base, "--crash-starts", "0", **flags) as server:
        code, log = server.end()
    assert code == 1
    assert log.splitlines()[-1] == "--warm-up: no adapter 'missing'"


def test_a_registry_that_cannot_be_used_is_one_line(base: Path) -> None:
    path = str(base / "none" / "registry")
    with serving(base, "--crash-starts", "0", registry=path) as server:
        code, log = server.end()
    assert code == 1
    assert log.splitlines()[-1] == f"--registry {path}: its folder is not there; make it first"


def test_pins_are_loaded_again_after_a_crash(base: Path, tmp_path: Path) -> None:
    path, adapters = str(tmp_path / "registry"), str(base)
    with serving(base, registry=path, adapters=adapters, warm_up="flood") as server:
        assert httpx.post(f"{server.url}/v1/adapters/slow/pin").status_code == 200
        server.wait_for_metric('lory_pinned_adapters{tier="device"} 1.0')
        server.ask("crash", 1).join()
        server.wait_for_metric("lory_engine_restarts_total 1.0")
        server.wait_for_metric('lory_pinned_adapters{tier="device"} 1.0')
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_fine_tuning_that_breaks_is_told_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody waited for it before the server's end: jobs stood still, and no log said why."""
    closed: list[bool] = []

    async def broken() -> None:
        raise RuntimeError("the jobs' database is gone")

    tuning = SimpleNamespace(run=broken, close=lambda: closed.append(True))
    parts: Any = SimpleNamespace(tuning=tuning)
    asyncio.run(serve._train(parts))
    assert "fine-tuning has stopped" in caplog.text
    assert "the jobs' database is gone" in caplog.text
    assert closed
