"""A packed linear: y = x W^T + b behind one call signature.

The second argument of every call is passed on to whatever wraps a linear from outside and is
ignored here. Legend: T tokens, K in features, N out features. This module must not know what a
linear is for, nor what wraps it.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from lory_kernels import Ops, Segments, panels
from lory_kernels.calls import Caller
from lory_kernels.cpu import CpuOps


class Linear(Protocol):
    """What the decoder calls: `y_TN = layer(x_TK, rows)`."""

    bias_N: Tensor | None

    @property
    def num_bytes(self) -> int: ...

    @property
    def is_recordable(self) -> bool:
        """Whether all it does are calls that a program can hold (lory_kernels.calls)."""
        ...

    def row_blocks(self, rows: range, max_weights: int) -> Iterator[Tensor]:
        """Those rows of W as x is multiplied by them, in float32: blocks [n, K] in order, each of
        new memory, and of at most `max_weights` numbers where the layout allows it."""
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

    def row_blocks(self, rows: range, max_weights: int) -> Iterator[Tensor]:
        return dense_blocks(self.weight_NK, rows, max_weights)

    def __call__(self, x_TK: Tensor, rows: Segments | None) -> Tensor:
        return linear(x_TK, self.weight_NK, self.bias_N)


class PrepackedLinear:
    """y = x W^T + b in bfloat16 on the CPU, the weight laid out once in oneDNN's blocks.

    Measured with 32 rows, all linears of a 1.1B model: 96 ms against 160 for `DenseLinear`.
    """

    __slots__ = ("_apply", "_num_bytes", "_packed_NK", "bias_N")
    is_recordable = False

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None, typical_rows: int) -> None:
        self._packed_NK = torch.ops.mkldnn._reorder_linear_weight(weight_NK, typical_rows)
        self._apply = torch.ops.mkldnn._linear_pointwise.default
        self.bias_N = bias_N
        self._num_bytes = weight_NK.nbytes + bias_bytes(bias_N)

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def row_blocks(self, rows: range, max_weights: int) -> Iterator[Tensor]:
        """oneDNN lays out the whole weight or nothing, so all of it is there meanwhile."""
        yield from dense_blocks(self._packed_NK.to_dense(), rows, max_weights)

    def __call__(self, x_TK: Tensor, rows: Segments | None) -> Tensor:
        return self._apply(x_TK, self._packed_NK, self.bias_N, "none", [], "")


class PanelLinear:
    """y = x W^T + b on the CPU, the weight laid out once in panels: in float32, bfloat16 or NF4."""

    __slots__ = ("_multiply", "_num_bytes", "bias_N")
    is_recordable = True

    def __init__(self, weight: panels.PanelWeight, bias_N: Tensor | None, caller: Caller) -> None:
        self._multiply = panels.PanelMultiply(weight, bias_N, caller)
        self._num_bytes = weight.num_bytes + bias_bytes(bias_N)
        self.bias_N = bias_N

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def row_blocks(self, rows: range, max_weights: int) -> Iterator[Tensor]:
        return panels.row_blocks(self._multiply.weight, rows, max_weights)

    def __call__(self, x_TK: Tensor, rows: Segments | None) -> Tensor:
        return self._multiply(x_TK)


class EmbeddingColumns:
    """The embedding as LoRA sees it: a linear over the vocabulary, W = embedding^T. For its numbers
    alone: what it multiplies is a column for each token, so nobody calls it."""

    __slots__ = ("_embedding_VH", "bias_N")

    def __init__(self, embedding_VH: Tensor) -> None:
        self.bias_N: Tensor | None = None
        self._embedding_VH = embedding_VH

    def row_blocks(self, rows: range, max_weights: int) -> Iterator[Tensor]:
        """At least 16 columns of the table at once: fewer read the same cache lines again."""
        at_once = max(16, max_weights // self._embedding_VH.shape[0])
        for first in rows[::at_once]:
            part_VN = self._embedding_VH[:, first : min(first + at_once, rows.stop)]
            yield part_VN.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


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


def dense_blocks(weight_NK: Tensor, rows: range, max_weights: int) -> Iterator[Tensor]:
    """`Linear.row_blocks` of a plain weight."""
    at_once = max(1, max_weights // weight_NK.shape[1])
    for first in rows[::at_once]:
        part_NK = weight_NK[first : min(first + at_once, rows.stop)]
        yield part_NK.to(torch.float32, copy=True)


def bias_bytes(bias_N: Tensor | None) -> int:
    return 0 if bias_N is None else bias_N.nbytes
