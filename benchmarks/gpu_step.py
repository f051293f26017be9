"""The time of a decode step, and of a prompt, on a base of the 8B shape: whole, and by part.

For each batch and each number of adapters: `step`, from a plan to its tokens on the host, which is
what a stream waits for; `pipelined`, the same while the next is already submitted, as the engine's
loop has it; `forward`, the model alone, between two events on the device; and `op_by_op`, the same
without CUDA graphs. Beside them the bytes that the step must read, and how long they take at the
rate that a copy reaches on this device; and the parts, from a profile: what of a pipelined step
belongs to no kernel is idle. It must not know where results go.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.deadline import Deadline
from benchmarks.gpu_base import (
    DTYPE,
    RandomBase,
    linear_weights,
    llama_8b,
    manifest_of,
    model_name,
    tiny_llama,
)
from benchmarks.gpu_trace import HEAD_START_CYCLES, NoMarksError, traced_apart
from lory_kernels.bench.case import Place
from lory_kernels.bench.limits import Limits, measured_limits
from lory_server.adapters.pool import AdapterPool
from lory_server.build import free_device_bytes
from lory_server.messages import Sampling
from lory_server.model import lora
from lory_server.model.graphs import CudaCapture
from lory_server.model.kv import KVCache
from lory_server.model.packing import Packer
from lory_server.model.runner import Runner
from lory_server.model.spec import ModelSpec
from lory_server.plan import BASE_SLOT, PlanRow, SampleRow, StepPlan

BLOCK_SIZE = 16
LAST_SHARE = 0.75
"""Of the time; what is left is for the profiles."""

BYTES_FORMULA = (
    "linears (NF4 codes and scales) + head + rows * context * KV bytes of a position "
    "+ bytes of the adapters in the step; each read once"
)
LIMIT_FORMULA = (
    f"limit_ms = bytes / copy rate; bytes = {BYTES_FORMULA}. Of a prompt: that, or 2 * weights "
    "of the linears * tokens at the rate of a large product, whichever is longer"
)


@dataclass(frozen=True)
class Scale:
    """What is built and measured."""

    spec: ModelSpec
    batches: tuple[int, ...]
    distinct: tuple[int, ...]
    context: int
    rank: int
    mixed: tuple[int, ...]
    """The ranks of adapters that differ, in turn."""
    prompt: int
    """Tokens of a prefill."""
    prompts: tuple[tuple[int, int], ...]
    """(Rows, adapters) that its tokens are shared by."""
    warmup: int
    most_reps: int
    seconds_a_point: float
    """No repetition beyond it starts, but three are always made."""
    profiled_steps: int
    budget_s: float
    """No point beyond it starts."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of the adapter in each slot: those of one rank, then mixed ones."""
        most = max(self.distinct)
        return (self.rank,) * most + tuple(self.mixed[i % len(self.mixed)] for i in range(most))

    @property
    def max_positions(self) -> int:
        return max(2 * self.context, self.prompt)


FULL = Scale(
    spec=llama_8b(),
    batches=(32, 64, 1, 8, 128),
    distinct=(0, 1, 32, 8, 64),
    context=512,
    rank=16,
    mixed=(8, 16, 32, 64),
    prompt=2000,
    prompts=((1, 0), (1, 1), (8, 8)),
    warmup=3,
    most_reps=30,
    seconds_a_point=2.0,
    profiled_steps=3,
    budget_s=400.0,
)
TINY = Scale(
    spec=tiny_llama(),
    batches=(1, 4),
    distinct=(0, 1, 4),
    context=24,
    rank=4,
    mixed=(2, 4, 8),
    prompt=20,
    prompts=((1, 0), (2, 2)),
    warmup=1,
    most_reps=3,
    seconds_a_point=1.0,
    profiled_steps=1,
    budget_s=60.0,
)


@dataclass(frozen=True)
class Cell:
    """A decode step of so many rows over so many adapters, of one rank or of mixed ones."""

    batch: int
    distinct: int
    is_mixed: bool = False

    def __str__(self) -> str:
        ranks = " of mixed ranks" if self.is_mixed else ""
        return f"batch {self.batch}, {self.distinct} adapters{ranks}"


