"""Cases of NF4 linears, in bitsandbytes' format: every path that could serve, each by itself.

On the CPU that is the weight in panels. For Triton it is the path that nf4_choice.py serves these
rows by, and beside it the others: bitsandbytes' op, writing the weight out before a dense product,
and if asked for the Triton kernel with tiles that are not served. Facts name path and tiles, so
that a table of what is fastest can be made of the findings. It must not know models' files.

Legend: T tokens, K in features, N out features.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import linear

from lory_kernels import panels
from lory_kernels.bench.case import REFERENCE, Case, Contender, Label, Place, Role, Run
from lory_kernels.bench.linears import (
    ROWS_AT_ONCE,
    Multiply,
    bound,
    linear_bytes,
    linear_flops,
    product,
    weight_std,
)
from lory_kernels.bench.shapes import LinearShape
from lory_kernels.cpu import CpuOps
from lory_kernels.nf4_choice import (
    ANY_ROWS,
    GROUP,
    MAX_SPLITS,
    RULES,
    Choice,
    Tiles,
    choices_for,
    choose,
    fitted,
)

BLOCK = 64
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""Written out again: what is checked must not bring its own yardstick."""

INTERPRETED = ("Triton's interpreter", (9, 0))
"""GPU and compute capability that stand for none: Hopper's rules have every tiling."""

REASON = "Measured beside the others."
FLOAT32 = Choice(ANY_ROWS, "bitsandbytes", "No GPU multiplies float32 fast.")


@dataclass(frozen=True, slots=True, eq=False)
class NF4Inputs:
    x_TK: Tensor
    codes: Tensor
    """uint8 [N * K / 2], the first code of a byte in its high half."""
    absmax: Tensor
    """float32 [N * K / BLOCK]."""
    out_features: int
    in_features: int

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """The weight, [N, K]."""
        levels = torch.tensor(LEVELS, device=self.codes.device)
        codes = self.codes.view(self.out_features, -1).split(ROWS_AT_ONCE)
        scales = self.absmax.view(self.out_features, -1).split(ROWS_AT_ONCE)
        parts = zip(codes, scales, strict=True)
        return torch.cat([_decoded(*part, levels, dtype) for part in parts])


def _decoded(codes: Tensor, absmax: Tensor, levels: Tensor, dtype: torch.dtype) -> Tensor:
    both = torch.stack((codes >> 4, codes & 15), dim=-1).flatten(1)
    values = levels[both.int()].unflatten(1, (-1, BLOCK)) * absmax[..., None]
    return values.flatten(1).to(dtype)


def nf4_case(
    place: Place, shape: LinearShape, rows: int, *, every_tiling: bool = False
) -> Case[NF4Inputs]:
    """`every_tiling`: Triton's kernel with more tiles than those that are served."""
    bytes_an_output = shape.in_features // 2 + shape.in_features // BLOCK * 4
    return Case(
        Label("nf4", shape.label, rows),
        place.dtype,
        make_inputs=lambda: _inputs(place, shape, rows),
        expected=lambda inputs: (product(inputs.x_TK, inputs.decoded(torch.float32)),),
        spoiled=lambda inputs: replace(inputs, absmax=inputs.absmax.roll(1)),
        contenders=tuple(_contenders(place, shape, rows, every_tiling)),
        num_bytes=linear_bytes(place, shape, rows, bytes_an_output),
        flops=linear_flops(shape, rows),
        facts={
            "out_features": shape.out_features,
            "in_features": shape.in_features,
            "block": BLOCK,
        },
    )


