"""The engine as a process: it speaks frames, and ends when its router does."""

import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO

import msgspec
import pytest

import tiny_models
from lory_server import process
from lory_server.messages import (
    MAX_FRAME_BYTES,
    EngineInfo,
    EngineOptions,
    Event,
    Fatal,
    LogLevel,
    Message,
    Sampling,
    StepEvents,
    Submit,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("llama", tmp_path_factory.mktemp("process") / "base")


class Child:
    def __init__(self, options: EngineOptions, stderr: IO[bytes] | None = None) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(60)
        command = [sys.executable, "-m", "lory_server", "--fd", str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=stderr)
        theirs.close()
        self._decoder = msgspec.msgpack.Decoder(Event)
        self.send(options)

    def send(self, message: Message) -> None:
        payload = msgspec.msgpack.encode(message)
        self.socket.sendall(len(payload).to_bytes(4, "big") + payload)

    def receive(self) -> Event:
        length = int.from_bytes(self._exactly(4), "big")
        return self._decoder.decode(self._exactly(length))

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.socket.recv(count - len(data))
            assert part, "the engine is gone"
            data += part
        return data

    def speaks_within(self, seconds: float) -> bool:
        """After what had been sent before now."""
        while select.select([self.socket], [], [], 0)[0]:
            self.receive()
        return bool(select.select([self.socket], [], [], seconds)[0])

    def stop(self) -> None:
        self.socket.close()
        self.process.kill()
        self.process.wait(10)


@pytest.fixture
def child(base: Path):
    child = Child(EngineOptions(model=str(base), device="cpu", threads=1, kv_bytes=1 << 20))
    yield child
    child.stop()


def answer(child: Child, request_id: int, adapter_id: str = "") -> list[int]:
    sampling = Sampling(max_new_tokens=4, seed=1, ignore_eos=True)
    command = Submit(
        request_id=request_id, prompt_ids=(4, 5), sampling=sampling, adapter_id=adapter_id
    )
    child.send(command)
    tokens: list[int] = []
    while True:
        event = child.receive()
        assert isinstance(event, StepEvents)
        tokens += [token.token_id for token in event.tokens]
        if event.finished:
            return tokens


def test_it_serves_and_exits_when_the_router_is_gone(child: Child) -> None:
    info = child.receive()
    assert isinstance(info, EngineInfo)
    assert info.pid == child.process.pid
    first = answer(child, 1)
    assert len(first) == 4
    assert answer(child, 2) == first
    child.socket.close()
    assert child.process.wait(timeout=5) == 0


def test_an_idle_engine_sends_heartbeats(child: Child) -> None:
    assert isinstance(child.receive(), EngineInfo)
    beats = [child.receive() for _ in range(3)]
    assert all(isinstance(beat, StepEvents) and not beat.tokens for beat in beats)
    assert all(0 < beat.report.idle_seconds < 2 for beat in beats)


def test_a_stopped_engine_falls_silent_and_goes_on_when_continued(child: Child) -> None:
    assert isinstance(child.receive(), EngineInfo)
    os.kill(child.process.pid, signal.SIGSTOP)
    assert not child.speaks_within(1.5)
    os.kill(child.process.pid, signal.SIGCONT)
    assert child.speaks_within(5)


def test_a_frame_it_cannot_read_ends_it(child: Child) -> None:
    """A reader thread that died left an engine that heard nothing and lived on."""
    assert isinstance(child.receive(), EngineInfo)
    child.socket.sendall((2).to_bytes(4, "big") + b"\xc1\xff")
    assert child.process.wait(timeout=5) == 76


def test_a_frame_longer_than_any_ends_it_before_it_is_read(child: Child) -> None:
    assert isinstance(child.receive(), EngineInfo)
    child.socket.sendall((MAX_FRAME_BYTES + 1).to_bytes(4, "big"))
    assert child.process.wait(timeout=5) == 76


@pytest.mark.parametrize("level", ["info", "warning"])
def test_it_logs_what_becomes_of_adapters_as_far_as_asked(
    base: Path, tmp_path: Path, level: LogLevel
) -> None:
    tiny_models.save_adapter(tmp_path / "adapters" / "good", base, 4, 8, ["q_proj"], 0)
    tiny_models.save_adapter(tmp_path / "adapters" / "bad", base, 4, 8, ["q_proj"], 0)
    (tmp_path / "adapters" / "bad" / "adapter_model.safetensors").write_bytes(b"broken")
    options = EngineOptions(
        model=str(base),
        adapters_dir=str(tmp_path / "adapters"),
        device="cpu",
        threads=1,
        log_level=level,
    )
    with open(tmp_path / "log", "w+b") as log:
        child = Child(options, stderr=log)
        assert isinstance(child.receive(), EngineInfo)
        assert len(answer(child, 1, "good")) == 4
        assert answer(child, 2, "bad") == []
        child.stop()
        log.seek(0)
        text = log.read().decode()
    assert ("INFO lory_server.adapters.journal adapter 'good' loaded to host" in text) == (
        level == "info"
    )
    assert "WARNING lory_server.adapters.journal adapter 'bad' refused" in text


def test_what_cannot_be_built_is_one_fatal_message(tmp_path: Path) -> None:
    child = Child(EngineOptions(model=str(tmp_path / "missing"), device="cpu"))
    event = child.receive()
    assert isinstance(event, Fatal)
    assert "no such folder" in event.message
    assert child.process.wait(timeout=5) == 1
    child.stop()


def test_it_is_tied_to_its_router_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(process, "die_with_parent", lambda: calls.append("tied"))
    monkeypatch.setattr(process, "main", lambda: calls.append("main") or 0)
    monkeypatch.setattr(os, "_exit", calls.append)
    process.run()
    assert calls == ["tied", "main", 0]
