"""An adapter's numbers from those of others: sums, TIES, DARE, magnitudes, SVD, and LoRAX's ways.

    linear            sum_i w_i s_i B_i A_i, exactly: A = [w_0 s_0 A_0; w_1 s_1 A_1], B = [B_0, B_1]
    svd               the rank-r factors nearest to that sum
    ties, dare_*      PEFT's: of each of A and B by itself, with sqrt(|w_i s_i|), and A the sign
    magnitude_prune
    lorax_*           LoRAX's: of each of A and B by itself, with w_i; not the sum

In float32, a slice at a time, read where the sources' files have it: what is in memory is one slice
of each source and the result. The revision is a digest of the sources' revisions and of the recipe.
It must not know names, tiers or processes.

Legend: N out features, K in features, R rank, S sources.
"""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import msgspec
import torch
from torch import Tensor

from lory_server.adapters.blob import REVISION_CHARS, AdapterBlob, asked_revision, new_blob
from lory_server.adapters.errors import (
    AdapterError,
    AdapterInvalidError,
    RevisionNotFoundError,
    blaming,
)
from lory_server.adapters.format import AdapterManifest, Base, TensorSpec, read_manifest
from lory_server.adapters.header import WEIGHTS_NAME, read_exactly
from lory_server.adapters.manner import read_manner_file, with_tokenizer
from lory_server.adapters.merge_plan import MergePlan, Part, module_of, plan_merge
from lory_server.adapters.store import OpenFiles
from lory_server.recipes import ELECTING, PRUNING, RANDOM, Recipe

HASHED_BYTES = 1024 * 1024
"""Read at once, to tell a source's revision."""
VERSION = "lory merge 1"
"""First in what is hashed; another one whenever the same recipe would give other numbers."""

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_plan(recipe: Recipe, sources: Sequence[OpenFiles], base: Base) -> MergePlan:
    """From the open files of the sources; raises AdapterError."""
    manifests: list[AdapterManifest] = []
    manners: list[str] = []
    for index, files in enumerate(sources):
        try:
            manifest = read_manifest(files.config_fd, files.weights_fd, base, files.tokenizer_fds)
            manner = read_manner_file(files.manifest_fd)
        except AdapterError as error:
            raise blaming(error, recipe, index) from error
        manifests.append(manifest)
        manners.append(with_tokenizer(manner, manifest.tokenizer, manifest.vocab_size).digest)
    return plan_merge(recipe, manifests, manners)


def merged_blob(weights_fds: Sequence[int], plan: MergePlan, dtype: torch.dtype) -> AdapterBlob:
    """The result in memory of its own; raises as `merge_numbers` does."""
    num_bytes = plan.manifest.num_bytes(dtype.itemsize)
    data = torch.zeros(num_bytes, dtype=torch.uint8).view(dtype)
    return new_blob(merge_numbers(weights_fds, plan, data), plan.manifest, data)


@torch.inference_mode()
def merge_numbers(weights_fds: Sequence[int], plan: MergePlan, data: Tensor) -> str:
    """Merge into `data`, which is zero, of the engine's dtype and as long as all chunks; the
    revision of the result. Raises AdapterError."""
    revision = _revision(weights_fds, plan)
    starts = new_blob("", plan.manifest, data).chunk_starts
    placed = plan.manifest.placed(starts)
    for (merged, places), parts in zip(placed, plan.parts, strict=True):
        assert merged.a is not None
        factors = [_read(weights_fds[part.source], plan.recipe, part) for part in parts]
        a_RK, b_NR = _merge(plan.recipe, factors, merged.rank, module_of(merged))
        for start, numbers in ((places["a"], a_RK), (places["b"], b_NR.T)):
            target = data[start : start + numbers.numel()].view(numbers.shape)
            target.copy_(numbers)
            _check_finite(target, merged.a.name)
    return revision


# -- which bytes ----------------------------------------------------------------------------


def _revision(weights_fds: Sequence[int], plan: MergePlan) -> str:
    recipe, revisions = plan.recipe, []
    for index, (fd, manifest) in enumerate(zip(weights_fds, plan.sources, strict=True)):
        revision = source_revision(fd, manifest, plan.manners[index])
        wanted = recipe.sources[index].revision
        if not revision.startswith(wanted):
            error = RevisionNotFoundError(
                f"is revision {revision} on disk, and {wanted} was asked for; a merge reads its"
                " sources from the disk"
            )
            raise blaming(error, recipe, index)
        revisions.append((revision, recipe.sources[index].weight))
    told = msgspec.structs.replace(recipe, sources=(), name="")
    raw = msgspec.json.encode((VERSION, revisions, told))
    return hashlib.sha256(raw).hexdigest()[:REVISION_CHARS]


def source_revision(weights_fd: int, manifest: AdapterManifest, manner: str = "") -> str:
    """What an adapter's revision is when it is loaded by itself, with its manner's digest."""
    digest = hashlib.sha256(manifest.digest)
    starts = range(_data_start(manifest), manifest.file_bytes, HASHED_BYTES)
    for start, end in pairwise((*starts, manifest.file_bytes)):
        digest.update(read_exactly(weights_fd, end - start, start, WEIGHTS_NAME))
    return asked_revision(digest.hexdigest()[:REVISION_CHARS], manner)


