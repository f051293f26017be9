"""Linears on the CPU: y = x W^T + b, the weight laid out once in panels, dense or as NF4.

csrc/linear.h says what a panel is and computes; here are its weights and its checks. It must not
know what a linear is for. Legend: T tokens, K in features, N out features.

Measured on two Zen 5 cores, all linears of a 26M-parameter model in bfloat16 with 32 rows, in a
serving engine: 2.1 ms where oneDNN takes 3.2. Alone, without the engine around it: 1.6 ms (940
GFLOP/s, as many as with 512 rows), and 0.75 ms with one row (65 GB/s).
"""

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lory_kernels.build import compiled_library
from lory_kernels.calls import Caller, Linear, Step, op
from lory_kernels.contract import KernelUnavailableError

PANEL = 32
_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_LONG, _POINTER = ctypes.c_long, ctypes.c_void_p


@dataclass(frozen=True, slots=True, eq=False)
class PanelWeight:
    """A weight [N, K] in panels; its rows are padded to whole panels."""

    panels: Tensor
    absmax: Tensor | None
    """float32 [panels, K / block, PANEL]: the scales of NF4; None: the panels are dense."""
    out_features: int
    in_features: int
    dtype: torch.dtype
    """Of x and y; NF4 is decoded to it."""

    @property
    def num_bytes(self) -> int:
        return self.panels.nbytes + (0 if self.absmax is None else self.absmax.nbytes)


class _Weight(ctypes.Structure):
    """`panel_weight` of csrc/linear.h."""

    _fields_ = (
        ("panels", _POINTER),
        ("bias", _POINTER),
        ("absmax", _POINTER),
        ("scratch", _POINTER),
        ("n", _LONG),
        ("k", _LONG),
        ("block", _LONG),
    )


@cache
def _library() -> ctypes.CDLL | None:
    """None where the kernels could not be compiled, or have no vectors to be fast with."""
    try:
        library = compiled_library()
    except KernelUnavailableError:
        return None
    return library if library.lory_vector_lanes() >= 8 else None


def can_pack(weight_NK: Tensor) -> bool:
    """Whether this CPU computes this weight faster in panels than torch does.

    Not with AMX, whose tiles win in bfloat16 whenever rows are many.
    """
    if weight_NK.device.type != "cpu" or weight_NK.dtype not in _SUFFIXES:
        return False
    is_bf16 = weight_NK.dtype == torch.bfloat16
    if is_bf16 and (weight_NK.shape[1] % 2 or torch.cpu._is_amx_tile_supported()):
        return False
    return _library() is not None


def can_pack_nf4(codes: Tensor, dtype: torch.dtype) -> bool:
    """Whether this CPU computes NF4 here: in float32 or bfloat16, with AVX2 or more."""
    return codes.device.type == "cpu" and dtype in _SUFFIXES and _library() is not None


def pack(weight_NK: Tensor) -> PanelWeight:
    """The weight in panels; raises KernelUnavailableError where `can_pack` says no."""
    if not can_pack(weight_NK):
        raise KernelUnavailableError(
            "panels need float32, or bfloat16 with an even K and no AMX, and AVX2 or more"
        )
    out_features, in_features = weight_NK.shape
    panels = weight_NK.new_empty(_num_panels(out_features) * PANEL * in_features)
    source_NK = weight_NK.contiguous()
    _call_pack("pack_panels", source_NK, panels, weight_NK.dtype, out_features, in_features)
    return PanelWeight(panels, None, out_features, in_features, weight_NK.dtype)


