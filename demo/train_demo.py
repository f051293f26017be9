"""From rows to a served adapter: trains train/pig-latin.yaml, publishes it, scores it, asks it.

A demo server that listens at --url is used; else one is started for as long as this takes.
Training and scoring are `lory train` and `lory eval`, the latter on rows that were held out. This
script must not know how anything is trained, scored or served.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import httpx
import typer

DEMO_DIR = Path(__file__).parent
CONFIG = DEMO_DIR / "train" / "pig-latin.yaml"
NAME = "pig-latin"
UPLOADED = f"upload:{NAME}"
COMPLETION = "translation"
NUM_SHOWN = 3
START_TIMEOUT_S = 120.0
LORY = (sys.executable, "-m", "lory_router")


@contextmanager
def demo_server(url: str) -> Iterator[None]:
    """The one that listens there, or one of our own."""
    if _is_ready(url):
        typer.echo(f"a server listens at {url}")
        yield
        return
    port = httpx.URL(url).port or 80
    typer.echo(f"no server at {url}: lory demo --port {port} is started")
    process = subprocess.Popen([*LORY, "demo", "--port", str(port)], stdout=subprocess.DEVNULL)
    try:
        _wait(url, process)
        yield
    finally:
        process.terminate()
        process.wait()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.HTTPError:
        return False


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _is_ready(url):
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(
                f"no demo server at {url}; give another port: make demo-train PORT=9000"
            )
        time.sleep(0.2)


def lory(*arguments: str) -> None:
    """One of its commands, seen as it is; a failure ends this script too."""
    done = subprocess.run([*LORY, *arguments])
    if done.returncode:
        raise SystemExit(done.returncode)


def ask(url: str, prompt: str, adapter_id: str | None) -> str:
    adapter = {} if adapter_id is None else {"adapter_id": adapter_id}
    body = {"inputs": prompt, "parameters": {"max_new_tokens": 64, "do_sample": False, **adapter}}
    reply = httpx.post(f"{url}/generate", json=body, timeout=120)
    reply.raise_for_status()
    return reply.json()["generated_text"]


def main(
    url: Annotated[str, typer.Option(help="Of the demo server.")] = "http://127.0.0.1:8080",
    config: Annotated[Path, typer.Option(help="Of the run; its rows have phrases.")] = CONFIG,
    folder: Annotated[Path, typer.Option(help="For the adapter and its run.")] = Path("runs/demo"),
    extra: Annotated[
        list[str] | None, typer.Argument(help="After --, more options of lory train.")
    ] = None,
) -> None:
    """Train an adapter on the demo's base, publish it, score it, ask it."""
    started = time.monotonic()
    output, run = folder / NAME, folder / "run"
    held_out = run / "test.jsonl"
    with demo_server(url):
        places = ("--output", str(output), "--run", str(run), "--replace")
        lory("train", str(config), *places, "--publish", url, *(extra or ()))
        asked = ("--adapter", UPLOADED, "--completion", COMPLETION, "--server", url)
        lory("eval", str(held_out), *asked, "--gate", "exact_match > base")
        lines = held_out.read_text(encoding="utf-8").splitlines()[:NUM_SHOWN]
        for phrase in (json.loads(line)["phrase"] for line in lines):
            prompt = f"{phrase} ->"
            typer.echo(f"{prompt!r}\n  base      : {ask(url, prompt, None)!r}")
            typer.echo(f"  {NAME} : {ask(url, prompt, UPLOADED)!r}")
    typer.echo(
        f"{time.monotonic() - started:.0f} s from rows to answers; adapter and curve: {folder}"
    )


if __name__ == "__main__":
    typer.run(main)