def _data_start(manifest: AdapterManifest) -> int:
    """Tensors lie back to back to the file's end, and every one has its place in a slice."""
    return min(
        spec.offset for part in manifest.slices for spec in (part.a, part.b) if spec is not None
    )


# -- one slice ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Factors:
    """What one source has for a slice, in float32."""

    a_RK: Tensor
    b_NR: Tensor
    weight: float
    scale: float


def _read(weights_fd: int, recipe: Recipe, part: Part) -> Factors:
    assert part.slice.a is not None
    assert part.slice.b is not None
    try:
        a_RK, b_NR = (_tensor(weights_fd, spec) for spec in (part.slice.a, part.slice.b))
    except AdapterError as error:
        raise blaming(error, recipe, part.source) from error
    return Factors(a_RK, b_NR, recipe.sources[part.source].weight, part.slice.scale)


def _tensor(weights_fd: int, spec: TensorSpec) -> Tensor:
    raw = bytearray(spec.num_bytes)
    _read_into(weights_fd, memoryview(raw), spec.offset)
    tensor = torch.frombuffer(raw, dtype=_DTYPES[spec.dtype]).view(spec.shape).float()
    _check_finite(tensor, spec.name)
    return tensor


def _read_into(fd: int, rest: memoryview, offset: int) -> None:
    while rest:
        num_bytes = os.preadv(fd, [rest], offset)
        if not num_bytes:
            raise AdapterInvalidError(f"{WEIGHTS_NAME}: the file is truncated")
        rest, offset = rest[num_bytes:], offset + num_bytes


def _check_finite(numbers: Tensor, name: str) -> None:
    """By the extremes, which NaN spreads to."""
    low, high = torch.aminmax(numbers)
    if not (math.isfinite(low) and math.isfinite(high)):
        dtype = str(numbers.dtype).removeprefix("torch.")
        raise AdapterInvalidError(f"tensor {name!r}: its numbers are not finite in {dtype}")


def _merge(
    recipe: Recipe, factors: Sequence[Factors], rank: int, module: str
) -> tuple[Tensor, Tensor]:
    """A [R, K] and B [N, R] of the result."""
    match recipe.method:
        case "linear":
            return concatenated(factors)
        case "svd":
            return nearest(*concatenated(factors), rank)
        case "lorax_linear" | "lorax_ties":
            weights_A = weights_B = [one.weight for one in factors]
        case _:
            products = [one.weight * one.scale for one in factors]
            weights_B = [math.sqrt(abs(product)) for product in products]
            weights_A = [math.copysign(w, p) for w, p in zip(weights_B, products, strict=True)]
    generator = dare_generator(recipe.seed, module)
    a_RK = _mixed(recipe, [one.a_RK for one in factors], weights_A, generator)
    b_NR = _mixed(recipe, [one.b_NR for one in factors], weights_B, generator)
    return a_RK, b_NR


def concatenated(factors: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """B A is the weighted sum of the deltas, whatever the ranks."""
    a_RK = torch.cat([one.a_RK * one.weight * one.scale for one in factors])
    return a_RK, torch.cat([one.b_NR for one in factors], dim=1)


def nearest(a_RK: Tensor, b_NR: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of that rank nearest to B A, without making B A: U S Vh of the product of the
    two triangles is all that its own has."""
    q_NR, upper_b = torch.linalg.qr(b_NR)
    q_KR, upper_a = torch.linalg.qr(a_RK.T)
    u, s, vh = torch.linalg.svd(upper_b @ upper_a.T, full_matrices=False)
    kept = min(rank, len(s))
    return vh[:kept] @ q_KR.T, q_NR @ (u[:, :kept] * s[:kept])


def dare_generator(seed: int, module: str) -> torch.Generator:
    """A module's draws depend on the seed and its name: first the masks of A, source by source,
    then those of B."""
    digest = hashlib.sha256(f"{seed}/{module}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# -- one of A and B -------------------------------------------------------------------------


def _mixed(
    recipe: Recipe, tensors: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator
) -> Tensor:
    if recipe.method in RANDOM:
        tensors = [_dropped(tensor, recipe.density, generator) for tensor in tensors]
    elif recipe.method in PRUNING:
        tensors = [_largest(tensor, recipe.density) for tensor in tensors]
    stacked = torch.stack(list(tensors))
    weighted = stacked * torch.tensor(weights).view(-1, 1, 1)
    if recipe.method not in ELECTING:
        return weighted.sum(dim=0)
    agrees = _agrees(stacked, recipe)
    return (weighted * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1.0)


def _largest(tensor: Tensor, density: float) -> Tensor:
    """Zeros for all but that share of the numbers with the largest magnitudes."""
    if density == 1:
        return tensor
    kept = torch.topk(tensor.abs().flatten(), int(density * tensor.numel())).indices
    mask = torch.zeros(tensor.numel()).index_fill_(0, kept, 1.0)
    return tensor * mask.view(tensor.shape)


def _dropped(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each number is kept with that probability, and grown so that the mean stays."""
    if density == 1:
        return tensor
    mask = torch.bernoulli(torch.full_like(tensor, density), generator=generator)
    return tensor * mask / density


def _agrees(stacked: Tensor, recipe: Recipe) -> Tensor:
    """Where a source's sign is that of most of them, by their sum or by their number."""
    signs = stacked.sign()
    votes = stacked if recipe.majority_sign_method == "total" else signs
    return signs == torch.where(votes.sum(dim=0) >= 0, 1, -1)
