"""Every GPU path against the CPU reference, each with the proof that its tolerance can fail.

A check has an error, the most that it may be, and the error that a wrong answer makes (another
adapter, another weight): it passes if the first is within the tolerance and the last far outside.
Errors are relative: largest difference over largest magnitude for an op, root mean square of the
difference over the standard deviation for log-probabilities. It must not know what is done with
the findings.

Legend: T tokens, K in features, N out features, S slots.
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import gpu_world
from benchmarks.deadline import Deadline
from benchmarks.gpu_world import FAMILIES, Answer, World
from lory_kernels import BASE_SLOT, Backend, Segments, SiteTable, select
from lory_kernels.nf4_choice import ANY_ROWS, Choice, Tiles, fitted
from lory_server.messages import DtypeName, Quantization
from lory_server.model import nf4
from lory_server.model.families import read_spec
from lory_server.model.linear import Linear

CAUGHT_FACTOR = 3.0
"""A wrong answer must be this much further off than the tolerance."""
BUDGET_S = 440.0
"""Most of a run that may take 8 minutes."""
FEW_BLOCKS = 10
"""Of 8 float32 positions: one long request's worth and a little, so that others are preempted."""
NEAR_TIE = 1e-3
"""Tokens may differ first where the reference's two best log-probabilities are this close."""

TILES = Tiles(rows=16, columns=64, groups=2, warps=4, stages=4)
"""With which the Triton NF4 kernel is checked at every number of rows."""

OP_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
LOGPROB_TOLERANCE: dict[DtypeName, float] = {"float32": 1e-4, "float16": 6e-3, "bfloat16": 4e-2}
DECODE_TOLERANCE = {dtype: 3 * most for dtype, most in LOGPROB_TOLERANCE.items()}
"""The best tokens' log-probabilities spread about a third as wide as those of random prompts."""
LOGPROB_DTYPES: dict[Quantization, tuple[DtypeName, ...]] = {
    "none": ("float32", "float16", "bfloat16"),
    "nf4": ("float32", "bfloat16"),
}


@dataclass(frozen=True)
class Check:
    """One comparison."""

    name: str
    error: float
    tolerance: float
    wrong_error: float
    """What a wrong answer gives; infinite where equality is asked for."""
    note: str = ""

    @property
    def passed(self) -> bool:
        far = self.wrong_error > CAUGHT_FACTOR * self.tolerance
        return math.isfinite(self.error) and self.error <= self.tolerance and far


@dataclass(frozen=True)
class Scope:
    """Where and how much is checked."""

    device: torch.device
    is_tiny: bool
    """A dry run of the script: fewer and smaller cases."""

    @property
    def backend(self) -> Backend:
        return "triton" if self.device.type == "cuda" else "torch"

    @property
    def ways_to_decode(self) -> tuple[str, ...]:
        return ("replayed", "op by op") if self.device.type == "cuda" else ("op by op",)

    @property
    def device_name(self) -> str:
        return self.device.type


def every_check(scope: Scope, deadline: Deadline) -> Iterator[Check]:
    """Those of groups that the deadline cuts off or keeps from beginning end in one that failed."""

    def whole(name: str, checks: Iterator[Check]) -> Iterator[Check]:
        return _whole(name, checks, deadline)

    yield from whole("sgmv", sgmv_checks(scope))
    yield from whole("nf4", nf4_checks(scope))
    with tempfile.TemporaryDirectory() as folder:
        families = ["llama"] if scope.is_tiny else list(FAMILIES)
        worlds = {name: gpu_world.make_world(name, Path(folder)) for name in families}
        for name, world in worlds.items():
            yield from whole(f"decode {name}", decode_checks(scope, name, world))
        yield from whole("engine", engine_checks(scope, worlds["llama"]))
        for name, world in worlds.items():
            yield from whole(f"log-probabilities {name}", logprob_checks(scope, name, world))


