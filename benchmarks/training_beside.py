"""What running streams notice while an adapter is trained beside them.

    python -m benchmarks.training_beside

Streams run on the demo's adapters, one batch after another in turn without and with a fine-tuning
job that trains on the same base by the same server. The streams' tokens per second and the gaps
between their tokens are compared, and how fast the job goes is told. It must not know how jobs are
run.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
MODEL = "demo"
JOBS = "/v1/fine_tuning/jobs"
TIMEOUT_S = 300.0
MANY_EPOCHS = 50
VOCAB_SIZE = 256


@dataclass(frozen=True)
class Settings:
    streams: int
    stream_tokens: int
    batches: int
    """Batches of streams in each phase of a repetition."""
    threads: int
    tuning_threads: int
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


@contextmanager
def training(url: str, rows: bytes, told: dict[str, Any]) -> Iterator[None]:
    """A job that trains as long as this lasts; how it went is put into `told`."""
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
        files = {"file": ("rows.jsonl", rows)}
        sent = client.post("/v1/files", data={"purpose": "fine-tune"}, files=files)
        body = {
            "model": MODEL,
            "training_file": sent.raise_for_status().json()["id"],
            "hyperparameters": {"n_epochs": MANY_EPOCHS, "batch_size": 8},
        }
        job_id = client.post(JOBS, json=body).raise_for_status().json()["id"]
        first, began_s = _until_it_trains(client, job_id), time.perf_counter()
        yield
        steps = _steps(client, job_id) - first
        told["steps_per_s"] = steps / (time.perf_counter() - began_s)
        if not steps:
            raise RuntimeError("the job made no step meanwhile")
        client.post(f"{JOBS}/{job_id}/cancel").raise_for_status()
        _until(client, job_id, "cancelled")


def _until_it_trains(client: httpx.Client, job_id: str) -> int:
    deadline = time.monotonic() + TIMEOUT_S
    while not (steps := _steps(client, job_id)):
        status = client.get(f"{JOBS}/{job_id}").json()
        if status["status"] == "failed" or time.monotonic() > deadline:
            raise RuntimeError(f"the job does not train: {status}")
        time.sleep(0.1)
    return steps


def _until(client: httpx.Client, job_id: str, status: str) -> None:
    while client.get(f"{JOBS}/{job_id}").json()["status"] != status:
        time.sleep(0.1)


def _steps(client: httpx.Client, job_id: str) -> int:
    """Optimizer steps that have been told of."""
    data = client.get(f"{JOBS}/{job_id}/events", params={"limit": 1}).json()["data"]
    return data[0]["data"].get("step", 0) if data else 0


def measure(url: str, settings: Settings, number: int) -> dict[str, Any]:
    """Some batches of streams in figures."""
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
    for batch in range(settings.batches):
        outcomes, elapsed_s = load.run(settings.workload().requests(number + batch))
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
    repetitions: list[dict[str, Any]] = []
    rows = training_rows()
    with tempfile.TemporaryDirectory() as scratch:
        flags = settings.flags(f"{scratch}/jobs")
        adapters = Path(scratch) / "adapters"
        shutil.copytree(DEMO / "adapters", adapters)
        with serving(DEMO / "base", adapters, flags, Path(scratch) / "log") as server:
            measure(server.url, settings, -1)
            for number in range(settings.reps):
                told: dict[str, Any] = {}
                alone = measure(server.url, settings, number)
                with training(server.url, rows, told):
                    beside = measure(server.url, settings, number)
                repetitions.append({"alone": alone, "beside": beside, "training": told})
                print(f"repetition {number + 1}: {line(repetitions[-1])}", flush=True)
    return {
        "settings": asdict(settings),
        "repetitions": repetitions,
        "median": medians(repetitions),
    }


def ratios(one: dict[str, Any]) -> dict[str, float]:
    alone, beside = one["alone"], one["beside"]
    return {
        "tokens_per_s_beside_to_alone": beside["tokens_per_s"] / alone["tokens_per_s"],
        "gap_p50_beside_to_alone": beside["gap_s"]["p50"] / alone["gap_s"]["p50"],
        "gap_p99_beside_to_alone": beside["gap_s"]["p99"] / alone["gap_s"]["p99"],
        "training_steps_per_s": one["training"]["steps_per_s"],
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
    add("--batches", type=int, default=8, help="batches of streams in each phase")
    add("--threads", type=int, default=1, help="CPU threads of the engine")
    add("--tuning-threads", type=int, default=1, help="CPU threads of the job")
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
