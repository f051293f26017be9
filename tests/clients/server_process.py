"""A real server as a child process: started on a free port, ready, stopped, its exit judged.

It knows the command line and `/health`, and nothing of what is asked of the server.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("server", "kernels", "router", "clients/python", "trainer")
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0


@contextmanager
def serving(
    log_path: Path,
    *flags: str,
    adapters: Path = ROOT / "demo" / "adapters",
    model: Path | str = "demo/base",
) -> Iterator[str]:
    """The URL of `lory serve`, with the demo's base and adapters unless told otherwise; fails if it
    does not start, and if it does not end with exit code 0 at SIGTERM."""
    port = _free_port()
    command = [sys.executable, "-m", "lory_router", "serve"]
    command += ["--model", str(model), "--adapters", str(adapters), "--port", str(port)]
    command += flags
    paths = os.pathsep.join(str(ROOT / package) for package in PACKAGES)
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_healthy(process, url, log_path)
            yield url
            _stop(process, log_path)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log_path: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"lory serve ended with {process.returncode}:{_tail(log_path)}")
        if _is_healthy(url):
            return
        time.sleep(0.1)
    raise AssertionError(f"no /health within {START_TIMEOUT_S:.0f} s:{_tail(log_path)}")


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2.0, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def _stop(process: subprocess.Popen[bytes], log_path: Path) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        code = process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"still running after SIGTERM:{_tail(log_path)}") from None
    assert code == 0, f"exit code {code} after SIGTERM:{_tail(log_path)}"


def _tail(log_path: Path) -> str:
    return "\n" + log_path.read_bytes()[-4000:].decode(errors="replace")
