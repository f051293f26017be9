"""A packed linear: y = x W^T + b behind one call signature.

The second argument of every call is passed on to whatever wraps a linear from outside and is
ignored here. Legend: T tokens, K in features, N out features. This module must not know what a
linear is for, nor what wraps it.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from lory_kernels import Ops, Segments, panels
from lory_kernels.calls import Caller
from lory_kernels.cpu import CpuOps


class Linear(Protocol):
    """What the decoder calls: `y_TN = layer(x_TK, rows)`."""

    @property
    def num_bytes(self) -> int: ...

    @property
    def is_recordable(self) -> bool:
        """Whether all it does are calls that a program can hold (lory_kernels.calls)."""
        ...

    def __call__(self, x_TK: Tensor, rows: Segments | None) -> Tensor: ...


class DenseLinear:
    """y = x W^T + b by torch's own kernel."""

    __slots__ = ("bias_N", "weight_NK")
    is_recordable = False

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        self.weight_NK = weight_NK
        self.bias_N = bias_N

    @property
    def num_bytes(self) -> int:
        return self.weight_NK.nbytes + bias_bytes(self.bias_N)

    def __call__(self, x_TK: Tensor, rows: Segments | None) -> Tensor:
        return linear(x_TK, self.weight_NK, self.bias_N)


class PrepackedLinear:
    """y = x W^T + b in bfloat16 on the CPU, the weight laid out once in oneDNN's blocks.

    Measured with 32 rows, all linears of a 1.1B model: 96 ms against 160 for `DenseLinear`.
    """

    __slots__ = ("_apply", "_bias_N", "_num_bytes", "_packed_NK")
    is_recordable = False

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None, typical_rows: int) -> None:
        self._packed_NK = torch.ops.mkldnn._reorder_linear_weight(weight_NK, typical_rows)
        self._apply = torch.ops.mkldnn._linear_pointwise.default
        self._bias_N = bias_N
        self._num_bytes = weight_NK.nbytes + bias_bytes(bias_N)

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def __call__(self, x_TK: Tensor, rows: Segments | None) -> Tensor:
        return self._apply(x_TK, self._packed_NK, self._bias_N, "none", [], "")


class PanelLinear:
    """y = x W^T + b on the CPU, the weight laid out once in panels: in float32, bfloat16 or NF4."""

    __slots__ = ("_multiply", "_num_bytes")
    is_recordable = True

    def __init__(self, weight: panels.PanelWeight, bias_N: Tensor | None, caller: Caller) -> None:
        self._multiply = panels.PanelMultiply(weight, bias_N, caller)
        self._num_bytes = weight.num_bytes + bias_bytes(bias_N)

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def __call__(self, x_TK: Tensor, rows: Segments | None) -> Tensor:
        return self._multiply(x_TK)


def dense_linear(weight_NK: Tensor, bias_N: Tensor | None, typical_rows: int, ops: Ops) -> Linear:
    """The fastest full-precision linear for where the weight lies and what it is made of."""
    if isinstance(ops, CpuOps) and panels.can_pack(weight_NK):
        return PanelLinear(panels.pack(weight_NK), bias_N, ops.caller)
    if weight_NK.device.type == "cpu" and weight_NK.dtype == torch.bfloat16 and can_prepack():
        return PrepackedLinear(weight_NK, bias_N, typical_rows)
    return DenseLinear(weight_NK, bias_N)


def can_prepack() -> bool:
    """Whether this build of torch and this CPU have oneDNN's bfloat16 linear."""
    ops = torch.ops.mkldnn
    needed = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")
    return all(hasattr(ops, name) for name in needed) and ops._is_mkldnn_bf16_supported()


def bias_bytes(bias_N: Tensor | None) -> int:
    return 0 if bias_N is None else bias_N.nbytes
