"""What running streams notice while an adapter is trained beside them, and what the job gets.

    python -m benchmarks.training_beside

Streams run on the demo's adapters, one batch after another, in turn without and with a fine-tuning
job that trains on the same base by the same server. What they do beside the job is compared with
the mean of the turns before and after it: tokens per second, and the gaps between tokens. The job
goes on for a while with the server to itself before the streams come, so its own speed is compared
too. It must not know how jobs are run.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from benchmarks import record
from benchmarks.server import serving
from lory_router.bench.client import Target
from lory_router.bench.figures import spread
from lory_router.bench.load import CompletionsRoute, Load, Outcome
from lory_router.bench.workload import Popularity, Workload
from lory_router.tuning_config import TuningConfig

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
MODEL = "demo"
JOBS = "/v1/fine_tuning/jobs"
TIMEOUT_S = 300.0
MANY_EPOCHS = 50
VOCAB_SIZE = 256
SETTLE_S = 2.0
"""Of streams, before what the job does beside them counts: steps are told of half a second late."""
NUM_EVENTS = 5
"""Among so many of the newest there is a step: of others there are at most two in a row."""
DEFAULT_SHARE = TuningConfig().tuning_share


@dataclass(frozen=True)
class Settings:
    streams: int
    stream_tokens: int
    seconds: float
    """Of streams in each turn, of the job with and without them."""
    threads: int
    tuning_threads: int
    share: float
    """Of the time, which the job may run beside requests."""
    reps: int
    seed: int

    def workload(self) -> Workload:
        names = tuple(sorted(path.name for path in (DEMO / "adapters").iterdir()))
        return Workload(
            num_requests=self.streams,
            adapters=names[: self.streams],
            popularity=Popularity("uniform"),
            base_share=0.0,
            prompt_tokens=16,
            output_tokens=self.stream_tokens,
            vocab_size=VOCAB_SIZE,
            seed=self.seed,
        )

    def flags(self, folder: str) -> list[str]:
        return [
            *("--threads", str(self.threads)),
            *("--fine-tuning", folder),
            *("--tuning-threads", str(self.tuning_threads)),
            *("--tuning-share", str(self.share)),
            *("--served-model-name", MODEL),
            *("--log-level", "warning"),
        ]


def training_rows() -> bytes:
    """The demo's tickets as chats."""
    lines: list[str] = []
    for line in (DEMO / "data" / "ticket-json" / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        asked = {"role": "user", "content": row["text"]}
        told = {"role": "assistant", "content": row["completion"]}
        lines.append(json.dumps({"messages": [asked, told]}) + "\n")
    return "".join(lines).encode()


@dataclass(frozen=True)
class Progress:
    """Of a job, at one moment."""

    at_s: float
    steps: int
    tokens: int

    def since(self, before: "Progress") -> dict[str, float]:
        seconds = self.at_s - before.at_s
        return {
            "seconds": seconds,
            "steps_per_s": (self.steps - before.steps) / seconds,
            "tokens_per_s": (self.tokens - before.tokens) / seconds,
        }


class Training:
    """A job of a server."""

    def __init__(self, client: httpx.Client, job_id: str) -> None:
        self._client = client
        self._path = f"{JOBS}/{job_id}"

    def progress(self) -> Progress:
        """By the steps that have been told of; the server looks for them twice a second."""
        reply = self._client.get(f"{self._path}/events", params={"limit": NUM_EVENTS})
        steps = [event["data"] for event in reply.json()["data"] if event["type"] == "metrics"]
        newest: dict[str, Any] = steps[0] if steps else {}
        return Progress(time.perf_counter(), newest.get("step", 0), newest.get("tokens", 0))

    def until_it_trains(self) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not self.progress().steps:
            status = self.shown()
            if status["status"] == "failed" or time.monotonic() > deadline:
                raise RuntimeError(f"the job does not train: {status}")
            time.sleep(0.1)

    def shown(self) -> dict[str, Any]:
        return self._client.get(self._path).json()

    def cancel(self) -> dict[str, float]:
        """What it has taken of the machine."""
        self._client.post(f"{self._path}/cancel").raise_for_status()
        deadline = time.monotonic() + TIMEOUT_S
        while (job := self.shown())["status"] != "cancelled":
            if time.monotonic() > deadline:
                raise RuntimeError(f"the job is not cancelled: {job}")
            time.sleep(0.1)
        return job["usage"]


def begin_training(client: httpx.Client, rows: bytes) -> Training:
    """A job that would train for long."""
    files = {"file": ("rows.jsonl", rows)}
    sent = client.post("/v1/files", data={"purpose": "fine-tune"}, files=files)
    body = {
        "model": MODEL,
        "training_file": sent.raise_for_status().json()["id"],
        "hyperparameters": {"n_epochs": MANY_EPOCHS, "batch_size": 8},
    }
    training = Training(client, client.post(JOBS, json=body).raise_for_status().json()["id"])
    training.until_it_trains()
    return training


def beside_training(
    url: str, rows: bytes, settings: Settings, number: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Streams with a job beside them, and the job with and without them."""
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
        training = begin_training(client, rows)
        first = training.progress()
        time.sleep(settings.seconds)
        alone = training.progress().since(first)
        measure(url, replace(settings, seconds=SETTLE_S), number)
        first = training.progress()
        streams = measure(url, settings, number)
        beside = training.progress().since(first)
        return streams, {"alone": alone, "beside": beside, "usage": training.cancel()}


def measure(url: str, settings: Settings, number: int) -> dict[str, Any]:
    """Batches of streams, one after another, in figures."""
    load = Load(
        Target.of(url),
        CompletionsRoute(MODEL),
        settings.stream_tokens,
        True,
        settings.streams,
        TIMEOUT_S,
    )
    gaps: list[float] = []
    num_tokens, seconds = 0, 0.0
    while seconds < settings.seconds:
        outcomes, elapsed_s = load.run(settings.workload().requests(number))
        _check(outcomes)
        seconds += elapsed_s
        num_tokens += sum(len(outcome.token_times_s) for outcome in outcomes)
        for outcome in outcomes:
            gaps += [after - before for before, after in pairwise(outcome.token_times_s)]
    return {"tokens_per_s": num_tokens / seconds, "gap_s": spread(gaps)}


def _check(outcomes: Sequence[Outcome]) -> None:
    failures = {outcome.failure for outcome in outcomes if outcome.failure}
    if failures:
        raise RuntimeError(f"a stream failed: {'; '.join(sorted(failures))}")


def run(settings: Settings) -> dict[str, Any]:
    alone: list[dict[str, Any]] = []
    repetitions: list[dict[str, Any]] = []
    rows = training_rows()
    with tempfile.TemporaryDirectory() as scratch:
        flags = settings.flags(f"{scratch}/jobs")
        adapters = Path(scratch) / "adapters"
        shutil.copytree(DEMO / "adapters", adapters)
        with serving(DEMO / "base", adapters, flags, Path(scratch) / "log") as server:
            measure(server.url, settings, -1)
            alone.append(measure(server.url, settings, 0))
            for number in range(settings.reps):
                beside, job = beside_training(server.url, rows, settings, number)
                alone.append(measure(server.url, settings, number + 1))
                one = {"alone": between(*alone[-2:]), "beside": beside, "training": job}
                repetitions.append(one)
                print(f"repetition {number + 1}: {line(one)}", flush=True)
    return {
        "settings": asdict(settings),
        "alone": alone,
        "repetitions": repetitions,
        "median": medians(repetitions),
    }


def between(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The mean of two turns of streams: what a machine that changes slowly does in between."""
    gaps = {name: (before["gap_s"][name] + after["gap_s"][name]) / 2 for name in before["gap_s"]}
    return {"tokens_per_s": (before["tokens_per_s"] + after["tokens_per_s"]) / 2, "gap_s": gaps}


def ratios(one: dict[str, Any]) -> dict[str, float]:
    alone, beside, training = one["alone"], one["beside"], one["training"]
    return {
        "tokens_per_s_beside_to_alone": beside["tokens_per_s"] / alone["tokens_per_s"],
        "gap_p50_beside_to_alone": beside["gap_s"]["p50"] / alone["gap_s"]["p50"],
        "gap_p99_beside_to_alone": beside["gap_s"]["p99"] / alone["gap_s"]["p99"],
        "training_tokens_per_s_alone": training["alone"]["tokens_per_s"],
        "training_tokens_per_s_beside": training["beside"]["tokens_per_s"],
        "training_steps_per_s_beside": training["beside"]["steps_per_s"],
    }


def medians(repetitions: Sequence[dict[str, Any]]) -> dict[str, float]:
    every = [ratios(one) for one in repetitions]
    return {name: round(statistics.median(one[name] for one in every), 4) for name in every[0]}


def line(one: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in ratios(one).items())


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.training_beside",
        description="Measures what running streams notice of a fine-tuning job.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--streams", type=int, default=8, help="streams at a time")
    add("--stream-tokens", type=int, default=256, help="tokens of each")
    add("--seconds", type=float, default=20.0, help="of each turn")
    add("--threads", type=int, default=1, help="CPU threads of the engine")
    add("--tuning-threads", type=int, default=1, help="CPU threads of the job")
    add("--share", type=float, default=DEFAULT_SHARE, help="--tuning-share of the server")
    add("--reps", type=int, default=5, help="repetitions")
    add("--seed", type=int, default=0, help="of the prompts")
    add("--out", type=Path, help="JSON file; without it one in benchmarks/results")
    arguments = vars(parser.parse_args(argv))
    out = arguments.pop("out")
    settings = Settings(**arguments)
    result = record.facts("benchmarks.training_beside", argv) | run(settings)
    path = out or record.RESULTS / f"training-beside-{record.today()}.json"
    record.write(path, result)
    for name, value in result["median"].items():
        print(f"{name}: {value}")
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
