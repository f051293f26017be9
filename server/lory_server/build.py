"""Builds an engine from its options: device, model, memory, adapters, runner, scheduler.

The one place that knows every part. What cannot be built is an EngineError that names the fix.
"""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lory_kernels import Backend, KernelUnavailableError, best_cpu_backend, select
from lory_server.accounting import CostModel
from lory_server.adapters.cache import NUM_LOADERS, AdapterCache
from lory_server.adapters.extents import GRAIN_BYTES
from lory_server.adapters.fold import BaseFolder
from lory_server.adapters.full_weights import FullWeights
from lory_server.adapters.manifest import Base
from lory_server.adapters.pool import AdapterPool
from lory_server.adapters.reader import ThreadReader
from lory_server.adapters.reader_process import ProcessReader, can_read_apart
from lory_server.adapters.store import AdapterStore
from lory_server.adapters.tokenizer_files import read_base_tokenizer
from lory_server.blocks import BlockPool
from lory_server.engine import Engine, EngineLimits
from lory_server.host_memory import free_host_bytes
from lory_server.memory_plan import MemoryNeeds, MemoryPlan, MemoryPlanError, plan_memory
from lory_server.messages import EngineInfo, EngineOptions
from lory_server.model import lora
from lory_server.model.checkpoint import locate
from lory_server.model.decoder import Decoder
from lory_server.model.errors import ModelError
from lory_server.model.families import read_spec
from lory_server.model.graphs import Capture, CudaCapture, padded_rows, variants
from lory_server.model.kv import KVCache
from lory_server.model.load import load
from lory_server.model.packing import Packer
from lory_server.model.runner import Runner
from lory_server.model.warm_up import warm_up
from lory_server.scheduler import Scheduler, SchedulerLimits

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GIB = 1 << 30
CPU_POOL_BYTES = GIB
"""On a CPU the adapter pool is host memory again: no more of it than that by default."""

MIN_ADAPTER_BYTES = 64 * 1024

GRAPH_BYTES_A_LAYER = 512 * 1024
"""Of one captured step: a dozen launches, their arguments and the driver's own; not measured."""

SAMPLED_SCORE_BYTES = 64
"""Of a token's score in a row that samples: logits, log-softmax, sorted copies, float64 sums; 60
with typical_p and the sort's own scratch."""
SCORED_BYTES = 10
"""Of a token's score at a prompt position that is scored: twice in float32, once in the dtype."""
MAX_CONTEXT_SPLITS = 32
"""triton_attention.MAX_SPLITS; that module cannot be imported where there is no Triton."""

log = logging.getLogger("lory.engine")


class EngineError(RuntimeError):
    """The engine cannot be built; the message is one line with the fix."""


def build(options: EngineOptions, wake: Callable[[], None]) -> tuple[Engine, EngineInfo]:
    """`wake` is called from loader threads when an adapter's state has changed.

    Raises EngineError.
    """
    started = time.monotonic()
    try:
        device = resolve_device(options.device)
        if options.threads:
            torch.set_num_threads(options.threads)
        check_options(options)
        dtype = resolve_dtype(options, device)
        backend: Backend = "triton" if device.type == "cuda" else best_cpu_backend()
        decoder = load(options, device, dtype, select(backend, threads=torch.get_num_threads()))
        plan = plan_memory(memory_needs(options, decoder))
    except (ModelError, MemoryPlanError, KernelUnavailableError, ValueError, OSError) as error:
        raise EngineError(str(error)) from error
    engine = assemble(options, decoder, plan, wake)
    return engine, describe(options, decoder, plan, time.monotonic() - started)


def check_options(options: EngineOptions) -> None:
    """What the router's flags cannot promise: numbers that are wrong beside each other."""
    for name in ("max_batch_rows", "max_step_tokens", "block_size", "max_queued"):
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise EngineError(f"--{flag} must be at least 1, not {getattr(options, name)}")
    if options.max_step_tokens < options.max_batch_rows:
        raise EngineError(
            f"--max-step-tokens ({options.max_step_tokens}) must be at least --max-batch-rows "
            f"({options.max_batch_rows}): every running sequence needs one token a step"
        )


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise EngineError("--device cuda: no CUDA device is visible; use --device cpu")
    return torch.device(name)


def resolve_dtype(options: EngineOptions, device: torch.device) -> torch.dtype:
    """auto: the checkpoint's own, as far as the device computes in it without a detour."""
    if options.dtype != "auto":
        return DTYPES[options.dtype]
    name = read_spec(locate(options.model)).checkpoint_dtype
    if name not in DTYPES:
        raise EngineError(f"the checkpoint's dtype is {name}; give --dtype {' or '.join(DTYPES)}")
    stored = DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if stored == torch.float32 else stored
    has_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if stored != torch.float32 and has_bfloat16 else torch.float32


