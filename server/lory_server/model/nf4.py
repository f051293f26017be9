"""NF4, the 4-bit format of bitsandbytes: quantizing, reading, packing and multiplying.

A weight [N, K] is N*K/2 bytes, row by row, two codes a byte with the first in the high half, and
one float32 scale (absmax) for every `block` codes along K. Double quantization, of the scales
themselves, is undone when a weight is made or read: the values stay what it made them, and one
launch less reads them. Legend: T tokens, K in features, N out features. This module must not know
what a linear is for, nor what wraps it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from bitsandbytes import functional as bnb
from torch import Tensor
from torch.nn.functional import linear

from lory_kernels import Ops, Segments, panels
from lory_kernels.cpu import CpuOps
from lory_kernels.nf4_choice import Choice, choices_for, choose
from lory_server.model.errors import ModelError
from lory_server.model.linear import Linear, PanelLinear, bias_bytes

BLOCK = 64
STATE_SUFFIX = ".quant_state.bitsandbytes__nf4"
_PLAIN_SUFFIXES = (".absmax", ".quant_map")
_NESTED_SUFFIXES = (".nested_absmax", ".nested_quant_map")
_NESTED_BLOCK = 256

# Weights quantized at a time: bitsandbytes takes 20 bytes of scratch for each on the CPU.
_CHUNK_WEIGHTS = 1 << 20

# The AVX512 kernel computes tiles of 32 outputs by 64 inputs.
_CPU_TILE_N = 32
_CPU_TILE_K = 64


@dataclass(frozen=True, slots=True)
class NF4Weight:
    """[N, K] in 4 bits."""

    codes: Tensor
    """uint8 [N*K/2]."""
    absmax: Tensor
    """float32 [N*K/block]."""
    out_features: int
    in_features: int
    block: int = BLOCK

    def to(self, device: torch.device) -> "NF4Weight":
        return replace(self, codes=self.codes.to(device), absmax=self.absmax.to(device))

    def require_shape(self, name: str, out_features: int, in_features: int) -> None:
        if (self.out_features, self.in_features) != (out_features, in_features):
            raise ModelError(
                f"{name} has shape {(self.out_features, self.in_features)}, its configuration "
                f"makes it {(out_features, in_features)}"
            )

    def rows(self, rows: range) -> "NF4Weight":
        """No block crosses a row."""
        code_bytes, blocks = self.in_features // 2, self.in_features // self.block
        return replace(
            self,
            codes=self.codes[rows.start * code_bytes : rows.stop * code_bytes],
            absmax=self.absmax[rows.start * blocks : rows.stop * blocks],
            out_features=len(rows),
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        shape = (self.out_features, self.in_features)
        return torch.ops.bitsandbytes.dequantize_4bit(
            self.codes.view(-1, 1), self.absmax, self.block, "nf4", shape, dtype
        )


def quantize(weight_NK: Tensor, name: str, double_quant: bool) -> NF4Weight:
    """As bitsandbytes does, byte for byte; `name` is for the refusal."""
    out_features, in_features = weight_NK.shape
    if in_features % BLOCK:
        raise ModelError(
            f"{name}: {in_features} input features are not a multiple of NF4's block of {BLOCK}; "
            "serve this base with --quantize none"
        )
    rows = max(1, _CHUNK_WEIGHTS // in_features)
    parts = [
        bnb.quantize_4bit(part.contiguous(), blocksize=BLOCK, quant_type="nf4")
        for part in weight_NK.split(rows)
    ]
    codes = torch.cat([part.view(-1) for part, _ in parts])
    absmax = torch.cat([state.absmax for _, state in parts])
    if double_quant:
        absmax = _round_scales(absmax)
    return NF4Weight(codes, absmax, out_features, in_features)


def _round_scales(absmax: Tensor) -> Tensor:
    """What the scales are after they have been quantized to 8 bits and back."""
    offset = absmax.mean()
    rounded, state = bnb.quantize_blockwise(absmax - offset, blocksize=_NESTED_BLOCK)
    return bnb.dequantize_blockwise(rounded, state) + offset


def tensor_names(name: str, available: Mapping[str, object]) -> tuple[str, ...]:
    """What the NF4 weight `name` consists of in a checkpoint; empty if it is not in NF4."""
    if name + STATE_SUFFIX not in available:
        return ()
    nested = name + _NESTED_SUFFIXES[0] in available
    suffixes = ("", *_PLAIN_SUFFIXES, *(_NESTED_SUFFIXES if nested else ()), STATE_SUFFIX)
    return tuple(name + suffix for suffix in suffixes)


def read(name: str, tensors: Mapping[str, Tensor]) -> NF4Weight:
    """The NF4 weight `name` from its checkpoint tensors, its scales in plain float32."""
    state = json.loads(bytes(tensors[name + STATE_SUFFIX].tolist()))
    block, shape = state["blocksize"], state["shape"]
    codes = tensors[name].contiguous().view(torch.uint8).reshape(-1).clone()
    absmax = tensors[name + ".absmax"].clone()
    if name + ".nested_absmax" in tensors:
        nested = bnb.QuantState(
            absmax=tensors[name + ".nested_absmax"],
            code=tensors[name + ".nested_quant_map"],
            blocksize=state["nested_blocksize"],
            dtype=torch.float32,
        )
        absmax = bnb.dequantize_blockwise(absmax, nested) + state["nested_offset"]
    _check(name, state, codes, absmax)
    return NF4Weight(codes, absmax.float(), shape[0], shape[1], block)


def _check(name: str, state: Mapping[str, object], codes: Tensor, absmax: Tensor) -> None:
    shape, block = state["shape"], state["blocksize"]
    if not (isinstance(shape, list) and len(shape) == 2 and isinstance(block, int) and block):
        raise ModelError(f"{name}{STATE_SUFFIX}: shape {shape!r} or blocksize {block!r} is damaged")
    size = shape[0] * shape[1]
    if shape[1] % block or codes.numel() * 2 != size or absmax.numel() * block != size:
        raise ModelError(
            f"{name}: {codes.numel()} bytes and {absmax.numel()} scales do not make NF4 of shape "
            f"{shape} in blocks of {block}; the checkpoint is damaged"
        )


def pack(name: str, parts: Sequence[NF4Weight]) -> NF4Weight:
    """Weights of equal K on top of one another; exact, because no block crosses a row."""
    first = parts[0]
    if any((part.in_features, part.block) != (first.in_features, first.block) for part in parts):
        raise ModelError(f"{name}: its parts differ in input features or NF4 block size")
    if len(parts) == 1:
        return first
    return NF4Weight(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.absmax for part in parts]),
        sum(part.out_features for part in parts),
        first.in_features,
        first.block,
    )


def nf4_linear(weight: NF4Weight, bias_N: Tensor | None, dtype: torch.dtype, ops: Ops) -> Linear:
    """The fastest NF4 linear that is true to `dtype` where the weight lies."""
    if isinstance(ops, CpuOps) and panels.can_pack_nf4(weight.codes, dtype):
        shape = (weight.out_features, weight.in_features)
        packed = panels.pack_nf4(weight.codes, weight.absmax, *shape, dtype)
        return PanelLinear(packed, bias_N, ops.caller)
    if weight.codes.device.type == "cpu" and dtype == torch.bfloat16 and can_pack_for_cpu(weight):
        return PackedNF4Linear(weight, bias_N)
    return NF4Linear(weight, bias_N)


def can_pack_for_cpu(weight: NF4Weight) -> bool:
    """Whether bitsandbytes' AVX512 bfloat16 kernel can compute this shape on this CPU."""
    tiles = weight.out_features % _CPU_TILE_N == 0 and weight.in_features % _CPU_TILE_K == 0
    return tiles and bool(bnb.has_avx512bf16())


