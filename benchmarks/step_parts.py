"""Where a decode step's time goes on a CPU, part by part.

    python -m benchmarks.step_parts --model small --out benchmarks/results/step-parts-small.json

In process: a decoder of random weights, rows that each compute one position more of a context. Each
scenario is measured twice. Op by op, every op is called from Python and timed alone: that is where
the parts come from, and each holds the microseconds that a call from Python costs. And as it is
served: all layers recorded as one call, so that no part can be told from another; its whole is the
figure to believe. Scheduler, accounting, messages and HTTP are not in it. It must not know where
results go.
"""

import argparse
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.gpu_base import manifest_of
from benchmarks.models import ROOT as MODELS
from benchmarks.models import SHAPES, ensure_base
from lory_kernels import Segments, best_cpu_backend, select
from lory_router.bench.machine import CpuWatch, wait_until_quiet
from lory_server.adapters.pool import AdapterPool
from lory_server.messages import EngineOptions, Quantization, Sampling
from lory_server.model import lora
from lory_server.model.kv import KVCache
from lory_server.model.linear import Linear
from lory_server.model.load import load
from lory_server.model.packing import Packer
from lory_server.model.runner import Runner
from lory_server.plan import BASE_SLOT, PlanRow, SampleRow, StepPlan

Scenario = Literal["bare", "base", "one", "distinct"]
SCENARIOS: tuple[Scenario, ...] = get_args(Scenario)
"""`bare`: rows of a base without adapters. In the others as many adapters as rows are there, and
`base` rows use none of them."""
PARTS = ("linears", "sgmv", "attention", "elementwise", "head", "sampling", "packing", "rest")
OPS = {
    "rms_norm": "elementwise",
    "add_rms_norm": "elementwise",
    "silu_mul": "elementwise",
    "gelu_tanh_mul": "elementwise",
    "rope_write_kv": "elementwise",
    "paged_attention": "attention",
    "sgmv": "sgmv",
}
"""The part that each op belongs to."""
BLOCK_SIZE = 16
QUIET_LIMIT_S = 30.0

Seconds = Mapping[str, float]
"""Of each part, and of the `whole`."""
Turn = Sequence[Seconds]
"""The counted steps of one scenario's turn."""


@dataclass(slots=True)
class Watch:
    """Seconds of each part of one step; parts do not hold one another."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    last_ended_s: dict[str, float] = field(default_factory=dict)

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed_call(*args: Any, **kwargs: Any) -> Any:
            began_s = time.perf_counter()
            found = call(*args, **kwargs)
            ended_s = self.last_ended_s[part] = time.perf_counter()
            self.seconds[part] += ended_s - began_s
            return found

        return timed_call

    def time_methods(self, target: object, parts: Mapping[str, str]) -> None:
        """From now on calls of these methods of this one object are timed."""
        for name, part in parts.items():
            setattr(target, name, self.timed(part, getattr(target, name)))

    def step(self, run: Callable[[], object]) -> Seconds:
        """Runs a step. What follows the head is sampling, what is in no part is the rest."""
        self.seconds.clear()
        began_s = time.perf_counter()
        run()
        ended_s = time.perf_counter()
        self.seconds["sampling"] += ended_s - self.last_ended_s["head"]
        whole_s = ended_s - began_s
        parts = dict.fromkeys(PARTS, 0.0) | self.seconds
        return parts | {"rest": whole_s - sum(parts.values()), "whole": whole_s}


class TimedLinear:
    """A linear, each call on the watch."""

    def __init__(self, linear: Linear, watch: Watch) -> None:
        self._linear = linear
        self._call = watch.timed("linears", linear)
        self.bias_N = linear.bias_N

    @property
    def num_bytes(self) -> int:
        return self._linear.num_bytes

    @property
    def is_recordable(self) -> bool:
        return self._linear.is_recordable

    def __call__(self, x_TK: Tensor, rows: Segments | None) -> Tensor:
        return self._call(x_TK, rows)

    def row_blocks(self, rows: range, max_weights: int) -> Iterator[Tensor]:
        return self._linear.row_blocks(rows, max_weights)


@dataclass(frozen=True)
class Settings:
    model: str
    quantize: Quantization
    rows: int
    context: int
    rank: int
    threads: int
    turns: int
    """Scenarios take turns, so that no stretch of time is one scenario's alone."""
    warmup: int
    """Steps of a turn that are not counted."""
    reps: int
    """Steps of a turn that are."""


