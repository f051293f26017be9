"""What thousands of adapters cost: loads by tier and rank, room on the device, throughput.

    python -m benchmarks.adapters_at_scale                    all of it
    python -m benchmarks.adapters_at_scale --only sim loads   a part

    sim      places in the pool and evictions, on long traces: no clock
    loads    disk to host, host to device, and the first token from each tier
    curve    tokens per second from 5 to 2,000 adapters, all warm in host memory

Adapters are made under .bench and deleted again. docs/scale.md is written from the result by
`python -m benchmarks.scale_report`. It must not know how anything is measured.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record, scale_curve, scale_loads, scale_sim
from benchmarks.models import ROOT as MODELS
from benchmarks.models import SHAPES
from benchmarks.scale_curve import CurveSettings
from benchmarks.scale_loads import LoadSettings

PARTS = ("sim", "loads", "curve")


def simulate(arguments: argparse.Namespace) -> dict[str, Any]:
    shape = scale_sim.LLAMA_8B
    return {
        "shape": shape.name,
        "padding": scale_sim.padding(shape),
        "fragments": scale_sim.fragments(shape, arguments.sim_loads),
        "evictions": scale_sim.evictions(shape, arguments.sim_adapters, arguments.sim_requests),
        "num_adapters": arguments.sim_adapters,
        "num_requests": arguments.sim_requests,
    }


def loads(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = LoadSettings(
        shape=SHAPES[arguments.model],
        ranks=tuple(arguments.ranks),
        per_rank=arguments.per_rank,
        rounds=arguments.rounds,
        threads=arguments.threads,
    )
    return scale_loads.measure(settings, arguments.models)


def curve(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = CurveSettings(
        shape=SHAPES[arguments.model],
        rank=arguments.rank,
        counts=tuple(arguments.counts),
        popularities=tuple(arguments.popularities),
        concurrency=arguments.concurrency,
        requests=arguments.requests,
        prompt_tokens=arguments.prompt_tokens,
        output_tokens=arguments.output_tokens,
        passes=arguments.passes,
        resident=arguments.resident,
        threads=arguments.threads,
        quiet_limit_s=arguments.quiet_limit,
        seed=arguments.seed,
    )
    return {"settings": settings.described()} | scale_curve.measure(settings, arguments.models)


MEASURES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "sim": simulate,
    "loads": loads,
    "curve": curve,
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.adapters_at_scale",
        description="Measures what thousands of adapters cost.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure")
    add("--model", choices=sorted(SHAPES), default="small", help="shape of the random base")
    add("--threads", type=int, default=1, help="CPU threads of the engine")
    add("--ranks", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256], help="of the loads")
    add("--per-rank", type=int, default=6, help="adapters of each rank")
    add("--rounds", type=int, default=5, help="first tokens of each from host memory")
    add("--rank", type=int, default=16, help="of the curve's adapters")
    add("--counts", type=int, nargs="+", default=[5, 32, 100, 500, 1000, 2000], help="of adapters")
    add("--popularities", nargs="+", default=["uniform", "zipf:1.0"], help="of adapters")
    add("--concurrency", type=int, default=32, help="requests at once")
    add("--requests", type=int, default=160, help="of each point and pass")
    add("--prompt-tokens", type=int, default=64, help="random tokens in")
    add("--output-tokens", type=int, default=48, help="tokens out")
    add("--passes", type=int, default=3, help="over all points, when all adapters are known")
    add("--resident", type=int, default=256, help="most adapters on the device")
    add("--sim-loads", type=int, default=10_000, help="of the pool's trace")
    add("--sim-adapters", type=int, default=5_000, help="of the eviction traces")
    add("--sim-requests", type=int, default=100_000, help="of each eviction trace")
    add("--quiet-limit", type=float, default=10.0, help="most seconds to wait for a quiet machine")
    add("--seed", type=int, default=0, help="of the prompts and draws")
    add("--models", type=Path, default=MODELS, help="folder of the made models")
    add("--out", type=Path, help="JSON file; without it one in benchmarks/results")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    parts = "".join(f"{part}-" for part in arguments.only if len(arguments.only) < len(PARTS))
    path = arguments.out or record.RESULTS / f"adapters-at-scale-{parts}{record.today()}.json"
    result = record.facts("benchmarks.adapters_at_scale", argv)
    result["model"], result["threads"] = arguments.model, arguments.threads
    for part in arguments.only:
        result[part] = MEASURES[part](arguments)
        # After each: what was measured is kept if the next part is cut off.
        record.write(path, result)
        print(f"{part}: {json.dumps(result[part])[:300]}", flush=True)
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