class Bench:
    """One base with adapters in its pool, ready to step."""

    def __init__(self, scale: Scale, device: torch.device) -> None:
        self.scale = scale
        self.device = device
        most = max(scale.batches)
        base = RandomBase.of(scale.spec, device, scale.max_positions, most)
        self.decoder = base.decoder()
        self.adapter_bytes = self._attach(base)
        self._blocks_a_row = -(-scale.context // BLOCK_SIZE)
        prompt_blocks = [rows * _blocks(scale.prompt // rows) for rows, _ in scale.prompts]
        num_blocks = max(self._blocks_a_row * most, *prompt_blocks)
        self.kv = KVCache.allocate(scale.spec, num_blocks, BLOCK_SIZE, DTYPE, device)
        for pages in (*self.kv.keys, *self.kv.values):
            pages.normal_(generator=base.generator)
        self.runner, self.op_by_op = (self._runner(self._blocks_a_row) for _ in range(2))
        self.prompts = self._runner(_blocks(scale.prompt))
        self.captured = self._capture() if device.type == "cuda" else {}

    def _runner(self, most_blocks: int) -> Runner:
        most = max(self.scale.batches)
        packer = Packer(most, most_blocks, BLOCK_SIZE)
        return Runner(self.decoder, self.kv, packer, most, self.device)

    def _capture(self) -> dict[str, float]:
        """How many graphs, how long they took and what they hold."""
        before, began_s = free_device_bytes(self.device), time.perf_counter()
        count = self.runner.capture(CudaCapture(self.device), has_adapters=True)
        seconds = time.perf_counter() - began_s
        mib = (before - free_device_bytes(self.device)) / (1 << 20)
        return {"graphs": count, "seconds": round(seconds, 2), "mib": round(mib, 1)}

    def plan(self, cell: Cell) -> StepPlan:
        """Sequences that each compute the last position of the context."""
        width, context = self._blocks_a_row, self.scale.context
        rows = [
            self._row(
                lane,
                self._slot(cell, lane),
                start=context - 1,
                token_ids=(lane % self.scale.spec.vocab_size,),
                blocks=range(lane * width, (lane + 1) * width),
            )
            for lane in range(cell.batch)
        ]
        return StepPlan(0, tuple(rows))

    def prompt_plan(self, num_rows: int, distinct: int) -> StepPlan:
        """All tokens of the prompts at once, from their first position."""
        length = self.scale.prompt // num_rows
        width, vocab_size = _blocks(length), self.scale.spec.vocab_size
        rows = [
            self._row(
                lane,
                self._slot(Cell(num_rows, distinct), lane),
                start=0,
                token_ids=tuple((lane + place) % vocab_size for place in range(length)),
                blocks=range(lane * width, (lane + 1) * width),
            )
            for lane in range(num_rows)
        ]
        return StepPlan(0, tuple(rows))

    def _row(
        self, lane: int, slot: int, *, start: int, token_ids: Sequence[int], blocks: range
    ) -> PlanRow:
        sampling = Sampling(max_new_tokens=1, seed=lane)
        return PlanRow(
            sequence_id=lane,
            lane=lane,
            start=start,
            token_ids=token_ids,
            blocks=blocks,
            slot=slot,
            sample=SampleRow(sampling, start + len(token_ids)),
            rank=0 if slot == BASE_SLOT else self.scale.ranks[slot],
        )

    def _slot(self, cell: Cell, lane: int) -> int:
        if not cell.distinct:
            return BASE_SLOT
        first = max(self.scale.distinct) if cell.is_mixed else 0
        return first + lane % cell.distinct

    def bytes_read(self, plan: StepPlan) -> dict[str, int]:
        spec, width = self.scale.spec, DTYPE.itemsize
        head = spec.vocab_size * spec.hidden_size * width
        embedding = head
        position = spec.kv_bytes_per_block(1, width)
        slots = {row.slot for row in plan.rows} - {BASE_SLOT}
        return {
            "linears": self.decoder.num_bytes - embedding - head,
            "head": head,
            "kv": sum(row.start + len(row.token_ids) for row in plan.rows) * position,
            "adapters": sum(self.adapter_bytes[self.scale.ranks[slot]] for slot in slots),
        }

    def _attach(self, base: RandomBase) -> dict[int, int]:
        """Adapters on all linears, each in its slot; bytes of one of each rank."""
        sites, ranks = self.decoder.sites, self.scale.ranks
        manifests = {rank: manifest_of(sites, rank) for rank in set(ranks)}
        num_bytes = {rank: one.num_bytes(DTYPE.itemsize) for rank, one in manifests.items()}
        room = sum(num_bytes[rank] + (8 << 20) for rank in ranks)
        pool = AdapterPool(room, DTYPE, self.device, sites, len(ranks))
        pool.data.normal_(std=0.02, generator=base.generator)
        footprints = {rank: pool.footprint(manifests[rank]) for rank in manifests}
        for slot, rank in enumerate(ranks):
            allocation = pool.allocate(footprints[rank])
            assert allocation is not None, "room was made for all"
            pool.publish(slot, pool.row(footprints[rank].columns, allocation))
        lora.attach(self.decoder, pool.tables, pool.data)
        return num_bytes


def _blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)


Keep = Callable[[dict[str, Any]], None]
Say = Callable[[str], None]


def measure(
    scale: Scale, device: torch.device, keep: Keep, say: Say, deadline: Deadline
) -> dict[str, Any]:
    """Every point, with the limits beside it; `keep` is given all there is after each of them."""
    with torch.inference_mode():
        limits = measured_limits(Place.at("torch", device, DTYPE))
        bench = Bench(scale, device)
        found = _facts(bench, limits)
        for cell in cells_of(scale):
            if deadline.part(LAST_SHARE).is_over:
                found["not_reached"].append(str(cell))
                continue
            found["points"].append(_point(bench, cell, limits))
            say(_line(found["points"][-1]))
            keep(found)
        for rows, distinct in scale.prompts:
            if deadline.part(LAST_SHARE).is_over:
                found["not_reached"].append(f"{rows} prompts, {distinct} adapters")
                continue
            found["prompts"].append(_prompt(bench, rows, distinct, limits))
            say(_line(found["prompts"][-1]))
            keep(found)
        found["waits"] = what_waits(bench)
        _add_parts(bench, found, keep, deadline)
    return found


def _add_parts(bench: Bench, found: dict[str, Any], keep: Keep, deadline: Deadline) -> None:
    """After all times: a profiler leaves the device slower than it was."""
    points = [*found["points"], *found["prompts"]]
    if deadline.is_over or not points:
        found["not_reached"].append("parts")
        return
    try:
        steps = [_step_again(bench, point) for point in points]
        traces = traced_apart(steps, bench.device, bench.scale.profiled_steps)
    except NoMarksError as error:
        found["not_reached"].append(f"parts: {error}")
        return
    for point, trace in zip(points, traces, strict=True):
        idle_ms = max(0.0, point["pipelined_ms"] - trace.busy_ms())
        point["parts_ms"] = trace.parts_ms() | {"idle": round(idle_ms, 4)}
        point["kernels_ms"] = trace.largest_ms()
    keep(found)


def _step_again(bench: Bench, point: dict[str, Any]) -> Callable[[], object]:
    if "tokens" in point:
        plan = bench.prompt_plan(point["rows"], point["distinct_adapters"])
        return _step_of(bench.prompts, plan)
    return _step_of(bench.runner, bench.plan(_cell_of(point)))


def _cell_of(point: dict[str, Any]) -> Cell:
    return Cell(point["batch"], point["distinct_adapters"], point["ranks"] == "mixed")


def _named(point: dict[str, Any]) -> str:
    if "tokens" in point:
        return f"{point['rows']} prompts, {point['distinct_adapters']} adapters"
    return str(_cell_of(point))


def _line(point: dict[str, Any]) -> str:
    return (
        f"{_named(point)}: step {point['step_ms']:.2f} ms, forward {point['forward_ms']:.2f} ms, "
        f"limit {point['limit_ms']:.2f} ms"
    )


def what_waits(bench: Bench) -> str:
    """What made a step wait for the device while it was submitted; nothing if none did."""
    if bench.device.type != "cuda":
        return ""
    plan = bench.plan(Cell(max(bench.scale.batches), max(bench.scale.distinct)))
    for runner in (bench.runner, bench.op_by_op):
        runner.collect(runner.submit(plan))
        torch.cuda.set_sync_debug_mode("error")
        try:
            ticket = runner.submit(plan)
        except RuntimeError as error:
            return str(error).partition("\n")[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        runner.collect(ticket)
    return ""


def _facts(bench: Bench, limits: Limits) -> dict[str, Any]:
    scale = bench.scale
    return {
        "model": model_name(scale.spec),
        "weight_bytes": bench.decoder.num_bytes,
        "adapter_bytes": bench.adapter_bytes[scale.rank],
        "rank": scale.rank,
        "mixed_ranks": list(scale.mixed),
        "context": scale.context,
        "copy_gb_per_s": round(limits.copy_bytes_per_s / 1e9, 1),
        "tflop_per_s": round(limits.flops_per_s / 1e12, 1),
        "captured": bench.captured,
        "limit": LIMIT_FORMULA,
        "points": [],
        "prompts": [],
        "not_reached": [],
    }


def cells_of(scale: Scale) -> Iterator[Cell]:
    """Never more adapters than rows; those of mixed ranks after all of one rank."""
    for is_mixed in (False, True):
        for batch in scale.batches:
            for distinct in dict.fromkeys(min(count, batch) for count in scale.distinct):
                if not is_mixed or distinct > 1:
                    yield Cell(batch, distinct, is_mixed)


def _point(bench: Bench, cell: Cell, limits: Limits) -> dict[str, Any]:
    plan = bench.plan(cell)
    forward = _timed_on_device(bench, lambda: bench.runner.logits(plan), head_start=True)
    op_by_op = _timed_on_device(bench, lambda: bench.op_by_op.logits(plan), head_start=False)
    parts = bench.bytes_read(plan)
    limit_ms = sum(parts.values()) / limits.copy_bytes_per_s * 1e3
    return {
        "batch": cell.batch,
        "distinct_adapters": cell.distinct,
        "ranks": "mixed" if cell.is_mixed else str(bench.scale.rank),
        **_steps(bench, bench.runner, plan),
        **_against(limit_ms, forward, parts),
        "op_by_op_ms": _median(op_by_op),
    }


def _prompt(bench: Bench, rows: int, distinct: int, limits: Limits) -> dict[str, Any]:
    plan = bench.prompt_plan(rows, distinct)
    forward = _timed_on_device(bench, lambda: bench.prompts.logits(plan), head_start=False)
    parts = bench.bytes_read(plan)
    flops = 2 * linear_weights(bench.scale.spec) * plan.num_tokens
    least_s = max(sum(parts.values()) / limits.copy_bytes_per_s, flops / limits.flops_per_s)
    return {
        "tokens": plan.num_tokens,
        "rows": rows,
        "distinct_adapters": distinct,
        "ranks": str(bench.scale.rank),
        **_steps(bench, bench.prompts, plan),
        **_against(least_s * 1e3, forward, parts),
    }


def _steps(bench: Bench, runner: Runner, plan: StepPlan) -> dict[str, Any]:
    step_ms = _repeat(bench.scale, lambda: _wall_ms(_step_of(runner, plan)))
    return {
        "step_ms": _median(step_ms),
        "pipelined_ms": round(_pipelined_ms(bench.scale, runner, plan, len(step_ms)), 3),
        "repetitions": len(step_ms),
    }


def _against(limit_ms: float, forward: Sequence[float], parts: dict[str, int]) -> dict[str, Any]:
    return {
        "forward_ms": _median(forward),
        "limit_ms": round(limit_ms, 3),
        "forward_to_limit": round(statistics.median(forward) / limit_ms, 2),
        "bytes": parts,
    }


def _step_of(runner: Runner, plan: StepPlan) -> Callable[[], object]:
    return lambda: runner.collect(runner.submit(plan))


def _pipelined_ms(scale: Scale, runner: Runner, plan: StepPlan, steps: int) -> float:
    """Of a step, each submitted before the one before it is collected."""
    ticket = runner.submit(plan)

    def turn() -> None:
        nonlocal ticket
        following = runner.submit(plan)
        runner.collect(ticket)
        ticket = following

    for _ in range(scale.warmup):
        turn()
    began_s = time.perf_counter()
    for _ in range(steps):
        turn()
    seconds = time.perf_counter() - began_s
    runner.collect(ticket)
    return seconds * 1e3 / steps


def _median(times: Sequence[float]) -> float:
    return round(statistics.median(times), 3)


def _repeat(scale: Scale, run: Callable[[], float]) -> list[float]:
    for _ in range(scale.warmup):
        run()
    times: list[float] = []
    began_s = time.perf_counter()
    while len(times) < scale.most_reps:
        if len(times) >= 3 and time.perf_counter() - began_s > scale.seconds_a_point:
            break
        times.append(run())
    return times


def _wall_ms(run: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    run()
    return (time.perf_counter() - began_s) * 1e3


def _timed_on_device(bench: Bench, run: Callable[[], object], *, head_start: bool) -> list[float]:
    """Between two events on the device; on a CPU the wall time.

    With a head start the device is kept busy until the host has sent all of it, so that none of
    the host's time is in it.
    """
    if bench.device.type != "cuda":
        return _repeat(bench.scale, lambda: _wall_ms(run))

    def once() -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if head_start:
            torch.cuda._sleep(HEAD_START_CYCLES)
        began.record()
        run()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended)

    return _repeat(bench.scale, once)