class Bench:
    """One base, ready to step, with an adapter for every row if there are adapters."""

    def __init__(self, settings: Settings, base: Path, *, has_adapters: bool) -> None:
        self.settings = settings
        self.watch = Watch()
        options = EngineOptions(
            model=str(base), max_batch_rows=settings.rows, quantize=settings.quantize
        )
        ops = select(best_cpu_backend(), threads=settings.threads)
        self.watch.time_methods(ops, OPS)
        self.decoder = load(options, "cpu", torch.bfloat16, ops)
        self.watch.time_methods(self.decoder, {"logits": "head"})
        self.decoder.wrap_linears(lambda _index, linear: TimedLinear(linear, self.watch))
        if has_adapters:
            self._attach()
        self._blocks = -(-settings.context // BLOCK_SIZE)
        self._kv = self._filled_cache()
        packer = Packer(settings.rows, self._blocks, BLOCK_SIZE)
        self.watch.time_methods(packer, {"pack": "packing"})
        device = torch.device("cpu")
        self._runner = Runner(self.decoder, self._kv, packer, settings.rows, device)

    def _attach(self) -> None:
        settings, decoder = self.settings, self.decoder
        manifest = manifest_of(decoder.sites, settings.rank)
        room = (manifest.num_bytes(torch.bfloat16.itemsize) + (8 << 20)) * settings.rows
        cpu = torch.device("cpu")
        pool = AdapterPool(room, torch.bfloat16, cpu, decoder.sites, settings.rows)
        pool.data.normal_(std=0.02)
        footprint = pool.footprint(manifest)
        for slot in range(settings.rows):
            allocation = pool.allocate(footprint)
            assert allocation is not None, "room was made for all"
            pool.publish(slot, pool.row(footprint.columns, allocation))
        lora.attach(decoder, pool.tables, pool.data)

    def _filled_cache(self) -> KVCache:
        num_blocks = self._blocks * self.settings.rows
        spec = self.decoder.spec
        cache = KVCache.allocate(spec, num_blocks, BLOCK_SIZE, torch.bfloat16, "cpu")
        for pages in (*cache.keys, *cache.values):
            pages.normal_()
        return cache

    def record(self) -> None:
        """From now on a step is as it is served, where it can be recorded."""
        self.decoder.record(self._kv, self.settings.rows)

    def plan(self, scenario: Scenario) -> StepPlan:
        context = self.settings.context
        rows: list[PlanRow] = []
        for lane in range(self.settings.rows):
            first = lane * self._blocks
            slot = {"one": 0, "distinct": lane}.get(scenario, BASE_SLOT)
            rows.append(
                PlanRow(
                    sequence_id=lane,
                    lane=lane,
                    start=context - 1,
                    token_ids=(lane % self.decoder.spec.vocab_size,),
                    blocks=range(first, first + self._blocks),
                    slot=slot,
                    sample=SampleRow(Sampling(max_new_tokens=1, seed=lane), context),
                    rank=0 if slot == BASE_SLOT else self.settings.rank,
                )
            )
        return StepPlan(0, tuple(rows))

    def step(self, plan: StepPlan) -> Seconds:
        runner = self._runner
        return self.watch.step(lambda: runner.collect(runner.submit(plan)))


def measure(settings: Settings, models: Path) -> dict[str, Any]:
    """Everything but the head of the record."""
    base = ensure_base(SHAPES[settings.model], models)
    bare = Bench(settings, base, has_adapters=False)
    loaded = Bench(settings, base, has_adapters=True)
    runs = {
        scenario: partial(bench.step, bench.plan(scenario))
        for scenario in SCENARIOS
        for bench in [bare if scenario == "bare" else loaded]
    }
    watch = CpuWatch(os.getpid())
    op_by_op = in_turn(settings, runs)
    bare.record()
    loaded.record()
    served = in_turn(settings, runs)
    shares = watch.stop()
    return {
        "settings": asdict(settings),
        "is_recorded": loaded.decoder.is_recorded,
        "clean": shares.clean,
        "cpu": shares.described(),
        "bare_to_base": round(ratio(served["bare"], served["base"]), 4),
        "scenarios": {name: _figures(op_by_op[name], served[name]) for name in runs},
    }


def in_turn(settings: Settings, runs: Mapping[str, Callable[[], Seconds]]) -> dict[str, list[Turn]]:
    """The counted steps of each scenario, turn by turn."""
    found: dict[str, list[Turn]] = {scenario: [] for scenario in runs}
    for _ in range(settings.turns):
        for scenario, run in runs.items():
            steps = [run() for _ in range(settings.warmup + settings.reps)]
            found[scenario].append(steps[settings.warmup :])
    return found


def typical(steps: Sequence[Seconds]) -> dict[str, float]:
    """Means over the middle half of the steps by their whole: unlike medians they add up."""
    ordered = sorted(steps, key=lambda step: step["whole"])
    quarter = len(ordered) // 4
    middle = ordered[quarter : len(ordered) - quarter]
    return {part: statistics.fmean(step[part] for step in middle) for part in ordered[0]}


def ratio(ours: Sequence[Turn], theirs: Sequence[Turn]) -> float:
    """Of the time of a step: the median of ratios that are each taken within a turn."""
    pairs = zip(ours, theirs, strict=True)
    return statistics.median(
        typical(one)["whole"] / typical(other)["whole"] for one, other in pairs
    )


def _figures(op_by_op: Sequence[Turn], served: Sequence[Turn]) -> dict[str, Any]:
    parts = typical([*chain.from_iterable(op_by_op)])
    return {
        "parts_ms": {part: _ms(parts[part]) for part in PARTS},
        "op_by_op_ms": _ms(parts["whole"]),
        "served_ms": _ms(typical([*chain.from_iterable(served)])["whole"]),
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 4)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.step_parts",
        description="Where a decode step's time goes on a CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", choices=sorted(SHAPES), default="small", help="shape of the random base")
    add("--quantize", choices=get_args(Quantization), default="none", help="the base's linears")
    add("--rows", type=int, default=32, help="sequences in a step")
    add("--context", type=int, default=96, help="tokens that each row sees")
    add("--rank", type=int, default=16, help="of every adapter")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the step")
    add("--turns", type=int, default=10, help="of each scenario")
    add("--warmup", type=int, default=3, help="steps of a turn that are not counted")
    add("--reps", type=int, default=15, help="steps of a turn that are counted")
    add("--models", type=Path, default=MODELS, help="folder of the made models")
    add("--out", type=Path, help="JSON file")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    arguments = vars(parse(argv))
    models, out = arguments.pop("models"), arguments.pop("out")
    settings = Settings(**arguments)
    torch.set_num_threads(settings.threads)
    head = record.facts("benchmarks.step_parts", argv)
    wait_until_quiet(QUIET_LIMIT_S)
    found = head | measure(settings, models)
    for scenario, figures in found["scenarios"].items():
        parts = ", ".join(f"{name} {value:.3f}" for name, value in figures["parts_ms"].items())
        print(f"{scenario:9s} served {figures['served_ms']:.3f} ms, op by op "
              f"{figures['op_by_op_ms']:.3f} ms: {parts}")  # fmt: skip
    if out is not None:
        record.write(out, found)
        print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