class NF4Linear:
    """y = x W^T + b: on a GPU in the way that fits the rows, on the CPU decoded to x's own dtype.

    `choices` are those of the GPU where the weight lies, unless given; none on the CPU.
    """

    __slots__ = ("_apply", "_codes", "_shape", "_weight", "bias_N", "choices")
    is_recordable = False

    def __init__(
        self, weight: NF4Weight, bias_N: Tensor | None, choices: Sequence[Choice] | None = None
    ) -> None:
        self._weight = weight
        self._codes = weight.codes.view(-1, 1)
        self._shape = [weight.out_features, weight.in_features]
        self.bias_N = bias_N
        self._apply = torch.ops.bitsandbytes.gemm_4bit.default
        self.choices = _choices_of(weight) if choices is None else choices

    @property
    def num_bytes(self) -> int:
        return self._codes.nbytes + self._weight.absmax.nbytes + bias_bytes(self.bias_N)

    def row_blocks(self, rows: range, max_weights: int) -> Iterator[Tensor]:
        at_once = max(1, max_weights // self._weight.in_features)
        for first in rows[::at_once]:
            part = range(first, min(first + at_once, rows.stop))
            yield self._weight.rows(part).dequantize(torch.float32)

    def __call__(self, x_TK: Tensor, rows: Segments | None) -> Tensor:
        if not self.choices or x_TK.dtype == torch.float32:
            return self._by_bitsandbytes(x_TK)
        return self.by_choice(x_TK, choose(self.choices, x_TK.shape[0]))

    def by_choice(self, x_TK: Tensor, choice: Choice) -> Tensor:
        weight = self._weight
        if choice.tiles is not None:
            from lory_kernels.triton_nf4 import matmul

            return matmul(
                x_TK, weight.codes, weight.absmax, weight.out_features, weight.block,
                self.bias_N, choice.tiles,
            )  # fmt: skip
        if choice.path == "dequantize":
            return linear(x_TK, weight.dequantize(x_TK.dtype), self.bias_N)
        return self._by_bitsandbytes(x_TK)

    def _by_bitsandbytes(self, x_TK: Tensor) -> Tensor:
        weight = self._weight
        return self._apply(
            x_TK, self._codes, self._shape, weight.absmax, weight.block, "nf4", bias=self.bias_N
        )


def _choices_of(weight: NF4Weight) -> Sequence[Choice]:
    device = weight.codes.device
    if device.type != "cuda":
        return ()
    return choices_for(
        torch.cuda.get_device_name(device),
        torch.cuda.get_device_capability(device),
        weight.out_features,
        weight.in_features,
        weight.block,
    )


class PackedNF4Linear:
    """y = x W^T + b in bfloat16 on the CPU, the codes laid out for bitsandbytes' AVX512 kernel.

    The layout rounds the scales to bfloat16: 0.33% of error a weight against 0.24%.
    """

    __slots__ = ("_absmax", "_apply", "_block", "_code", "_codes", "_shape", "bias_N")
    is_recordable = False

    def __init__(self, weight: NF4Weight, bias_N: Tensor | None) -> None:
        self._shape = torch.Size((weight.out_features, weight.in_features))
        self._code = bnb.get_4bit_type("nf4", device=weight.codes.device)
        state = bnb.QuantState(
            absmax=weight.absmax,
            shape=self._shape,
            code=self._code,
            blocksize=weight.block,
            quant_type="nf4",
            dtype=torch.bfloat16,
        )
        self._codes, state = bnb._convert_weight_packed_for_cpu(weight.codes, state)
        self._absmax = state.absmax
        self._block = weight.block
        self.bias_N = bias_N
        self._apply = torch.ops.bitsandbytes.gemv_4bit.default

    @property
    def num_bytes(self) -> int:
        return self._codes.nbytes + self._absmax.nbytes + bias_bytes(self.bias_N)

    def row_blocks(self, rows: range, max_weights: int) -> Iterator[Tensor]:
        for first in range(rows.start // _CPU_TILE_N * _CPU_TILE_N, rows.stop, _CPU_TILE_N):
            tile_NK = self._tile(first // _CPU_TILE_N)
            yield tile_NK[max(0, rows.start - first) : rows.stop - first]

    def _tile(self, number: int) -> Tensor:
        """32 rows of W. Of every two inputs 32 bytes: the codes of 16 rows in the low halves, those
        of the other 16 in the high ones."""
        pairs, first = self._shape[1] // 2, number * _CPU_TILE_N
        both = self._codes.view(-1, pairs, _CPU_TILE_N)[number]
        codes = torch.cat([both & 15, both >> 4], dim=1).view(pairs, _CPU_TILE_N, 2)
        scales_NK = self._absmax[:, first : first + _CPU_TILE_N].T.repeat_interleave(
            self._block, dim=1
        )
        values_NK = self._code.bfloat16()[codes.transpose(0, 1).reshape(_CPU_TILE_N, -1).int()]
        return (values_NK * scales_NK).float()

    def __call__(self, x_TK: Tensor, rows: Segments | None) -> Tensor:
        y_TN = self._apply(x_TK, self._codes, self._shape, self._absmax, self._code, self._block)
        return y_TN if self.bias_N is None else y_TN.add_(self.bias_N)