def memory_needs(options: EngineOptions, decoder: Decoder) -> MemoryNeeds:
    spec, dtype = decoder.spec, decoder.dtype
    return MemoryNeeds(
        device_bytes=options.memory_bytes or available_bytes(decoder),
        weight_bytes=decoder.num_bytes,
        workspace_bytes=workspace_bytes(options, decoder),
        graph_bytes=graph_bytes(options, decoder) if wants_graphs(options, decoder.device) else 0,
        block_bytes=spec.kv_bytes_per_block(options.block_size, dtype.itemsize),
        block_size=options.block_size,
        max_batch_rows=options.max_batch_rows,
        max_model_len=decoder.max_model_len,
        asked_model_len=options.max_model_len,
        adapter_pool_bytes=options.adapter_pool_bytes,
        adapter_pool_cap_bytes=CPU_POOL_BYTES if decoder.device.type == "cpu" else 0,
        full_weight_bytes=options.full_weight_bytes,
        end_bytes=end_bytes(decoder),
        kv_bytes=options.kv_bytes,
        serves_adapters=options.serves_adapters,
    )


def end_bytes(decoder: Decoder) -> int:
    """Of one head or embedding, as it lies among the full weights."""
    spec = decoder.spec
    grains = -(-spec.vocab_size * spec.hidden_size * decoder.dtype.itemsize // GRAIN_BYTES)
    return grains * GRAIN_BYTES


def available_bytes(decoder: Decoder) -> int:
    """What the engine may take by default, the weights it has already loaded included."""
    if decoder.device.type == "cuda":
        return decoder.num_bytes + int(free_device_bytes(decoder.device) * 0.9)
    return decoder.num_bytes + free_host_bytes() // 2


def workspace_bytes(options: EngineOptions, decoder: Decoder) -> int:
    """Activations of the widest layer, what the sampler or a scored prompt makes of the logits,
    and on CUDA what kernels keep aside."""
    activations = activation_bytes(options.max_step_tokens, decoder)
    scores = max(
        options.max_batch_rows * SAMPLED_SCORE_BYTES, options.max_step_tokens * SCORED_BYTES
    )
    aside = kernel_bytes(options, decoder) if decoder.device.type == "cuda" else 0
    return activations + scores * decoder.spec.vocab_size + aside


def activation_bytes(num_tokens: int, decoder: Decoder) -> int:
    widest = max(site.out_features for site in decoder.sites[:4])
    elements = num_tokens * (4 * decoder.spec.hidden_size + 2 * widest)
    return elements * decoder.dtype.itemsize


def wants_graphs(options: EngineOptions, device: torch.device) -> bool:
    return device.type == "cuda" and options.cuda_graphs


def graph_bytes(options: EngineOptions, decoder: Decoder) -> int:
    """All captured decode steps: each its own launches, together the activations of the largest."""
    sizes = padded_rows(options.max_batch_rows)
    count = len(sizes) * len(variants(options.serves_adapters))
    launches = count * decoder.spec.num_layers * GRAPH_BYTES_A_LAYER
    return launches + activation_bytes(sizes[-1], decoder)


def kernel_bytes(options: EngineOptions, decoder: Decoder) -> int:
    """The parts of split contexts, and the largest weight written out where it is quantized."""
    spec = decoder.spec
    parts = options.max_batch_rows * spec.num_heads * MAX_CONTEXT_SPLITS * (spec.head_dim + 1) * 4
    if options.quantize == "none":
        return parts
    largest = max(site.in_features * site.out_features for site in decoder.sites[:4])
    return parts + largest * decoder.dtype.itemsize


def assemble(
    options: EngineOptions, decoder: Decoder, plan: MemoryPlan, wake: Callable[[], None]
) -> Engine:
    spec, device = decoder.spec, decoder.device
    pool = make_pool(options, decoder, plan)
    lora.attach(decoder, pool.tables, pool.data)
    adapters = AdapterCache(
        AdapterStore(_folder(options.adapters_dir), fetched=_folder(options.fetched_dir)),
        pool,
        base_of(options, decoder),
        host_bytes(options, plan),
        BaseFolder(decoder.adapter_sites, decoder.adapter_linears, device),
        on_ready=wake,
        num_loaders=options.reader_processes if reads_apart(options) else NUM_LOADERS,
        make_reader=ProcessReader if reads_apart(options) else ThreadReader,
    )
    kv = KVCache.allocate(spec, plan.num_blocks, options.block_size, decoder.dtype, device)
    decoder.record(kv, options.max_step_tokens)
    packer = Packer(options.max_batch_rows, blocks_a_sequence(options, plan), options.block_size)
    runner = Runner(decoder, kv, packer, options.max_batch_rows, device, pool.full.by_slot)
    if device.type == "cuda":
        compile_kernels(decoder, kv, options)
    if wants_graphs(options, device):
        capture_graphs(runner, CudaCapture(device), options, device)
    scheduler = Scheduler(
        BlockPool(plan.num_blocks, options.block_size),
        SchedulerLimits(options.max_batch_rows, options.max_step_tokens, options.prefix_caching),
        spec.eos_token_ids,
    )
    adapters.wait_until_ready()
    linear_params = sum(site.in_features * site.out_features for site in decoder.sites)
    return Engine(
        scheduler,
        runner,
        adapters,
        CostModel.of(linear_params, spec.num_layers, spec.q_size),
        EngineLimits(
            vocab_size=spec.vocab_size,
            max_model_len=plan.max_model_len,
            max_queued=options.max_queued,
            pipeline_depth=1 if device.type == "cuda" else 0,
            serves_adapters=options.serves_adapters,
            short_tokens=decoder.short_tokens,
        ),
        clock=time.monotonic,
    )


def make_pool(options: EngineOptions, decoder: Decoder, plan: MemoryPlan) -> AdapterPool:
    unit_offset_norms = decoder.spec.unit_offset_norms
    full = FullWeights(
        plan.full_weight_bytes,
        decoder.dtype,
        decoder.device,
        unit_offset_norms=unit_offset_norms,
    )
    return AdapterPool(
        num_bytes=plan.adapter_pool_bytes,
        dtype=decoder.dtype,
        device=decoder.device,
        sites=decoder.adapter_sites,
        max_slots=max_slots(options, plan),
        full=full,
    )


def base_of(options: EngineOptions, decoder: Decoder) -> Base:
    """What adapters must fit."""
    spec = decoder.spec
    return Base(
        decoder.adapter_sites,
        base_names(options),
        options.allow_base_mismatch,
        spec.vocab_size,
        spec.norms(),
        spec.tied_head,
        read_base_tokenizer(locate(options.model)) if options.serves_adapters else None,
    )


def blocks_a_sequence(options: EngineOptions, plan: MemoryPlan) -> int:
    return -(-plan.max_model_len // options.block_size)


def compile_kernels(decoder: Decoder, kv: KVCache, options: EngineOptions) -> None:
    """Before the first request: a kernel compiled within a step stops every stream for seconds."""
    started = time.monotonic()
    count = warm_up(decoder, kv, options.max_step_tokens, options.serves_adapters)
    seconds = time.monotonic() - started
    log.info(
        "ran %d steps of padding in %.1f s, so that their kernels are compiled", count, seconds
    )


def capture_graphs(
    runner: Runner, capture: Capture, options: EngineOptions, device: torch.device
) -> None:
    """Says in the log what it took."""
    started, free_bytes = time.monotonic(), free_device_bytes(device)
    try:
        count = runner.capture(capture, has_adapters=options.serves_adapters)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        first = f" (after: {error.__context__})" if error.__context__ else ""
        raise EngineError(
            f"decode steps cannot be captured as CUDA graphs: {reason}{first}; use --no-cuda-graphs"
        ) from error
    taken_mib = (free_bytes - free_device_bytes(device)) / (1 << 20)
    seconds = time.monotonic() - started
    log.info("captured %d CUDA graphs in %.1f s, %.0f MiB", count, seconds, taken_mib)


def free_device_bytes(device: torch.device) -> int:
    """What no allocator holds."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def max_slots(options: EngineOptions, plan: MemoryPlan) -> int:
    """Slots are table entries: by default as many as rank-1 adapters could fill the pool with."""
    if options.max_resident_adapters:
        return options.max_resident_adapters
    return max(options.max_batch_rows, min(plan.adapter_pool_bytes // MIN_ADAPTER_BYTES, 4096))


def reads_apart(options: EngineOptions) -> bool:
    """Whether processes read adapters: where they are wanted, of use, and can be had."""
    return bool(options.serves_adapters and options.reader_processes and can_read_apart())


def host_bytes(options: EngineOptions, plan: MemoryPlan) -> int:
    """By default a quarter of the memory that is free now, but never less than the pool."""
    if options.adapter_host_bytes:
        return options.adapter_host_bytes
    return max(free_host_bytes() // 4, plan.adapter_pool_bytes)


def base_names(options: EngineOptions) -> tuple[str, ...]:
    """What an adapter's configuration may call this base."""
    path = Path(options.model)
    return (options.model, str(path.resolve())) if path.is_dir() else (options.model,)


def describe(
    options: EngineOptions, decoder: Decoder, plan: MemoryPlan, load_seconds: float
) -> EngineInfo:
    return EngineInfo(
        model=options.model,
        architecture=decoder.spec.architecture,
        device=str(decoder.device),
        dtype=str(decoder.dtype).removeprefix("torch."),
        quantize="nf4" if decoder.spec.prequantized else options.quantize,
        vocab_size=decoder.spec.vocab_size,
        max_model_len=plan.max_model_len,
        eos_token_ids=decoder.spec.eos_token_ids,
        num_blocks=plan.num_blocks,
        block_size=options.block_size,
        max_batch_rows=options.max_batch_rows,
        max_step_tokens=options.max_step_tokens,
        pid=os.getpid(),
        memory_table=plan.table(),
        load_seconds=load_seconds,
    )


def _folder(path: str) -> Path | None:
    return Path(path) if path else None