def pack_nf4(
    codes: Tensor, absmax: Tensor, out_features: int, in_features: int, dtype: torch.dtype
) -> PanelWeight:
    """A weight [N, K] in NF4, as bitsandbytes keeps it, in panels.

    codes: uint8 [N * K / 2], the first of two in the high half. absmax: float32, one scale for
    each block along K, which no block crosses. dtype: of x and y. Raises KernelUnavailableError
    where `can_pack_nf4` says no.
    """
    if not can_pack_nf4(codes, dtype):
        raise KernelUnavailableError("NF4 panels need float32 or bfloat16, and AVX2 or more")
    num_panels = _num_panels(out_features)
    panels = torch.empty(num_panels * PANEL * in_features // 2, dtype=torch.uint8)
    _call_pack("pack_nf4", codes.contiguous(), panels, dtype, out_features, in_features)
    blocks = absmax.view(out_features, -1)
    padded = blocks.new_zeros((num_panels * PANEL, blocks.shape[1]))
    padded[:out_features] = blocks
    scales = padded.view(num_panels, PANEL, -1).transpose(1, 2).contiguous()
    return PanelWeight(panels, scales, out_features, in_features, dtype)


def _num_panels(out_features: int) -> int:
    return -(-out_features // PANEL)


def _call_pack(
    name: str, source: Tensor, target: Tensor, dtype: torch.dtype, n: int, k: int
) -> None:
    library = _library()
    assert library is not None, "can_pack said so"
    function: Any = getattr(library, f"{name}_{_SUFFIXES[dtype]}")
    function.argtypes = (_POINTER, _POINTER, _LONG, _LONG)
    call: Callable[[int, int, int, int], None] = function
    call(source.data_ptr(), target.data_ptr(), n, k)


def row_blocks(weight: PanelWeight, rows: range, max_weights: int) -> Iterator[Tensor]:
    """Those rows of W, in float32: blocks [n, K] in order, each of new memory. Of at most
    `max_weights` numbers where a panel has no more."""
    panels = range(rows.start // PANEL, _num_panels(rows.stop))
    at_once = max(1, max_weights // (PANEL * weight.in_features))
    for first in panels[::at_once]:
        end = min(first + at_once, panels.stop)
        block_NK = _unpacked(weight, range(first, end))
        yield block_NK[max(0, rows.start - first * PANEL) : rows.stop - first * PANEL]


def _unpacked(weight: PanelWeight, panels: range) -> Tensor:
    width = weight.in_features
    unpack: Any = getattr(_library(), f"unpack_panel_{_SUFFIXES[weight.dtype]}")
    unpack.argtypes = (_POINTER, _LONG, _POINTER)
    rows_NK = torch.empty((len(panels) * PANEL, width))
    for place, panel in enumerate(panels):
        dense = _dense_panel(weight, panel)
        unpack(dense.data_ptr(), width, rows_NK[place * PANEL].data_ptr())
    return rows_NK


def _dense_panel(weight: PanelWeight, panel: int) -> Tensor:
    own = weight.panels.view(_num_panels(weight.out_features), -1)[panel]
    if weight.absmax is None:
        return own
    decode: Any = getattr(_library(), f"decode_panel_{_SUFFIXES[weight.dtype]}")
    decode.argtypes = (_POINTER, _POINTER, _LONG, _LONG, _POINTER)
    scales, width = weight.absmax[panel], weight.in_features
    dense = torch.empty(PANEL * width, dtype=weight.dtype)
    block = width // scales.shape[0]
    decode(own.data_ptr(), scales.data_ptr(), width, block, dense.data_ptr())
    return dense


class PanelMultiply:
    """x -> x W^T + b for one packed weight."""

    __slots__ = ("_address", "_bias_N", "_caller", "_op", "_struct", "weight")

    def __init__(self, weight: PanelWeight, bias_N: Tensor | None, caller: Caller) -> None:
        library = _library()
        assert library is not None, "a PanelWeight exists"
        if bias_N is not None:
            _check_bias(bias_N, weight)
        self._op = op(library, f"linear_{_SUFFIXES[weight.dtype]}")
        self._caller = caller
        self._bias_N = bias_N
        self._struct = _struct(weight, bias_N, caller)
        self._address = ctypes.addressof(self._struct)
        self.weight = weight

    def __call__(self, x_TK: Tensor) -> Tensor:
        self._check(x_TK)
        rows = x_TK.shape[0]
        y_TN = self._caller.empty(rows, self.weight.out_features, x_TK.dtype)
        args = Linear(self._address, y_TN.data_ptr(), x_TK.data_ptr())
        self._caller.call(self._op, args, Step(rows), self)
        return y_TN

    def _check(self, x_TK: Tensor) -> None:
        width, dtype = self.weight.in_features, self.weight.dtype
        if x_TK.shape[1] != width or not x_TK.is_contiguous() or x_TK.dtype != dtype:
            raise ValueError(
                f"x_TK: must be [T, {width}], {dtype} and contiguous, not {tuple(x_TK.shape)} "
                f"of {x_TK.dtype} with strides {x_TK.stride()}"
            )


def _struct(weight: PanelWeight, bias_N: Tensor | None, caller: Caller) -> _Weight:
    absmax, scratch, block = weight.absmax, None, 0
    if absmax is not None:
        block = weight.in_features // absmax.shape[1]
        scratch = caller.scratch(PANEL * weight.in_features * weight.dtype.itemsize)
    return _Weight(
        panels=weight.panels.data_ptr(),
        bias=None if bias_N is None else bias_N.data_ptr(),
        absmax=None if absmax is None else absmax.data_ptr(),
        scratch=scratch,
        n=weight.out_features,
        k=weight.in_features,
        block=block,
    )


def _check_bias(bias_N: Tensor, weight: PanelWeight) -> None:
    is_row = bias_N.shape == (weight.out_features,) and bias_N.is_contiguous()
    if not is_row or bias_N.dtype != weight.dtype:
        raise ValueError(
            f"bias_N: must be [{weight.out_features}], {weight.dtype} and contiguous, not "
            f"{tuple(bias_N.shape)} of {bias_N.dtype}"
        )
