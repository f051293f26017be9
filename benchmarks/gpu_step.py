"""The time of a decode step: an 8B-shaped NF4 base of random weights, made on the device itself.

For each batch and number of distinct adapters three times: `step`, from a plan to its tokens on the
host, which is what a stream waits for; `forward`, the model alone, between two events on the
device; and `op_by_op`, the same without CUDA graphs. Beside them the bytes that the step must read,
and how long they take at the rate that a copy reaches on this device. It must not know where
results go.

Legend: V vocabulary, H hidden, N packed width, K in features.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lory_kernels import Ops, select
from lory_server.adapters.format import AdapterManifest, AdapterSlice
from lory_server.adapters.header import TensorSpec
from lory_server.adapters.pool import AdapterPool
from lory_server.build import free_device_bytes
from lory_server.messages import Sampling
from lory_server.model import lora
from lory_server.model.decoder import Decoder, Layer
from lory_server.model.graphs import CudaCapture
from lory_server.model.kv import KVCache
from lory_server.model.linear import Linear, dense_linear
from lory_server.model.nf4 import BLOCK, NF4Weight, nf4_linear
from lory_server.model.norms import Norm
from lory_server.model.packing import Packer
from lory_server.model.rope import rope_table
from lory_server.model.runner import Runner
from lory_server.model.sites import Site
from lory_server.model.spec import ModelSpec, RopeSpec
from lory_server.plan import BASE_SLOT, PlanRow, SampleRow, StepPlan

BLOCK_SIZE = 16
WEIGHT_STD = 0.02
COPY_BYTES = 1 << 32
SHOWN_KERNELS = 12
SHOWN_CHARS = 80
HEAD_START_CYCLES = 2_000_000
"""About a millisecond, four times what the host takes to send a step."""

BYTES_FORMULA = (
    "linears (NF4 codes and scales) + head + batch * context * KV bytes of a position "
    "+ distinct * bytes of an adapter; each read once"
)


@dataclass(frozen=True)
class Scale:
    """What is built and measured."""

    spec: ModelSpec
    batches: tuple[int, ...]
    distinct: tuple[int, ...]
    context: int
    rank: int
    warmup: int
    most_reps: int
    seconds_a_point: float
    """No repetition beyond it starts, but three are always made."""


def llama_8b() -> ModelSpec:
    return ModelSpec(
        architecture="LlamaForCausalLM",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        norm_eps=1e-5,
        activation="silu",
        rope=RopeSpec("default", 128, 8192, {"rope_theta": 500000.0}),
        windows=(None,) * 32,
        attention_scale=128**-0.5,
    )


FULL = Scale(llama_8b(), (1, 8, 32, 64), (0, 1, 32), 512, 16, 3, 30, 8.0)
TINY = Scale(
    replace(
        llama_8b(),
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rope=RopeSpec("default", 16, 128, {"rope_theta": 10000.0}),
        windows=(None,) * 2,
        attention_scale=0.25,
    ),
    (1, 4),
    (0, 1, 4),
    24,
    4,
    1,
    3,
    1.0,
)


class Bench:
    """One base with adapters in its pool, ready to step."""

    def __init__(self, scale: Scale, device: torch.device) -> None:
        self.scale = scale
        self.device = device
        self._generator = torch.Generator(device).manual_seed(0)
        self.decoder = self._decoder()
        self.adapter_bytes = self._attach(max(scale.distinct))
        spec, blocks = scale.spec, -(-scale.context // BLOCK_SIZE)
        self._blocks_a_row = blocks
        most = max(scale.batches)
        self.kv = KVCache.allocate(spec, blocks * most, BLOCK_SIZE, torch.bfloat16, device)
        for pages in (*self.kv.keys, *self.kv.values):
            pages.normal_(generator=self._generator)
        self.runner, self.op_by_op = (
            Runner(self.decoder, self.kv, Packer(most, blocks, BLOCK_SIZE), most, device)
            for _ in range(2)
        )
        self.captured = self._capture() if device.type == "cuda" else {}

    def _capture(self) -> dict[str, float]:
        """How many graphs, how long they took and what they hold."""
        before, began_s = free_device_bytes(self.device), time.perf_counter()
        count = self.runner.capture(CudaCapture(self.device), has_adapters=True)
        seconds = time.perf_counter() - began_s
        mib = (before - free_device_bytes(self.device)) / (1 << 20)
        return {"graphs": count, "seconds": round(seconds, 2), "mib": round(mib, 1)}

    def step_of(self, plan: StepPlan) -> Callable[[], None]:
        return lambda: self._collect(plan)

    def _collect(self, plan: StepPlan) -> None:
        self.runner.collect(self.runner.submit(plan))

    def plan(self, batch: int, distinct: int) -> StepPlan:
        """`batch` sequences that each compute the last position of the context."""
        rows: list[PlanRow] = []
        for lane in range(batch):
            first = lane * self._blocks_a_row
            slot = lane % distinct if distinct else BASE_SLOT
            sampling = Sampling(max_new_tokens=1, seed=lane)
            rows.append(
                PlanRow(
                    sequence_id=lane,
                    lane=lane,
                    start=self.scale.context - 1,
                    token_ids=(lane % self.scale.spec.vocab_size,),
                    blocks=range(first, first + self._blocks_a_row),
                    slot=slot,
                    sample=SampleRow(sampling, self.scale.context),
                    rank=0 if slot == BASE_SLOT else self.scale.rank,
                )
            )
        return StepPlan(0, tuple(rows))

    def bytes_read(self, batch: int, distinct: int) -> dict[str, int]:
        spec, width = self.scale.spec, 2
        head = spec.vocab_size * spec.hidden_size * width
        embedding = head
        position = spec.kv_bytes_per_block(1, width)
        return {
            "linears": self.decoder.num_bytes - embedding - head,
            "head": head,
            "kv": batch * self.scale.context * position,
            "adapters": distinct * self.adapter_bytes,
        }

    def _decoder(self) -> Decoder:
        spec = self.scale.spec
        embedding_VH = self._normal(spec.vocab_size, spec.hidden_size)
        head_VH = self._normal(spec.vocab_size, spec.hidden_size)
        sites = spec.sites()
        ops = select("triton" if self.device.type == "cuda" else "torch")
        layers = tuple(self._layer(sites[4 * n : 4 * n + 4], ops) for n in range(spec.num_layers))
        rope_PD = rope_table(spec.rope, 2 * self.scale.context, self.device)
        head = dense_linear(head_VH, None, max(self.scale.batches), ops)
        return Decoder(spec, ops, embedding_VH, layers, self._ones(), head, rope_PD)

    def _layer(self, sites: tuple[Site, ...], ops: Ops) -> Layer:
        qkv, o, gate_up, down = (self._linear(site, ops) for site in sites)
        return Layer(qkv, o, gate_up, down, self._norm(), self._norm(), None, None, None, None)

    def _linear(self, site: Site, ops: Ops) -> Linear:
        size = site.in_features * site.out_features
        codes = torch.randint(
            0, 256, (size // 2,), dtype=torch.uint8, device=self.device, generator=self._generator
        )
        absmax = torch.full((size // BLOCK,), 2 * WEIGHT_STD, device=self.device)
        weight = NF4Weight(codes, absmax, site.out_features, site.in_features)
        return nf4_linear(weight, None, torch.bfloat16, ops)

    def _attach(self, count: int) -> int:
        """`count` adapters on all linears, in slots 0 and up; bytes of one."""
        sites = self.decoder.sites
        manifest = manifest_of(sites, self.scale.rank)
        num_bytes = manifest.num_bytes(2)
        room = (num_bytes + (8 << 20)) * count
        pool = AdapterPool(room, torch.bfloat16, self.device, sites, count)
        pool.data.normal_(std=WEIGHT_STD, generator=self._generator)
        footprint = pool.footprint(manifest)
        for slot in range(count):
            allocation = pool.allocate(footprint)
            assert allocation is not None
            pool.publish(slot, pool.row(footprint.columns, allocation))
        lora.attach(self.decoder, pool.tables, pool.data)
        return num_bytes

    def _normal(self, *shape: int) -> Tensor:
        weight = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        return weight.normal_(std=WEIGHT_STD, generator=self._generator)

    def _norm(self) -> Norm:
        return Norm("norm", self._ones())

    def _ones(self) -> Tensor:
        return torch.ones(self.scale.spec.hidden_size, dtype=torch.bfloat16, device=self.device)


def manifest_of(sites: tuple[Site, ...], rank: int) -> AdapterManifest:
    """An adapter of one rank on every projection, as if it had been read from a folder."""
    slices = tuple(
        AdapterSlice(
            index,
            k,
            rank,
            2.0,
            TensorSpec("a", "BF16", (rank, site.in_features), 0, 2 * rank * site.in_features),
            TensorSpec("b", "BF16", (part.out_features, rank), 0, 2 * rank * part.out_features),
        )
        for index, site in enumerate(sites)
        for k, part in enumerate(site.slices)
    )
    return AdapterManifest(slices, "", 0, b"")


def measure(
    scale: Scale, device: torch.device, say: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Every point, with the limits beside it; `say` is told all there is after each of them."""
    with torch.inference_mode():
        bench = Bench(scale, device)
        copy_rate = copy_bytes_per_s(device)
        found = _facts(bench, copy_rate)
        for batch, distinct in points_of(scale):
            found["points"].append(_point(bench, batch, distinct, copy_rate))
            say(found)
        found["waits"] = what_waits(bench)
        for point in found["points"]:
            # After all times: a profiler leaves the device slower than it was.
            plan = bench.plan(point["batch"], point["distinct_adapters"])
            point["kernels_ms"] = kernel_times(bench.step_of(plan), device)
    return found