def _whole(name: str, checks: Iterator[Check], deadline: Deadline) -> Iterator[Check]:
    """The checks of one group; if they end in an error, or time is over, one more that failed."""
    try:
        while not deadline.is_over:
            check = next(checks, None)
            if check is None:
                return
            yield check
        yield Check(f"{name}, whole", math.nan, 0.0, math.inf, str(deadline))
    except Exception as error:  # noqa: BLE001 - what breaks one group must not hide the others
        note = f"{type(error).__name__}: {error}".partition("\n")[0]
        yield Check(f"{name}, whole", math.nan, 0.0, math.inf, note)


# -- ops --------------------------------------------------------------------------------------


def op_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over largest magnitude; not finite if anything in them is not."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


MIXES = {
    "distinct": lambda rows: [1] * rows,
    "identical": lambda rows: [rows],
    "uniform": lambda rows: _deal(rows, [1.0] * max(1, round(rows**0.5))),
    "zipf": lambda rows: _deal(rows, [place**-1.5 for place in range(1, min(rows, 20) + 1)]),
    "half base": lambda rows: [rows - rows // 2, rows // 2],
}


def sgmv_checks(scope: Scope) -> Iterator[Check]:
    """Onto little, so that what the base adds hides no error; gains and biases among the slots."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for in_features, out_features in _sgmv_shapes(scope, dtype):
            for mix in MIXES:
                for rows in (1, 7) if scope.is_tiny else (1, 33, 133):
                    case = SgmvCase.draw(mix, rows, in_features, out_features, dtype)
                    yield case.check(scope)


def _sgmv_shapes(scope: Scope, dtype: torch.dtype) -> list[tuple[int, tuple[int, ...]]]:
    """Those of an 8B model; every one more compiles for a minute, so bfloat16 alone has both."""
    if scope.is_tiny:
        return [(96, (64, 32))]
    qkv, down = (4096, (4096, 1024, 1024)), (14336, (4096,))
    return [qkv, down] if dtype == torch.bfloat16 else [qkv]


@dataclass(frozen=True)
class SgmvCase:
    """One call of SGMV, on the CPU."""

    name: str
    y_TN: Tensor
    x_TK: Tensor
    site: SiteTable
    pool: Tensor
    segments: Segments

    @classmethod
    def draw(
        cls,
        mix: str,
        rows: int,
        in_features: int,
        out_features: tuple[int, ...],
        dtype: torch.dtype,
    ) -> "SgmvCase":
        generator = torch.Generator().manual_seed(rows)
        counts = MIXES[mix](rows)
        slots = list(range(len(counts)))
        if mix == "half base":
            slots[0] = BASE_SLOT
        num_slots = max(len(slots), 2)
        site, pool = _random_site(num_slots, in_features, out_features, generator)
        adapted = sum(n for n, slot in zip(counts, slots, strict=True) if slot != BASE_SLOT)
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        segments = Segments(
            starts, torch.tensor(slots).int(), rows, len(counts), max(_RANKS), adapted
        )
        x_TK = torch.randn(rows, in_features, generator=generator)
        y_TN = 0.1 * torch.randn(rows, sum(out_features), generator=generator)
        kind = str(dtype).removeprefix("torch.")
        name = f"sgmv {kind} {in_features}->{sum(out_features)} {mix} {rows} rows"
        site, pool = _with_outputs(site, pool.to(dtype), generator)
        return cls(name, y_TN.to(dtype), x_TK.to(dtype), site, pool, segments)

    def check(self, scope: Scope) -> Check:
        expected = self._run(torch.device("cpu"), "torch", self.segments)
        actual = self._run(scope.device, scope.backend, self.segments)
        wrong = self._run(torch.device("cpu"), "torch", self._mixed_up())
        if not self.segments.adapted_rows:
            changed = float((actual - self.y_TN).abs().max())
            return Check(self.name, changed, 0.0, math.inf, "base rows only")
        tolerance = OP_TOLERANCE[self.x_TK.dtype]
        return Check(self.name, op_error(actual, expected), tolerance, op_error(wrong, expected))

    def _mixed_up(self) -> Segments:
        """Every adapted segment on the next slot."""
        slots, num_slots = self.segments.slots_G, self.site.rank_SK.shape[0]
        following = torch.where(slots == BASE_SLOT, slots, (slots + 1) % num_slots)
        return replace(self.segments, slots_G=following.int())

    def _run(self, device: torch.device, backend: str, segments: Segments) -> Tensor:
        ops = select(backend)  # pyright: ignore[reportArgumentType]
        y_TN = self.y_TN.to(device, copy=True)
        tables = {
            field.name: table.to(device)
            for field in fields(self.site)
            if isinstance(table := getattr(self.site, field.name), Tensor)
        }
        there = replace(self.site, **tables)
        moved = replace(
            segments,
            starts_G1=segments.starts_G1.to(device),
            slots_G=segments.slots_G.to(device),
        )
        ops.sgmv(y_TN, self.x_TK.to(device), there, self.pool.to(device), moved)
        return y_TN.cpu()


_RANKS = (16, 3, 64, 8)


def _random_site(
    num_slots: int, in_features: int, out_features: tuple[int, ...], generator: torch.Generator
) -> tuple[SiteTable, Tensor]:
    """Slots of mixed ranks, one after the other in one pool."""
    slices = len(out_features)
    ranks = [[_RANKS[(slot + k) % len(_RANKS)] for k in range(slices)] for slot in range(num_slots)]
    a_offset, b_offset = torch.zeros(2, num_slots, slices, dtype=torch.int64)
    place = 0
    for slot in range(num_slots):
        for k, width in enumerate(out_features):
            a_offset[slot, k] = place
            b_offset[slot, k] = place + ranks[slot][k] * in_features
            place += ranks[slot][k] * (in_features + width)
    pool = torch.randn(place, generator=generator) / math.sqrt(in_features)
    offsets = tuple(sum(out_features[:k]) for k in range(slices))
    scale_SK = torch.rand(num_slots, slices, generator=generator) + 0.5
    rank_SK = torch.tensor(ranks, dtype=torch.int32)
    alignment = math.gcd(in_features, *out_features)
    site = SiteTable(
        in_features, offsets, out_features, a_offset, b_offset, rank_SK, scale_SK, alignment
    )
    return site, pool


def _with_outputs(
    site: SiteTable, pool: Tensor, generator: torch.Generator
) -> tuple[SiteTable, Tensor]:
    """Gains, biases, both or neither, in turn: float32 whatever the pool is made of."""
    offsets_2SK = torch.full((2, *site.rank_SK.shape), -1)
    pieces, place = [pool], pool.numel()
    for slot, k in product(range(len(site.rank_SK)), range(len(site.out_features))):
        for which in (0, 1):
            if (slot + k) >> which & 1:
                numbers = torch.randn(site.out_features[k], generator=generator)
                offsets_2SK[which, slot, k] = place
                pieces.append((0.1 * numbers if which else 1 + 0.5 * numbers).view(pool.dtype))
                place += pieces[-1].numel()
    gain_offset_SK, bias_offset_SK = offsets_2SK
    tabled = replace(site, gain_offset_SK=gain_offset_SK, bias_offset_SK=bias_offset_SK)
    return tabled, torch.cat(pieces)


def _deal(rows: int, shares: Sequence[float]) -> list[int]:
    counts = [int(rows * share / sum(shares)) for share in shares]
    counts[0] += rows - sum(counts)
    return counts


def nf4_checks(scope: Scope) -> Iterator[Check]:
    """The linear against a float32 product with the same decoded weights."""
    shapes = [(128, 64)] if scope.is_tiny else [(6144, 4096), (4096, 14336), (28672, 4096)]
    sizes = (1, 5) if scope.is_tiny else (1, 5, 16, 24, 64, 256)
    for out_features, in_features in shapes:
        weights = [_random_nf4(out_features, in_features, seed) for seed in (0, 1)]
        right_NK, wrong_NK = (weight.dequantize(torch.float32) for weight in weights)
        weight = weights[0].to(scope.device)
        bias_N = torch.randn(out_features, generator=torch.Generator().manual_seed(2)).bfloat16()
        for rows in sizes:
            x_TK = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(rows))
            x_TK = x_TK.bfloat16()
            expected, wrong = (x_TK.float() @ w.T + bias_N.float() for w in (right_NK, wrong_NK))
            for path, linear in nf4_paths(scope, weight, bias_N, rows).items():
                yield Check(
                    f"nf4 {path} {in_features}->{out_features} {rows} rows",
                    op_error(linear(x_TK.to(scope.device), None), expected),
                    OP_TOLERANCE[torch.bfloat16],
                    op_error(wrong, expected),
                )


def nf4_paths(scope: Scope, weight: nf4.NF4Weight, bias_N: Tensor, rows: int) -> dict[str, Linear]:
    """What is served, and on CUDA each of the ways it may choose from."""
    bias_N = bias_N.to(scope.device)
    served = nf4.nf4_linear(weight, bias_N, torch.bfloat16, select(scope.backend))
    if scope.device.type != "cuda":
        return {"served": served}
    tiles = fitted(TILES, weight.out_features, weight.in_features, rows)
    ways = (
        Choice(ANY_ROWS, "triton", "to be checked", tiles),
        Choice(ANY_ROWS, "bitsandbytes", "to be checked"),
        Choice(ANY_ROWS, "dequantize", "to be checked"),
    )
    return {"served": served} | {way.path: nf4.NF4Linear(weight, bias_N, (way,)) for way in ways}


def _random_nf4(out_features: int, in_features: int, seed: int) -> nf4.NF4Weight:
    generator = torch.Generator().manual_seed(seed)
    weight_NK = torch.randn(out_features, in_features, generator=generator)
    return nf4.quantize(weight_NK / math.sqrt(in_features), "random", double_quant=False)


# -- whole engines ----------------------------------------------------------------------------


def logprob_checks(scope: Scope, family: str, world: World) -> Iterator[Check]:
    """Log-probabilities of the prompts' tokens: base rows and adapters mixed in one batch."""
    commands = gpu_world.requests(world, 10, scored=True)
    swapped = gpu_world.rotated(world, commands)
    for quantize, dtypes in LOGPROB_DTYPES.items():
        plain = world.options(device="cpu", dtype="float32", quantize=quantize)
        expected = _logprobs(gpu_world.answer(plain, commands).answers)
        wrong = _logprobs(gpu_world.answer(plain, swapped).answers)
        for dtype in dtypes:
            # Prompts are never replayed: capturing would be for nothing.
            options = world.options(
                device=scope.device_name, dtype=dtype, quantize=quantize, cuda_graphs=False
            )
            actual = _logprobs(gpu_world.answer(options, commands).answers)
            yield Check(
                f"log-probabilities {family} {dtype} quantize={quantize}",
                _rms_error(actual, expected),
                LOGPROB_TOLERANCE[dtype],
                _rms_error(wrong, expected),
            )


def decode_checks(scope: Scope, family: str, world: World) -> Iterator[Check]:
    """Log-probabilities of what is generated: decode steps, replayed and op by op.

    One prompt is so long that attention splits its keys.
    """
    long_prompt = 40 if scope.is_tiny else 700
    commands = gpu_world.requests(world, 10, scored=False, long_prompt=long_prompt)
    swapped = gpu_world.rotated(world, commands)
    for quantize, dtypes in LOGPROB_DTYPES.items():
        plain = world.options(device="cpu", dtype="float32", quantize=quantize)
        expected = gpu_world.answer(plain, commands).answers
        wrong = gpu_world.answer(plain, swapped).answers
        for dtype in dtypes:
            for way in scope.ways_to_decode:
                options = world.options(
                    device=scope.device_name,
                    dtype=dtype,
                    quantize=quantize,
                    cuda_graphs=way == "replayed",
                )
                actual = gpu_world.answer(options, commands).answers
                yield Check(
                    f"decode {family} {dtype} quantize={quantize}, {way}",
                    _rms_error(*_until_they_part(actual, expected)),
                    DECODE_TOLERANCE[dtype],
                    _rms_error(*_until_they_part(wrong, expected)),
                )


def _until_they_part(actual: Sequence[Answer], expected: Sequence[Answer]) -> tuple[Tensor, Tensor]:
    """The best tokens' log-probabilities up to where the tokens differ, that place included."""
    pairs: list[tuple[float, float]] = []
    for ours, theirs in zip(actual, expected, strict=True):
        for place, pair in enumerate(zip(ours.logprobs, theirs.logprobs, strict=True)):
            pairs.append(pair)
            if ours.tokens[place] != theirs.tokens[place]:
                break
    ours_N, theirs_N = torch.tensor(pairs).unbind(-1)
    return ours_N, theirs_N


def _logprobs(answers: Sequence[Answer]) -> Tensor:
    return torch.tensor([value for one in answers for value in one.prompt_logprobs])


def _rms_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).double().pow(2).mean().sqrt() / expected.double().std())


