"""`lory demo`: the small world that comes with the repository, served, and checked on request.

It must not know how a server is put together, only that one can be run with a visitor.
"""

import asyncio
import json
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import typer

from lory_router.config import ServeConfig, StartError

DEMO_FOLDER = Path(__file__).resolve().parents[2] / "demo"
DEFAULT_PORT = 8080
LOOPBACK = "127.0.0.1"
MAX_NEW_TOKENS = 128
ANSWER_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Sample:
    """A prompt for an adapter (None: the base) and the one right answer to it."""

    adapter_id: str | None
    inputs: str
    expected: str
    max_new_tokens: int = MAX_NEW_TOKENS

    @property
    def body(self) -> dict[str, Any]:
        adapter = {} if self.adapter_id is None else {"adapter_id": self.adapter_id}
        parameters = {**adapter, "max_new_tokens": self.max_new_tokens}
        return {"inputs": self.inputs, "parameters": parameters}


@dataclass(frozen=True)
class DemoFiles:
    """Where the demo's world lies."""

    base: Path
    adapters: Path
    samples: tuple[Sample, ...]

    @classmethod
    def find(
        cls, base: Path | None = None, adapters: Path | None = None, prompts: Path | None = None
    ) -> "DemoFiles":
        """The files given, or else those of the checkout this package runs from."""
        base, adapters = base or DEMO_FOLDER / "base", adapters or DEMO_FOLDER / "adapters"
        prompts = prompts or DEMO_FOLDER / "prompts.json"
        for path in (base, adapters, prompts):
            if not path.exists():
                raise StartError(
                    f"{path} is not there; run in a checkout of the repository, or name the "
                    "files with --base, --adapters and --prompts"
                )
        samples = _read_samples(prompts)
        asked = {sample.adapter_id for sample in samples}
        for folder in adapters.iterdir():
            if folder.is_dir() and folder.name not in asked:
                raise StartError(f"{prompts}: no prompt for the adapter {folder.name}")
        return cls(base, adapters, samples)

    @property
    def shown(self) -> Sample:
        """The sample to show: the first with an adapter, if there is one."""
        return next((one for one in self.samples if one.adapter_id), self.samples[0])


def run_demo(files: DemoFiles, flags: Mapping[str, Any], *, port: int | None, check: bool) -> int:
    """Serve the demo's world; with `check` only for as long as its answers are compared.

    What is uploaded to it is served until it ends.
    """
    with TemporaryDirectory() as uploads:
        return _run(files, {**flags, **_upload_flags(flags, uploads)}, port=port, check=check)


def _upload_flags(flags: Mapping[str, Any], folder: str) -> Mapping[str, Any]:
    """Uploads are this machine's alone to send, and no other source is asked."""
    if flags.get("host", LOOPBACK) != LOOPBACK:
        return {}
    return {"adapter_cache": folder, "adapter_uploads": True, "adapter_offline": True}


def _run(files: DemoFiles, flags: Mapping[str, Any], *, port: int | None, check: bool) -> int:
    from lory_router import serve

    wanted = (0 if check else DEFAULT_PORT) if port is None else port
    config = ServeConfig.from_flags(
        {
            **flags,
            "model": str(files.base),
            "adapters": str(files.adapters),
            "port": wanted,
            "served_model_name": "demo",
            "dtype": "float32",
            "log_level": "warning" if check else "info",
        }
    )
    started = time.monotonic()

    async def visit(url: str) -> int | None:
        typer.echo(f"ready in {time.monotonic() - started:.1f} s at {url}")
        if check:
            return await check_answers(url, files.samples)
        typer.echo(pasteable_lines(url, files.shown))
        price = config.metrics.price_per_hour
        if price:
            typer.echo(f"Costs in {url}/metrics take the machine's hour at {price:g}, an example.")
        typer.echo("Ctrl-C stops the server.")
        return None

    return serve.run(config, after_ready=visit)


def pasteable_lines(url: str, sample: Sample) -> str:
    """Three commands that each show the adapter at work."""
    body = shlex.quote(json.dumps(sample.body))
    header = "-H 'content-type: application/json'"
    script = (
        "from lory_client import Client; "
        f"print(Client({url!r}).generate({sample.inputs!r}, adapter_id={sample.adapter_id!r}, "
        f"max_new_tokens={sample.max_new_tokens}).text)"
    )
    return "\n".join(
        (
            "Paste one of these into another terminal:",
            f"  curl -s {url}/generate {header} -d {body}",
            f"  curl -sN {url}/generate_stream {header} -d {body}",
            f"  {shlex.quote(sys.executable)} -c {_quoted(script)}",
            *_where_lory_is(),
        )
    )


def _quoted(script: str) -> str:
    """For a shell, in double quotes if that changes nothing: Python's own are single ones."""
    return shlex.quote(script) if set(script) & set('"$`\\!') else f'"{script}"'


def _where_lory_is() -> tuple[str, ...]:
    """How to run `lory`, for a shell that does not find it."""
    beside = Path(sys.executable).with_name("lory")
    if shutil.which("lory") or not beside.is_file():
        return ()
    return (f"The lory command is {shlex.quote(str(beside))}; it is not on your PATH.",)


async def check_answers(url: str, samples: tuple[Sample, ...]) -> int:
    """Ask for all samples at once, so that they share steps; 0 if every answer is the right one."""
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_TIMEOUT_S) as client:
        answers = await asyncio.gather(*(_ask(client, sample) for sample in samples))
    num_right = 0
    for sample, answer in zip(samples, answers, strict=True):
        is_right = answer == sample.expected
        num_right += is_right
        wanted = "" if is_right else f", expected {sample.expected!r}"
        verdict = "ok " if is_right else "BAD"
        typer.echo(
            f"{verdict} {sample.adapter_id or 'base'}: {sample.inputs!r} -> {answer!r}{wanted}"
        )
    num_adapters = len({sample.adapter_id for sample in samples if sample.adapter_id})
    typer.echo(f"{num_right} of {len(samples)} answers right, {num_adapters} adapters")
    return 0 if num_right == len(samples) else 1


async def _ask(client: httpx.AsyncClient, sample: Sample) -> str:
    reply = await client.post("/generate", json=sample.body)
    if reply.is_error:
        return f"{reply.status_code}: {reply.text}"
    return reply.json()["generated_text"]


def _read_samples(path: Path) -> tuple[Sample, ...]:
    try:
        samples = tuple(Sample(**entry) for entry in json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise StartError(f"{path}: not a list of samples: {error}") from error
    if not samples:
        raise StartError(f"{path}: no sample in it")
    return samples