def what_waits(bench: Bench) -> str:
    """What made a step wait for the device while it was submitted; nothing if none did."""
    if bench.device.type != "cuda":
        return ""
    plan = bench.plan(max(bench.scale.batches), max(bench.scale.distinct))
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


def _facts(bench: Bench, copy_rate: float) -> dict[str, Any]:
    scale = bench.scale
    return {
        "model": f"random NF4, {scale.spec.num_layers} layers of hidden {scale.spec.hidden_size}",
        "weight_bytes": bench.decoder.num_bytes,
        "adapter_bytes": bench.adapter_bytes,
        "rank": scale.rank,
        "context": scale.context,
        "copy_gb_per_s": round(copy_rate / 1e9, 1),
        "captured": bench.captured,
        "limit": f"limit_ms = bytes / copy rate; bytes = {BYTES_FORMULA}",
        "points": [],
    }


def points_of(scale: Scale) -> Iterator[tuple[int, int]]:
    """(batch, distinct adapters); never more adapters than rows."""
    for batch in scale.batches:
        for distinct in dict.fromkeys(min(count, batch) for count in scale.distinct):
            yield batch, distinct


def _point(bench: Bench, batch: int, distinct: int, copy_rate: float) -> dict[str, Any]:
    plan = bench.plan(batch, distinct)
    forward = _timed_on_device(bench, lambda: bench.runner.logits(plan), head_start=True)
    op_by_op = _timed_on_device(bench, lambda: bench.op_by_op.logits(plan), head_start=False)
    step_ms = _repeat(bench.scale, lambda: _wall_ms(bench.step_of(plan)))
    parts = bench.bytes_read(batch, distinct)
    limit_ms = sum(parts.values()) / copy_rate * 1e3
    forward_ms = statistics.median(forward)
    return {
        "batch": batch,
        "distinct_adapters": distinct,
        "step_ms": round(statistics.median(step_ms), 3),
        "forward_ms": round(forward_ms, 3),
        "op_by_op_ms": round(statistics.median(op_by_op), 3),
        "limit_ms": round(limit_ms, 3),
        "forward_to_limit": round(forward_ms / limit_ms, 2),
        "bytes": parts,
        "repetitions": len(step_ms),
    }


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


def kernel_times(step: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Milliseconds that one step spends in each kernel, the largest first."""
    on_cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(
        activities=[activity.CUDA, activity.CPU] if on_cuda else [activity.CPU]
    ) as profile:
        step()
    times: dict[str, float] = defaultdict(float)
    for row in profile.key_averages():
        # Rows of the host hold their kernels' time once more.
        if not on_cuda:
            times[row.key[:SHOWN_CHARS]] += row.self_cpu_time_total / 1e3
        elif row.device_type.name == "CUDA":
            times[row.key[:SHOWN_CHARS]] += row.self_device_time_total / 1e3
    largest = sorted(times.items(), key=lambda item: item[1], reverse=True)[:SHOWN_KERNELS]
    return {key: round(value, 4) for key, value in largest if value > 0}


def copy_bytes_per_s(device: torch.device) -> float:
    """Bytes read and written by a large copy, each second."""
    num_bytes = COPY_BYTES if device.type == "cuda" else COPY_BYTES >> 8
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times: list[float] = []
    for _ in range(5):
        _synchronize(device)
        began_s = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        times.append(time.perf_counter() - began_s)
    return 2 * num_bytes / min(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
