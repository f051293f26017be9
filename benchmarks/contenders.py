"""Those who are compared: servers over HTTP, and transformers + PEFT in a process of its own.

Each runs a batch of requests that all come at once, and says how long it took and how many tokens
came out. It must not know scenarios, repetitions or results.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lory_router.bench.client import Target
from lory_router.bench.command import ServerFacts
from lory_router.bench.load import CompletionsRoute, Load
from lory_router.bench.machine import listening_pid
from lory_router.bench.workload import Ask

BATCH_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class BatchResult:
    wall_s: float
    output_tokens: int


class Contender(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def pid(self) -> int:
        """The process whose tree does the work; 0 if not known."""
        ...

    def run(self, asks: Sequence[Ask], output_tokens: int) -> BatchResult:
        """Raises RuntimeError if any request fails."""
        ...


@dataclass(frozen=True)
class HttpContender:
    """Any server with /v1/completions whose `model` may be an adapter."""

    name: str
    url: str
    pid: int
    base_name: str

    @classmethod
    def at(cls, name: str, url: str) -> "HttpContender":
        target = Target.of(url)
        base_name = ServerFacts.ask(url, "").base_name
        return cls(name, url, listening_pid(target.host, target.port), base_name)

    def run(self, asks: Sequence[Ask], output_tokens: int) -> BatchResult:
        route = CompletionsRoute(self.base_name)
        load = Load(
            Target.of(self.url),
            route,
            output_tokens,
            stream=False,
            concurrency=len(asks),
            timeout_s=BATCH_TIMEOUT_S,
        )
        outcomes, wall_s = load.run(asks)
        failures = {outcome.failure for outcome in outcomes if outcome.failure}
        if failures:
            raise RuntimeError(f"{self.name}: {'; '.join(sorted(failures))}")
        return BatchResult(wall_s, sum(outcome.usage.output_tokens for outcome in outcomes))


class PeftContender:
    """transformers + PEFT behind a pipe."""

    name = "transformers + PEFT"

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._read()

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, asks: Sequence[Ask], output_tokens: int) -> BatchResult:
        batch = {
            "prompts": [ask.prompt for ask in asks],
            "adapters": [ask.adapter for ask in asks],
            "output_tokens": output_tokens,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(batch) + "\n")
        self._process.stdin.flush()
        done = self._read()
        return BatchResult(done["wall_s"], done["output_tokens"])

    def _read(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with code {self._process.wait()}; see above")
        return json.loads(line)


@contextmanager
def peft_contender(
    base: Path, adapters: Path, names: Sequence[str], threads: int, quantize: str
) -> Iterator[PeftContender]:
    command = [sys.executable, "-m", "benchmarks.peft_peer", "--base", str(base)]
    command += ["--adapters", str(adapters), "--names", ",".join(names), "--threads", str(threads)]
    command += ["--quantize", quantize]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield PeftContender(process)
        finally:
            process.terminate()