def _inputs(place: Place, shape: LinearShape, rows: int) -> NF4Inputs:
    size = shape.out_features * shape.in_features
    codes = torch.randint(
        0, 256, (size // 2,), dtype=torch.uint8, device=place.device, generator=place.generator
    )
    absmax = torch.rand(size // BLOCK, device=place.device, generator=place.generator)
    absmax = (absmax + 0.5) * weight_std(shape)
    x_TK = place.normal(rows, shape.in_features)
    return NF4Inputs(x_TK, codes, absmax, shape.out_features, shape.in_features)


# -- who computes it --------------------------------------------------------------------------


def _contenders(
    place: Place, shape: LinearShape, rows: int, every_tiling: bool
) -> Iterator[Contender[NF4Inputs]]:
    if place.backend == "triton":
        yield from _paths(place, shape, rows, every_tiling)
    else:
        ops = place.new_ops()
        probe = torch.empty(0, dtype=torch.uint8, device=place.device)
        if isinstance(ops, CpuOps) and panels.can_pack_nf4(probe, place.dtype):
            yield Contender(place.backend, "ours", lambda inputs: _bind_panels(ops, inputs))
        if find_spec("bitsandbytes") is not None:
            yield Contender("bitsandbytes", "peer", _bind_bitsandbytes)
    yield Contender(REFERENCE, "reference", _bind_decoding, can_capture=False)


def _paths(
    place: Place, shape: LinearShape, rows: int, every_tiling: bool
) -> Iterator[Contender[NF4Inputs]]:
    """The path served first."""
    has_kernel = place.is_interpreted or place.dtype != torch.float32
    served = choose(_choices(place, shape) if has_kernel else (FLOAT32,), rows)
    yield _path(served, "ours", is_served=True)
    if every_tiling and has_kernel:
        for tiles in tilings(shape.out_features, shape.in_features, rows):
            if tiles != served.tiles:
                yield _path(Choice(rows, "triton", REASON, tiles), "ours")
    if find_spec("bitsandbytes") is None:
        return
    if served.path != "dequantize":
        yield _path(Choice(rows, "dequantize", REASON), "ours")
    if served.path != "bitsandbytes":
        yield _path(Choice(rows, "bitsandbytes", REASON), "peer")


def _choices(place: Place, shape: LinearShape) -> tuple[Choice, ...]:
    gpu, capability = INTERPRETED
    if place.device.type == "cuda":
        gpu = torch.cuda.get_device_name(place.device)
        capability = torch.cuda.get_device_capability(place.device)
    return tuple(choices_for(gpu, capability, shape.out_features, shape.in_features, BLOCK))


def tilings(out_features: int, in_features: int, rows: int) -> tuple[Tiles, ...]:
    """Tiles worth trying: those of the rules that hold all rows at once, or nearly; each in as many
    splits as fill the GPU, in half and in twice as many."""
    known = [tiles for tiles in _tiles_of_rules() if in_features // GROUP % tiles.groups == 0]
    heights = sorted({tiles.rows for tiles in known})
    holding = [height for height in heights if height >= rows] or heights[-1:]
    wanted = {holding[0], max((h for h in heights if h < holding[0]), default=holding[0])}
    tried: dict[Tiles, None] = {}
    for tiles in known:
        if tiles.rows in wanted:
            tried.update(dict.fromkeys(_in_splits(tiles, out_features, in_features, rows)))
    return tuple(tried)


def _tiles_of_rules() -> tuple[Tiles, ...]:
    rules = (rule for some in RULES.values() for rule in some)
    both = (tiles for rule in rules for tiles in (rule.narrow, rule.wide))
    return tuple(dict.fromkeys(tiles for tiles in both if tiles is not None))


def _in_splits(tiles: Tiles, out_features: int, in_features: int, rows: int) -> Iterator[Tiles]:
    filling = fitted(tiles, out_features, in_features, rows)
    most = min(MAX_SPLITS, in_features // (GROUP * tiles.groups))
    for splits in (filling.splits, filling.splits // 2, 2 * filling.splits):
        if 1 <= splits <= most:
            yield replace(filling, splits=splits)


def described(choice: Choice) -> str:
    tiles = choice.tiles
    if tiles is None:
        return choice.path
    cut = f"{tiles.rows}x{tiles.columns}x{tiles.groups * GROUP}"
    return f"{choice.path} {cut}/{tiles.splits} w{tiles.warps} s{tiles.stages}"


def _path(choice: Choice, role: Role, is_served: bool = False) -> Contender[NF4Inputs]:
    return Contender(
        described(choice) + (" served" if is_served else ""),
        role,
        lambda inputs: _bind_path(choice, inputs),
        facts={
            "path": choice.path,
            "tiles": None if choice.tiles is None else asdict(choice.tiles),
            "is_served": is_served,
        },
    )


def _bind_path(choice: Choice, inputs: NF4Inputs) -> Run:
    if choice.tiles is not None:
        return _bind_triton(choice.tiles, inputs)
    if choice.path == "dequantize":
        return _bind_dequantizing(inputs)
    return _bind_bitsandbytes(inputs)


def _bind_triton(tiles: Tiles, inputs: NF4Inputs) -> Run:
    from lory_kernels.triton_nf4 import matmul

    codes, absmax, out_features = inputs.codes, inputs.absmax, inputs.out_features
    return bound(
        lambda x_TK: matmul(x_TK, codes, absmax, out_features, BLOCK, None, tiles), inputs.x_TK
    )


def _bind_dequantizing(inputs: NF4Inputs) -> Run:
    import bitsandbytes  # noqa: F401 - registers its ops

    codes, absmax = inputs.codes.view(-1, 1), inputs.absmax
    shape = (inputs.out_features, inputs.in_features)
    decode = torch.ops.bitsandbytes.dequantize_4bit.default
    return bound(
        lambda x_TK: linear(x_TK, decode(codes, absmax, BLOCK, "nf4", shape, x_TK.dtype)),
        inputs.x_TK,
    )


def _bind_panels(ops: CpuOps, inputs: NF4Inputs) -> Run:
    shape = (inputs.out_features, inputs.in_features)
    packed = panels.pack_nf4(inputs.codes, inputs.absmax, *shape, inputs.x_TK.dtype)
    return bound(panels.PanelMultiply(packed, None, ops.caller), inputs.x_TK)


def _bind_decoding(inputs: NF4Inputs) -> Run:
    return bound(lambda x_TK: linear(x_TK, inputs.decoded(x_TK.dtype)), inputs.x_TK)


def _bind_bitsandbytes(inputs: NF4Inputs) -> Run:
    from bitsandbytes import functional as bnb

    x_TK, shape = inputs.x_TK, torch.Size((inputs.out_features, inputs.in_features))
    fits_tiles = inputs.out_features % 32 == 0 and x_TK.dtype == torch.bfloat16
    if x_TK.device.type == "cpu" and fits_tiles and bnb.has_avx512bf16():
        return bound(_packed_for_avx512(inputs, shape), x_TK)
    codes, absmax = inputs.codes.view(-1, 1), inputs.absmax
    multiply = torch.ops.bitsandbytes.gemm_4bit.default
    return bound(lambda x_TK: multiply(x_TK, codes, list(shape), absmax, BLOCK, "nf4"), x_TK)


def _packed_for_avx512(inputs: NF4Inputs, shape: torch.Size) -> Multiply:
    """As its Linear4bit does in eval mode on a CPU."""
    from bitsandbytes import functional as bnb

    code = bnb.get_4bit_type("nf4", device="cpu")
    state = bnb.QuantState(
        absmax=inputs.absmax,
        shape=shape,
        code=code,
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=torch.bfloat16,
    )
    codes, state = bnb._convert_weight_packed_for_cpu(inputs.codes, state)
    multiply = torch.ops.bitsandbytes.gemv_4bit.default
    return lambda x_TK: multiply(x_TK, codes, shape, state.absmax, code, BLOCK)
