"""Cases of the base's dense linears, in the dtype.

It must not know models' files or adapters. Legend: T tokens, K in features, N out features.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from lory_kernels import panels
from lory_kernels.bench.case import REFERENCE, Case, Contender, Label, Place, Run
from lory_kernels.bench.shapes import LinearShape
from lory_kernels.contract import Ops
from lory_kernels.cpu import CpuOps

ROWS_AT_ONCE = 4096
"""Of a weight, in float32: whole, an 8B head would take gigabytes of scratch."""

Multiply = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class DenseInputs:
    x_TK: Tensor
    weight_NK: Tensor


def dense_case(place: Place, shape: LinearShape, rows: int) -> Case[DenseInputs]:
    def make_inputs() -> DenseInputs:
        weight_NK = place.normal(shape.out_features, shape.in_features, std=weight_std(shape))
        return DenseInputs(place.normal(rows, shape.in_features), weight_NK)

    return Case(
        Label("linear", shape.label, rows),
        place.dtype,
        make_inputs,
        expected=lambda inputs: (product(inputs.x_TK, inputs.weight_NK),),
        spoiled=lambda inputs: replace(inputs, weight_NK=inputs.weight_NK.roll(1, 0)),
        contenders=tuple(_contenders(place, shape)),
        num_bytes=linear_bytes(place, shape, rows, shape.in_features * place.itemsize),
        flops=linear_flops(shape, rows),
    )


def weight_std(shape: LinearShape) -> float:
    return shape.in_features**-0.5


def linear_flops(shape: LinearShape, rows: int) -> int:
    return 2 * rows * shape.in_features * shape.out_features


def linear_bytes(place: Place, shape: LinearShape, rows: int, bytes_an_output: int) -> int:
    """The weight, `bytes_an_output` for each output, and the activations."""
    activations = rows * (shape.in_features + shape.out_features) * place.itemsize
    return shape.out_features * bytes_an_output + activations


def product(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """In float32, rounded once."""
    parts = [x_TK.float() @ part.float().T for part in weight_NK.split(ROWS_AT_ONCE)]
    return torch.cat(parts, dim=1).to(x_TK.dtype)


def bound(multiply: Multiply, x_TK: Tensor) -> Run:
    return lambda: (multiply(x_TK),)


def own_dense(ops: Ops, weight_NK: Tensor) -> Multiply | None:
    """Our own product with this weight; None where torch's is the one that serves."""
    if isinstance(ops, CpuOps) and panels.can_pack(weight_NK):
        return panels.PanelMultiply(panels.pack(weight_NK), None, ops.caller)
    return None


def _contenders(place: Place, shape: LinearShape) -> Iterator[Contender[DenseInputs]]:
    ops = place.new_ops()
    probe_NK = torch.zeros((1, shape.in_features), dtype=place.dtype, device=place.device)
    if own_dense(ops, probe_NK) is not None:
        yield Contender(place.backend, "ours", lambda inputs: _bind_own(ops, inputs))
    yield Contender(REFERENCE, "reference", _bind_torch)


def _bind_own(ops: Ops, inputs: DenseInputs) -> Run:
    multiply = own_dense(ops, inputs.weight_NK)
    assert multiply is not None, "the probe was packed"
    return bound(multiply, inputs.x_TK)


def _bind_torch(inputs: DenseInputs) -> Run:
    weight_NK = inputs.weight_NK
    return bound(lambda x_TK: linear(x_TK, weight_NK), inputs.x_TK)
