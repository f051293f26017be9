"""Dense bfloat16 linears on the CPU: y = x W^T + b, the weight laid out once in panels.

csrc/linear.h says what a panel is and computes; here are its weights and its checks. It must not
know what a linear is for. Legend: T tokens, K in features, N out features.

Measured on two Zen 5 cores, all linears of a 26M-parameter model: 1.6 ms with 32 rows where oneDNN
takes 3.1 (940 GFLOP/s, as many as with 512 rows), 0.75 ms with one row (65 GB/s).
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lory_kernels.build import compiled_library
from lory_kernels.contract import KernelUnavailableError

PANEL = 32
_LONG, _POINTER = ctypes.c_long, ctypes.c_void_p


@dataclass(frozen=True, slots=True, eq=False)
class PanelWeight:
    """A weight [N, K] in panels; its rows are padded to whole panels."""

    panels: Tensor
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True)
class _Kernels:
    multiply: Callable[..., None]
    pack: Callable[..., None]


@cache
def _kernels() -> _Kernels | None:
    """None where the CPU lacks AVX512-BF16 or the kernels could not be compiled."""
    try:
        library = compiled_library()
    except KernelUnavailableError:
        return None
    if not library.can_multiply_panels_bf16():
        return None
    multiply, pack = library.linear_bf16, library.pack_panels_bf16
    multiply.argtypes = [
        *(_POINTER, _LONG, _POINTER, _LONG, _POINTER, _POINTER),
        *(_LONG, _LONG, _LONG, ctypes.c_int),
    ]
    pack.argtypes = [_POINTER, _POINTER, _LONG, _LONG]
    multiply.restype = pack.restype = None
    return _Kernels(multiply, pack)


def can_pack(weight_NK: Tensor) -> bool:
    """Whether this CPU computes this weight faster in panels than oneDNN does.

    Not with AMX, whose tiles win whenever rows are many.
    """
    fits = weight_NK.device.type == "cpu" and weight_NK.dtype == torch.bfloat16
    even = weight_NK.shape[1] % 2 == 0
    return fits and even and not torch.cpu._is_amx_tile_supported() and _kernels() is not None


def pack(weight_NK: Tensor) -> PanelWeight:
    """The weight in panels; raises KernelUnavailableError where `can_pack` says no."""
    kernels = _kernels()
    if kernels is None or not can_pack(weight_NK):
        raise KernelUnavailableError("panels need bfloat16, AVX512-BF16 and an even K")
    out_features, in_features = weight_NK.shape
    num_panels = -(-out_features // PANEL)
    panels = torch.empty(num_panels * PANEL * in_features, dtype=torch.bfloat16)
    source_NK = weight_NK.contiguous()
    kernels.pack(source_NK.data_ptr(), panels.data_ptr(), out_features, in_features)
    return PanelWeight(panels, out_features, in_features)


class PanelMultiply:
    """x -> x W^T + b for one packed weight; `threads` bounds the cores a call may use."""

    __slots__ = (
        "_bias",
        "_in_features",
        "_kept",
        "_kernel",
        "_out_features",
        "_panels",
        "_threads",
    )

    def __init__(self, weight: PanelWeight, bias_N: Tensor | None, threads: int) -> None:
        kernels = _kernels()
        assert kernels is not None, "a PanelWeight exists"
        self._kernel = kernels.multiply
        self._kept = (weight, bias_N)
        self._panels = weight.panels.data_ptr()
        self._bias = None if bias_N is None else bias_N.data_ptr()
        self._out_features, self._in_features = weight.out_features, weight.in_features
        self._threads = threads

    def __call__(self, x_TK: Tensor) -> Tensor:
        rows, width = x_TK.shape
        if width != self._in_features or not x_TK.is_contiguous():
            raise ValueError(f"x_TK: [T, {self._in_features}] contiguous, not {tuple(x_TK.shape)}")
        y_TN = x_TK.new_empty((rows, self._out_features))
        self._kernel(
            y_TN.data_ptr(),
            self._out_features,
            x_TK.data_ptr(),
            width,
            self._panels,
            self._bias,
            rows,
            self._out_features,
            width,
            self._threads,
        )
        return y_TN
