"""Cases of norms, rotary embedding with the write to the cache, and gated activations.

It must not know how calls are timed. Legend in contract.py.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lory_kernels.bench.case import Case, Label, Place, Run
from lory_kernels.bench.shapes import ModelShape
from lory_kernels.contract import Ops
from lory_kernels.reference import TorchOps

EPS = 1e-5
BLOCK_SIZE = 16
ROPE_POSITIONS = 4096


@dataclass(frozen=True, slots=True, eq=False)
class NormInputs:
    residual_TH: Tensor
    x_TH: Tensor
    weight_H: Tensor
    out_TH: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RopeInputs:
    qkv_TN: Tensor
    positions_T: Tensor
    cos_sin_PD: Tensor
    k_cache: Tensor
    v_cache: Tensor
    kv_slots_T: Tensor
    model: ModelShape


@dataclass(frozen=True, slots=True, eq=False)
class GatedInputs:
    gate_up_TN: Tensor
    out_TI: Tensor


def norm_case(place: Place, model: ModelShape, rows: int) -> Case[NormInputs]:
    return Case(
        Label("norm", f"{model.name} add_rms_norm, width {model.hidden}", rows),
        place.dtype,
        make_inputs=lambda: NormInputs(
            residual_TH=place.normal(rows, model.hidden),
            x_TH=place.normal(rows, model.hidden),
            weight_H=place.normal(model.hidden),
            out_TH=place.normal(rows, model.hidden),
        ),
        expected=lambda inputs: _bind_norm(TorchOps(), inputs)(),
        spoiled=lambda inputs: replace(inputs, weight_H=inputs.weight_H.roll(1)),
        contenders=tuple(place.contenders(_bind_norm)),
        num_bytes=(4 * rows + 1) * model.hidden * place.itemsize,
        flops=5 * rows * model.hidden,
    )


def _bind_norm(ops: Ops, inputs: NormInputs) -> Run:
    def run() -> tuple[Tensor, ...]:
        ops.add_rms_norm(inputs.residual_TH, inputs.x_TH, inputs.weight_H, EPS, inputs.out_TH)
        return inputs.residual_TH, inputs.out_TH

    return run


def rope_case(place: Place, model: ModelShape, rows: int) -> Case[RopeInputs]:
    width = model.hidden + 2 * model.kv_width
    written = width + model.kv_width
    tables = model.head_dim * 4
    return Case(
        Label("rope", f"{model.name} rope_write_kv, width {width}", rows),
        place.dtype,
        make_inputs=lambda: _rope_inputs(place, model, rows),
        expected=lambda inputs: _bind_rope(TorchOps(), inputs)(),
        spoiled=lambda inputs: replace(inputs, positions_T=inputs.positions_T + 1),
        contenders=tuple(place.contenders(_bind_rope, reference_waits=True)),
        num_bytes=rows * ((width + written) * place.itemsize + tables),
        flops=6 * rows * (model.hidden + model.kv_width),
    )


def _rope_inputs(place: Place, model: ModelShape, rows: int) -> RopeInputs:
    """Each row in a block of its own."""
    half = model.head_dim // 2
    angles = torch.arange(ROPE_POSITIONS)[:, None] / 10000.0 ** (torch.arange(half) / half)
    cos_sin_PD = torch.cat((angles.cos(), angles.sin()), dim=1)
    positions = torch.randint(
        0, ROPE_POSITIONS - 1, (rows,), generator=torch.Generator().manual_seed(0)
    )
    pages = (rows, model.kv_heads, BLOCK_SIZE, model.head_dim)
    return RopeInputs(
        qkv_TN=place.normal(rows, model.hidden + 2 * model.kv_width),
        positions_T=place.integers(positions, torch.int64),
        cos_sin_PD=cos_sin_PD.float().to(place.device),
        k_cache=torch.zeros(pages, dtype=place.dtype, device=place.device),
        v_cache=torch.zeros(pages, dtype=place.dtype, device=place.device),
        kv_slots_T=place.integers([row * BLOCK_SIZE + 3 for row in range(rows)], torch.int64),
        model=model,
    )


def _bind_rope(ops: Ops, inputs: RopeInputs) -> Run:
    model = inputs.model

    def run() -> tuple[Tensor, ...]:
        ops.rope_write_kv(
            inputs.qkv_TN,
            inputs.positions_T,
            inputs.cos_sin_PD,
            inputs.k_cache,
            inputs.v_cache,
            inputs.kv_slots_T,
            model.heads,
            model.kv_heads,
            model.head_dim,
        )
        return inputs.qkv_TN, inputs.k_cache, inputs.v_cache

    return run


def gated_case(place: Place, model: ModelShape, rows: int) -> Case[GatedInputs]:
    return Case(
        Label("activation", f"{model.name} silu_mul, width {model.inner}", rows),
        place.dtype,
        make_inputs=lambda: GatedInputs(
            place.normal(rows, 2 * model.inner), place.normal(rows, model.inner)
        ),
        expected=lambda inputs: _bind_gated(TorchOps(), inputs)(),
        spoiled=lambda inputs: replace(inputs, gate_up_TN=inputs.gate_up_TN.roll(1, 1)),
        contenders=tuple(place.contenders(_bind_gated)),
        num_bytes=3 * rows * model.inner * place.itemsize,
        flops=6 * rows * model.inner,
    )


def _bind_gated(ops: Ops, inputs: GatedInputs) -> Run:
    def run() -> tuple[Tensor, ...]:
        ops.silu_mul(inputs.gate_up_TN, inputs.out_TI)
        return (inputs.out_TI,)

    return run
