"""Triton's NF4 matmul: its PTX run by hand, against bitsandbytes in the interpreter, and compiled.

The interpreter knows no PTX, so it decodes by comparing; that the instructions of the GPU decode to
the same bits is shown by carrying them out here, on every byte.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from kernel_cases import TOLERANCE, error_of
from lory_kernels.nf4_choice import GROUP, RULES, Tiles, fitted
from triton_processes import (
    SHARED_MEMORY_LIMIT_BYTES,
    Findings,
    answer,
    findings_of,
    launches_built,
    needs_triton,
)

pytestmark = needs_triton

INTERPRETED = {"float32": torch.float32, "float16": torch.float16}
COMPILED = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ROWS = (1, 7, 33, 133)
SHAPES = ((40, 64), (130, 576), (40, 896))
"""(out features, in features)."""
BLOCKS = (128, 448)
CONFIGURATIONS = list(
    dict.fromkeys(
        tiles
        for rules in RULES.values()
        for rule in rules
        for tiles in (rule.narrow, rule.wide)
        if tiles is not None
    )
)


@pytest.fixture(scope="module")
def interpreted() -> Findings:
    return findings_of(__file__, "interpret")


@pytest.fixture(scope="module")
def compiled() -> Findings:
    return findings_of(__file__, "compile")


def executed(ptx: str, word: int) -> list[int]:
    """$0 to $3 after the instructions have run on $4 = word, as PTX's manual defines them."""
    registers = {"$4": word}

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for line in ptx.splitlines()[2:-1]:
        name, operands = line.rstrip(";").split(" ", 1)
        target, *sources = operands.split(", ")
        a, b, *more = [value(source) for source in sources]
        if name == "shl.b32":
            registers[target] = a << b & 0xFFFFFFFF
        elif name == "shr.u32":
            registers[target] = a >> b
        elif name == "and.b32":
            registers[target] = a & b
        elif name == "prmt.b32":
            registers[target] = permuted(a, b, more[0])
        elif name == "lop3.b32":
            registers[target] = combined(a, b, *more)
        else:
            raise AssertionError(f"an instruction this emulation lacks: {line}")
    return [registers[f"${i}"] for i in range(4)]


def permuted(a: int, b: int, selector: int) -> int:
    """PRMT: a nibble of the selector names a byte, its top bit asks for that byte's sign alone."""
    pool = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    picked = []
    for place in range(4):
        nibble = selector >> 4 * place & 15
        byte = pool[nibble & 7]
        picked.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(picked), "little")


def combined(a: int, b: int, c: int, table: int) -> int:
    """LOP3: bit 4a + 2b + c of the table, for each bit."""
    return sum(
        (table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32)
    )


def bits_of(levels: Tensor) -> list[int]:
    return [bits & 0xFFFF for bits in levels.view(torch.int16).tolist()]