def engine_checks(scope: Scope, world: World) -> Iterator[Check]:
    """Greedy answers in float32, under every pressure, against the CPU's without any."""
    commands = gpu_world.requests(world, 12 if scope.is_tiny else 20, scored=False)
    calm = world.options(device="cpu", dtype="float32")
    expected = gpu_world.answer(calm, commands).answers
    wrong = gpu_world.answer(calm, gpu_world.rotated(world, commands)).answers
    wrong_share = _share_of_answers_that_differ(wrong, expected)
    there = {"device": scope.device_name, "dtype": "float32"}
    if wrong_share < 0.5:
        raise RuntimeError(f"only {wrong_share:.0%} of the answers change with the adapter")
    few_blocks = FEW_BLOCKS * read_spec(world.base).kv_bytes_per_block(8, 4)
    cases = {
        "pipelined": (world.options(**there), 1),
        "not pipelined": (world.options(**there), 0),
        "op by op": (world.options(**there, cuda_graphs=False), 1),
        "two slots": (world.options(**there, max_resident_adapters=2), 1),
        "few blocks": (world.options(**there, kv_bytes=few_blocks), 1),
        "few blocks, not pipelined": (world.options(**there, kv_bytes=few_blocks), 0),
    }
    for name, (options, depth) in cases.items():
        run = gpu_world.answer(options, commands, depth)
        note = f"{run.evictions} evictions, {run.preemptions} preemptions"
        pressed = {"two slots": run.evictions > 0, "few blocks": run.preemptions > 0}
        if not pressed.get(name.partition(",")[0], True):
            raise RuntimeError(f"engine, {name}: there was no pressure ({note})")
        error = _share_of_answers_that_differ(run.answers, expected)
        # Any answer that differs beyond a near tie fails; a mix-up must change most of them.
        yield Check(f"engine float32 greedy, {name}", error, 0.0, wrong_share, note)


def _share_of_answers_that_differ(actual: Sequence[Answer], expected: Sequence[Answer]) -> float:
    pairs = list(zip(actual, expected, strict=True))
    return sum(not _same(ours, theirs) for ours, theirs in pairs) / len(pairs)


def _same(ours: Answer, theirs: Answer) -> bool:
    """Up to the first near tie of the reference, if they part there."""
    if len(ours.tokens) != len(theirs.tokens):
        return False
    for place, (our, their) in enumerate(zip(ours.tokens, theirs.tokens, strict=True)):
        if our != their:
            return theirs.margins[place] < NEAR_TIE
    return True
