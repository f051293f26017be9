"""Starts `lory serve` for a measurement and stops it again.

It must not know what is measured.
"""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

READY_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
LOG_LINES_SHOWN = 20


@dataclass(frozen=True)
class RunningServer:
    url: str
    pid: int


@contextmanager
def serving(base: Path, adapters: Path, flags: Sequence[str], log: Path) -> Iterator[RunningServer]:
    """A Lory that answers, on a free port; RuntimeError with the end of its log if it does not."""
    port = free_port()
    command = [sys.executable, "-m", "lory_router", "serve", "--port", str(port)]
    command += ["--model", str(base), "--adapters", str(adapters), *flags]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            _await_ready(url, process, log)
            yield RunningServer(url, process.pid)
        finally:
            _stop(process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _await_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:])
    raise RuntimeError(f"lory serve is not ready; the end of its log:\n{tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