def test_levels_are_those_of_bitsandbytes() -> None:
    from lory_kernels.triton_nf4 import LEVELS

    assert torch.equal(torch.tensor(LEVELS), bnb.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("dtype", COMPILED)
def test_ptx_decodes_every_byte_to_the_bits_of_bitsandbytes(dtype: str) -> None:
    """Each byte in each of the four places. A scale of 1 leaves the level as it is."""
    from lory_kernels.triton_nf4 import prmt_decode

    ptx = prmt_decode(COMPILED[dtype])
    codes = torch.arange(256, dtype=torch.uint8)
    levels = torch.ops.bitsandbytes.dequantize_4bit(
        codes.view(-1, 1), torch.ones(8), 64, "nf4", (8, 64), COMPILED[dtype]
    )
    bits = bits_of(levels.view(-1))
    for byte in range(256):
        others = [byte, (byte + 85) % 256, 255 - byte, byte * 7 % 256]
        for turn in range(4):
            four = others[turn:] + others[:turn]
            expected = [bits[2 * at] | bits[2 * at + 1] << 16 for at in four]
            assert executed(ptx, int.from_bytes(bytes(four), "little")) == expected


def test_emulation_notices_a_wrong_table_and_a_wrong_selector() -> None:
    from lory_kernels.triton_nf4 import prmt_decode

    ptx = prmt_decode(torch.bfloat16)
    words = (0x01234567, 0x89ABCDEF, 0x00FF00FF, 0x80087FF7)
    right = [executed(ptx, word) for word in words]
    for old, new in (("0x9d8c", "0x8d8c"), ("0x4051", "0x5041"), ("0xd8", "0xca")):
        wrong = [executed(ptx.replace(old, new), word) for word in words]
        assert wrong != right, old


def test_dtypes_without_a_decoder_are_refused() -> None:
    from lory_kernels.triton_nf4 import prmt_decode

    with pytest.raises(ValueError, match=r"float32.*bfloat16 or float16"):
        prmt_decode(torch.float32)


@pytest.mark.parametrize("dtype", INTERPRETED)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("splits", [1, 3])
def test_matmul_equals_decoding_and_multiplying(
    interpreted: Findings, dtype: str, rows: int, shape: tuple[int, int], splits: int
) -> None:
    """Rows of x are strided, what lies around the inputs and in fresh outputs is NaN."""
    error = interpreted["error"][f"{shape}-{rows}-{splits}-{dtype}"]
    assert error <= TOLERANCE[INTERPRETED[dtype]]


@pytest.mark.parametrize("dtype", INTERPRETED)
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_of_more_codes_have_their_scale(
    interpreted: Findings, dtype: str, block: int
) -> None:
    assert interpreted["block"][f"{block}-{dtype}"] <= TOLERANCE[INTERPRETED[dtype]]


@pytest.mark.parametrize("dtype", INTERPRETED)
@pytest.mark.parametrize("name", range(len(CONFIGURATIONS)), ids=str)
def test_every_configuration_computes_the_same(
    interpreted: Findings, name: int, dtype: str
) -> None:
    assert interpreted["tiles"][f"{name}-{dtype}"] <= TOLERANCE[INTERPRETED[dtype]]


@pytest.mark.parametrize("dtype", INTERPRETED)
@pytest.mark.parametrize("what", ["one nibble swapped", "one scale of the next block", "no bias"])
def test_tolerance_catches_what_is_wrong(interpreted: Findings, what: str, dtype: str) -> None:
    assert interpreted[what][dtype] > 3 * TOLERANCE[INTERPRETED[dtype]]


def test_results_are_the_same_from_run_to_run(interpreted: Findings) -> None:
    assert set(interpreted["repeat"].values()) == {0.0}


def test_levels_by_comparing_have_the_bits_of_the_dtype(interpreted: Findings) -> None:
    assert set(interpreted["levels"].values()) == {0}


def test_a_linear_of_a_model_multiplies_by_the_kernel(interpreted: Findings) -> None:
    assert interpreted["linear"]["float16"] <= TOLERANCE[torch.float16]


def test_fresh_memory_was_poisoned(interpreted: Findings) -> None:
    assert interpreted["poisoned"]["empty"] == 1


def test_what_the_kernel_cannot_take_is_refused_by_name() -> None:
    from lory_kernels.triton_nf4 import matmul

    case, tiles = nf4_case(2, 8, 192, torch.float16), CONFIGURATIONS[0]
    with pytest.raises(ValueError, match=r"x: float32.*dequantize"):
        replace(case, x_TK=case.x_TK.float()).run(tiles)
    with pytest.raises(ValueError, match=r"tiles.groups: 2 does not divide 192 / 64"):
        case.run(tiles)
    one = replace(tiles, groups=1)
    with pytest.raises(ValueError, match="codes: 767 bytes for 8 x 192"):
        replace(case, codes=case.codes[:-1]).run(one)
    with pytest.raises(ValueError, match="scales: 23 for 8 x 192"):
        replace(case, scales=case.scales[:-1]).run(one)
    for block in (32, 128):
        with pytest.raises(ValueError, match=f"block: {block} codes a scale"):
            matmul(case.x_TK, case.codes, case.scales, 8, block, None, one)


@pytest.mark.parametrize("arch", SHARED_MEMORY_LIMIT_BYTES)
@pytest.mark.parametrize("dtype", COMPILED)
def test_every_configuration_compiles_fits_and_stays_in_registers(
    compiled: Findings, arch: int, dtype: str
) -> None:
    """No lookup becomes a shuffle or a copy, which would be of 4 bytes: codes and x come in more.

    The one shuffle allowed is of wgmma, which asks one lane for the number of the warp.
    """
    for place, tiles in enumerate(CONFIGURATIONS):
        built = compiled[f"sm_{arch}-{dtype}"][str(place)]
        assert built["spilled_bytes"] == 0, tiles
        assert built["shared_bytes"] <= SHARED_MEMORY_LIMIT_BYTES[arch]
        assert built["shfl"] <= (built["wgmma"] > 0), tiles
        assert built["prmt"] > 0
        assert built["wide_copies"] == built["copies"] > 0, tiles
        assert (built["wgmma"] > 0) == (arch == 90 and tiles.rows >= 64)
        assert (built["mma.sync"] > 0) == (arch == 80 or tiles.rows < 64)


@dataclass(frozen=True)
class Nf4Case:
    x_TK: Tensor
    codes: Tensor
    scales: Tensor
    out_features: int
    block: int
    bias_N: Tensor | None

    def run(self, tiles: Tiles) -> Tensor:
        from lory_kernels.triton_nf4 import matmul

        return matmul(
            self.x_TK, self.codes, self.scales, self.out_features, self.block, self.bias_N, tiles
        )

    def expected(self) -> Tensor:
        """By bitsandbytes' own decoding, multiplied in float64."""
        shape = (self.out_features, self.x_TK.shape[1])
        weight_NK = torch.ops.bitsandbytes.dequantize_4bit(
            self.codes.view(-1, 1).contiguous(), self.scales.contiguous(), self.block, "nf4",
            shape, self.x_TK.dtype,
        )  # fmt: skip
        y_TN = self.x_TK.double() @ weight_NK.double().T
        return y_TN if self.bias_N is None else y_TN + self.bias_N.double()


def nf4_case(
    rows: int, out_features: int, in_features: int, dtype: torch.dtype, block: int = GROUP
) -> Nf4Case:
    """Rows of x lie apart, and NaN lies around x and the scales."""
    generator = torch.Generator().manual_seed(rows + out_features)
    size = out_features * in_features
    wide = torch.full((rows + 2, in_features + 8), float("nan"), dtype=dtype)
    x_TK = wide[1:-1, :in_features]
    x_TK.copy_(torch.randn(rows, in_features, generator=generator))
    codes = torch.randint(0, 256, (size // 2,), generator=generator, dtype=torch.uint8)
    scales = torch.full((size // block + 16,), float("nan"))[8:-8]
    scales.copy_(torch.rand(size // block, generator=generator) + 0.5)
    bias_N = torch.randn(out_features, generator=generator).to(dtype) * 3
    return Nf4Case(x_TK, codes, scales, out_features, block, bias_N)


def tiles_for(rows: int, in_features: int, splits: int) -> Tiles:
    """The narrowest configuration that takes the rows in one tile, or the largest."""
    enough = [tiles for tiles in CONFIGURATIONS if tiles.rows >= rows] or CONFIGURATIONS[-1:]
    groups = enough[0].groups if in_features // GROUP % enough[0].groups == 0 else 1
    return replace(enough[0], groups=groups, splits=splits)


def wrong_cases(case: Nf4Case) -> Iterator[tuple[str, Nf4Case]]:
    codes, scales = case.codes.clone(), case.scales.clone()
    codes[5] = codes[5] << 4 | codes[5] >> 4
    assert codes[5] != case.codes[5]
    yield "one nibble swapped", replace(case, codes=codes)
    scales[3] = scales[4]
    yield "one scale of the next block", replace(case, scales=scales)
    yield "no bias", replace(case, bias_N=None)


def _interpret() -> Findings:
    torch.use_deterministic_algorithms(True)  # fills what torch.empty makes with NaN
    found: Findings = {"poisoned": {"empty": int(torch.empty(3).isnan().all())}}
    for name, dtype in INTERPRETED.items():
        for subject, errors in (
            ("error", _shape_errors(dtype)),
            ("block", _block_errors(dtype)),
            ("tiles", _tile_errors(dtype)),
        ):
            found.setdefault(subject, {}).update({f"{k}-{name}": e for k, e in errors.items()})
        case, tiles = nf4_case(7, 40, 64, dtype), replace(CONFIGURATIONS[0], groups=1)
        for what, wrong in wrong_cases(case):
            found.setdefault(what, {})[name] = error_of(wrong.run(tiles), case.expected())
        twice = [nf4_case(7, 40, 576, dtype).run(replace(tiles, splits=3)) for _ in range(2)]
        found.setdefault("repeat", {})[name] = error_of(*twice)
        found.setdefault("levels", {})[name] = _wrong_levels(dtype)
    found["linear"] = {"float16": _linear_error()}
    return found


def _shape_errors(dtype: torch.dtype) -> dict[str, float]:
    errors: dict[str, float] = {}
    for shape in SHAPES:
        for rows in ROWS:
            case = nf4_case(rows, *shape, dtype)
            expected = case.expected()
            for splits in (1, 3):
                y_TN = case.run(tiles_for(rows, shape[1], splits))
                errors[f"{shape}-{rows}-{splits}"] = error_of(y_TN, expected)
    return errors


def _block_errors(dtype: torch.dtype) -> dict[str, float]:
    errors: dict[str, float] = {}
    for block in BLOCKS:
        case = nf4_case(7, 40, 896, dtype, block)
        errors[str(block)] = error_of(case.run(tiles_for(7, 896, 2)), case.expected())
    return errors


def _tile_errors(dtype: torch.dtype) -> dict[str, float]:
    case = nf4_case(33, 130, 256, dtype)
    expected = case.expected()
    return {
        str(place): error_of(case.run(replace(tiles, splits=place % 2 + 1)), expected)
        for place, tiles in enumerate(CONFIGURATIONS)
    }


def _linear_error() -> float:
    from lory_kernels.nf4_choice import ANY_ROWS, Choice
    from lory_server.model.nf4 import NF4Linear, NF4Weight

    case = nf4_case(7, 40, 192, torch.float16)
    weight = NF4Weight(case.codes, case.scales, 40, 192)
    choice = Choice(ANY_ROWS, "triton", "Tested.", replace(CONFIGURATIONS[0], groups=1, splits=2))
    return error_of(NF4Linear(weight, case.bias_N, (choice,))(case.x_TK, None), case.expected())


def _wrong_levels(dtype: torch.dtype) -> int:
    """How many of 256 bytes come out with other bits: x is 1 in one place, so y is the level."""
    codes = torch.arange(256, dtype=torch.uint8)
    x_TK = torch.eye(64).to(dtype)
    case = Nf4Case(x_TK, codes, torch.ones(8), 8, GROUP, None)
    y_TN = case.run(replace(CONFIGURATIONS[3], groups=1))
    from lory_kernels.triton_nf4 import LEVELS

    levels = torch.tensor(LEVELS).to(dtype)
    pairs = torch.stack((levels[(codes >> 4).long()], levels[(codes & 15).long()]), dim=1)
    return int((y_TN.T.reshape(-1) != pairs.reshape(-1)).sum())


def _compile() -> Findings:
    found: Findings = {}
    for arch in SHARED_MEMORY_LIMIT_BYTES:
        for name, dtype in COMPILED.items():
            found[f"sm_{arch}-{name}"] = {
                str(place): _facts(tiles, dtype, arch) for place, tiles in enumerate(CONFIGURATIONS)
            }
    return found


def _facts(tiles: Tiles, dtype: torch.dtype, arch: int) -> dict[str, int]:
    """bfloat16 in splits as a model of 8B has them, float16 in one piece with its bias."""
    rows, out_features, in_features = tiles.rows, 4096, 4096
    if dtype == torch.bfloat16:
        tiles = fitted(tiles, out_features, in_features, rows)
    case = Nf4Case(
        torch.empty(rows, in_features, dtype=dtype),
        torch.empty(out_features * in_features // 2, dtype=torch.uint8),
        torch.empty(out_features * in_features // GROUP),
        out_features,
        GROUP,
        torch.empty(out_features, dtype=dtype),
    )
    kernels = launches_built(lambda: case.run(tiles), arch)
    assert ("reduce_kernel" in kernels) == (tiles.splits > 1)
    built = kernels["matmul_kernel"]
    words = ("shfl", "prmt", "wgmma.mma_async", "mma.sync")
    counts = {word.removesuffix(".mma_async"): built.ptx.count(word) for word in words}
    copies = re.findall(r"cp\.async\.c[ag]\.shared\S*.*?, 0x(\w+)[,;]", built.ptx)
    return counts | {
        "spilled_bytes": sum(kernel.spilled_bytes for kernel in kernels.values()),
        "shared_bytes": built.shared_bytes,
        "copies": built.ptx.count("cp.async.c") - built.ptx.count("cp.async.commit"),
        "wide_copies": sum(num_bytes in ("8", "10") for num_bytes in copies),
    }


if __name__ == "__main__":
    answer({"interpret": _interpret, "compile": _compile})
