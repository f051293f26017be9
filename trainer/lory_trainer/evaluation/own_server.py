"""A server of one's own for the time of an evaluation: `lory serve` on a free port, then its end.

It is started as anybody starts it, as a command: the trainer knows nothing of its inside.
"""

import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import IO

from lory_trainer.evaluation.errors import EvaluationError

START_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 60.0
NUM_LAST_LINES = 8
_READY = re.compile(r"ready on (?P<url>http://\S+)")


@contextmanager
def serving(base: str, adapters: str, more: Sequence[str] = ()) -> Iterator[str]:
    """The URL of a server of that base and adapters folder; `more` are further flags of serve."""
    where = ["--model", base, "--adapters", adapters, "--port", "0", "--log-level", "info"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lory_router", "serve", *where, *more],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        yield _wait_until_ready(process)
    finally:
        _stop(process)


def _wait_until_ready(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
    found: SimpleQueue[str] = SimpleQueue()
    thread = threading.Thread(target=_read, args=(process.stderr, lines, found), daemon=True)
    thread.start()
    try:
        url = found.get(timeout=START_TIMEOUT_S)
    except Empty as error:
        raise EvaluationError(f"the server was not ready within {START_TIMEOUT_S:g} s") from error
    if not url:
        told = "\n".join(lines) or "it said nothing"
        raise EvaluationError(f"the server could not be started:\n{told}")
    return url


def _read(log: IO[str], lines: "deque[str]", found: "SimpleQueue[str]") -> None:
    """All of it, so that the server never waits for a reader; an empty URL at its end."""
    with log:
        for line in log:
            lines.append(line.rstrip())
            ready = _READY.search(line)
            if ready:
                found.put(ready["url"])
    found.put("")


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
