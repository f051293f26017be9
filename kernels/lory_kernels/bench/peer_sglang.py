"""SGLang's LoRA kernels: csgmv in chunks of 16 rows, its default, and triton_v2 by its own plans.

Its pool gives every slot the largest rank; an adapter of a lower one has its slices packed within.
triton_v2 would overlap its first product with the base's, which is not here to overlap with. What
its engine makes once a step, segments and routes, is timed apart. It must not know how calls are
timed.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lory_kernels.bench.case import Contender, Place, Run
from lory_kernels.bench.foreign import ForeignPackage, nothing
from lory_kernels.bench.sgmv import SCALE, SgmvInputs

OPS = "sglang.kernels.ops.lora"
SERVER = "sglang.srt.lora"
CHUNK_ROWS = 16
INT = torch.int32


class Phase(StrEnum):
    """As its plans name them."""

    DECODE = "decode"
    PREFILL = "prefill"


@dataclass(slots=True)
class Batch:
    """What csgmv reads of its LoRABatchInfo."""

    use_cuda_graph: bool
    num_segments: int
    max_len: int
    seg_indptr: Tensor
    weight_indices: Tensor
    permutation: Tensor
    lora_ranks: Tensor
    scalings: Tensor


def load(root: Path, place: Place) -> tuple[Contender[SgmvInputs], ...]:
    """From the folder that holds the package."""
    modules = _kernels(root, place)
    return (
        Contender(
            "sglang csgmv",
            "peer",
            lambda inputs: _bind_chunks(modules, inputs),
            per_step=_bind_segments,
        ),
        Contender(
            "sglang triton_v2",
            "peer",
            lambda inputs: _bind_planned(modules, inputs),
            per_step=lambda inputs: _bind_route(modules, inputs),
        ),
    )


def _kernels(root: Path, place: Place) -> SimpleNamespace:
    package = ForeignPackage(root, "sglang")
    package.folders(["sglang.srt", SERVER, f"{SERVER}.dense", "sglang.kernels"])
    package.folders(["sglang.kernels.ops", OPS, *(f"{OPS}.{name}" for name in FOLDERS)])
    package.folders(["sglang.kernels.jit"])
    package.stand_in("sglang.srt.environ", envs=_Unset())
    package.stand_in(
        "sglang.srt.utils",
        cached_triton_kernel=lambda _key: lambda kernel: kernel,
        get_device_name=partial(_device_name, place.device),
    )
    package.stand_in(
        f"{SERVER}.utils",
        LoRABatchInfo=Batch,
        Phase=Phase,
        architecture_for_capability=_architecture,
    )
    package.stand_in("sglang.kernels.jit.utils", is_arch_support_pdl=lambda: False)
    package.stand_in(f"{OPS}.moe.virtual_experts", _align_block_size_jit=_needs_nvcc)
    runner = package.module(f"{SERVER}.dense.runner")
    if place.is_interpreted:
        geometry = package.module(f"{OPS}.common.lora_b").SliceGeometry
        vars(runner)["slice_geometry"] = partial(_geometry, geometry)
    return SimpleNamespace(
        shrink=package.module(f"{OPS}.dense.chunked_sgmv_shrink").chunked_sgmv_lora_shrink_forward,
        expand=package.module(f"{OPS}.dense.chunked_sgmv_expand").chunked_sgmv_lora_expand_forward,
        runner=runner.DenseLoraRunner,
        linear=package.module(f"{SERVER}.dense.plan").DenseLoraKind.LINEAR,
        workspace=package.module(f"{SERVER}.workspace").LoraWorkspace,
    )


FOLDERS = ("dense", "common", "moe")


class _Unset:
    """Its settings, none of them set."""

    def __getattr__(self, _name: str) -> SimpleNamespace:
        return SimpleNamespace(get=nothing)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _architecture(major: int) -> str:
    if major < 9:
        return "default"
    return "sm90" if major == 9 else "sm100"


def _needs_nvcc(*_args: object, **_kwargs: object) -> None:
    raise RuntimeError("SGLang routes more than 512 rows by a CUDA kernel, which is not run here")


def _geometry(
    geometry: type, offsets: tuple[int, ...], columns: int, device: torch.device
) -> object:
    """Its table of slices, which it makes on a CUDA device alone."""
    widths = [end - begin for begin, end in pairwise(offsets)]
    is_uniform = len(set(widths)) == 1
    return geometry(
        slice_offsets=torch.tensor(offsets, dtype=INT, device=device),
        out_offsets=torch.tensor(offsets[:-1], dtype=INT, device=device),
        num_slices=len(widths),
        num_column_tiles=sum(-(-width // columns) for width in widths),
        uniform_width=widths[0] if is_uniform else 0,
        out_stride=widths[0] if is_uniform else 0,
        full_tiles=all(width % columns == 0 for width in widths),
        block_size_n=columns,
    )


def _offsets(inputs: SgmvInputs) -> tuple[int, ...]:
    return (*inputs.site.out_offsets, sum(inputs.site.out_features))


def _weights(inputs: SgmvInputs, slots: int) -> tuple[Tensor, Tensor]:
    """(A [slots, slices * rank, in], B [slots, out, rank]), zero where a slot has no more."""
    site, offsets = inputs.site, _offsets(inputs)
    slices, most = len(site.out_features), max(inputs.ranks)
    a_SRH = inputs.pool.new_zeros((slots, slices * most, site.in_features))
    b_SNR = inputs.pool.new_zeros((slots, offsets[-1], most))
    for slot, rank in enumerate(inputs.ranks):
        for k in range(slices):
            a_RH, b_RN = inputs.factors(slot, k)
            a_SRH[slot, k * rank : (k + 1) * rank] = a_RH
            b_SNR[slot, offsets[k] : offsets[k + 1], :rank] = b_RN.T
    return a_SRH, b_SNR


def _slots(inputs: SgmvInputs, base_slots: int) -> tuple[Tensor, Tensor]:
    """(Rank, scale) of each slot; csgmv keeps one of rank 0 for base rows."""
    device = inputs.x_TH.device
    ranks = torch.tensor([*inputs.ranks, *[0] * base_slots], dtype=INT, device=device)
    return ranks, torch.full(ranks.shape, SCALE, device=device)


# -- csgmv ------------------------------------------------------------------------------------


def _bind_chunks(modules: SimpleNamespace, inputs: SgmvInputs) -> Run:
    x_TH, y_TN = inputs.x_TH, inputs.y_TN
    a_SRH, b_SNR = _weights(inputs, len(inputs.ranks) + 1)
    batch, slices = _batch(inputs), len(inputs.site.out_features)
    on_host = torch.tensor(_offsets(inputs), dtype=INT)
    offsets, widest = on_host.to(x_TH.device), max(inputs.site.out_features)

    def run() -> tuple[Tensor, ...]:
        h_TR = modules.shrink(x_TH, a_SRH, batch, slices)
        modules.expand(h_TR, b_SNR, batch, offsets, widest, y_TN, slice_offsets_cpu=on_host)
        return (y_TN,)

    return run


def _batch(inputs: SgmvInputs) -> Batch:
    device = inputs.x_TH.device
    ranks, scales = _slots(inputs, base_slots=1)
    starts, slots, order = _segments(inputs)
    return Batch(
        use_cuda_graph=False,
        num_segments=len(slots),
        max_len=CHUNK_ROWS,
        seg_indptr=starts.to(device),
        weight_indices=slots.to(device),
        permutation=order.to(device),
        lora_ranks=ranks,
        scalings=scales,
    )


def _segments(inputs: SgmvInputs) -> tuple[Tensor, Tensor, Tensor]:
    """(Starts, slots, order of rows): rows by slot, in chunks; base rows use the last slot."""
    slot_of_row = torch.tensor(inputs.mix.slot_of_row, dtype=INT)
    slot_of_row[slot_of_row < 0] = len(inputs.ranks)
    order = slot_of_row.argsort(stable=True)
    starts, slots = [0], []
    for slot, count in zip(*slot_of_row[order].unique_consecutive(return_counts=True), strict=True):
        for at in range(0, int(count), CHUNK_ROWS):
            slots.append(int(slot))
            starts.append(starts[-1] + min(CHUNK_ROWS, int(count) - at))
    return torch.tensor(starts, dtype=INT), torch.tensor(slots, dtype=INT), order.int()


def _bind_segments(inputs: SgmvInputs) -> Run:
    """As its backend does for a step: on the host, then copied."""
    device = inputs.x_TH.device
    return lambda: tuple(one.to(device, non_blocking=True) for one in _segments(inputs))


# -- triton_v2 --------------------------------------------------------------------------------


def _bind_planned(modules: SimpleNamespace, inputs: SgmvInputs) -> Run:
    x_TH, y_TN, offsets = inputs.x_TH, inputs.y_TN, _offsets(inputs)
    a_SRH, b_SNR = _weights(inputs, len(inputs.ranks))
    runner, plan = _runner(modules, inputs)

    def run() -> tuple[Tensor, ...]:
        bridge = runner.run_a(x_TH, a_SRH, stack=len(offsets) - 1, plan=plan)
        runner.run_b(bridge, b_SNR, y_TN, offsets=offsets, plan=plan)
        return (y_TN,)

    return run


def _runner(modules: SimpleNamespace, inputs: SgmvInputs) -> tuple[Any, Any]:
    """(Its runner at the start of a step, the plan it takes)."""
    device, rows, slices = inputs.x_TH.device, inputs.x_TH.shape[0], len(inputs.site.out_features)
    ranks, scales = _slots(inputs, base_slots=0)
    runner = modules.runner(modules.workspace(), max_loras=len(inputs.ranks), device=device)
    runner.begin_batch(
        token_slots=torch.tensor(inputs.mix.slot_of_row, dtype=INT, device=device),
        lora_ranks=ranks,
        scalings=scales,
        num_tokens=rows,
        phase=Phase.DECODE,
        graph_mode=False,
    )
    plan = runner.plan_for(
        modules.linear,
        max(inputs.ranks),
        inputs.site.in_features,
        _offsets(inputs)[slices],
        num_tokens=rows,
    )
    return runner, plan


def _bind_route(modules: SimpleNamespace, inputs: SgmvInputs) -> Run:
    runner, plan = _runner(modules, inputs)
    slot_of_row = torch.tensor(inputs.mix.slot_of_row, dtype=INT)

    def run() -> tuple[Tensor, ...]:
        runner.reset_routes()
        runner.token_slots.copy_(slot_of_row, non_blocking=True)
        if not plan.needs_aligned_route:
            return (runner.token_slots,)
        return (runner.route(plan.block_size).sorted_pair_ids,)

    return run
