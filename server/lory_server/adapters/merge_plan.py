"""Do these adapters go together? A merge's manifest, made from those of its sources.

In: a recipe and manifests. Out: which slices of which sources make each slice of the result, and
the rank it has; or AdapterInvalidError with the way out. A source that has more than factors A and
B is refused by name, for leaving out the rest would be another adapter. It must not know torch,
files or numbers.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from lory_server.adapters.errors import AdapterInvalidError, blaming
from lory_server.adapters.format import MAX_RANK, AdapterManifest, AdapterSlice, TensorSpec
from lory_server.adapters.tokenizer_files import TOKENIZER_NAME
from lory_server.recipes import Recipe

MAX_SVD_RANKS = 1024
"""Of all sources together: the work grows with its cube."""

_WHAT_ELSE = {
    "gain": "is DoRA, whose gain is no sum",
    "bias": "has a bias",
    "lookup": "changes the embedding",
    "full": "has a whole embedding, head, norm or token rows of its own",
}
_FACTOR = ".lora_A."


@dataclass(frozen=True, slots=True)
class Part:
    """What one source has for a slice."""

    source: int
    slice: AdapterSlice


@dataclass(frozen=True, slots=True)
class MergePlan:
    recipe: Recipe
    sources: tuple[AdapterManifest, ...]
    manifest: AdapterManifest
    """Of the result."""
    parts: tuple[tuple[Part, ...], ...]
    """For each slice of the result, in order; sources that do not have it are left out."""
    manners: tuple[str, ...]
    """Digest of each source's; empty: it has none."""


def plan_merge(
    recipe: Recipe, sources: Sequence[AdapterManifest], manners: Sequence[str] = ()
) -> MergePlan:
    """Without `manners` no source has any."""
    for index, manifest in enumerate(sources):
        try:
            _check_is_factors(manifest)
        except AdapterInvalidError as error:
            raise blaming(error, recipe, index) from error
    _check_one_tokenizer(recipe, sources)
    parts = _by_slice(sources)
    largest = recipe.rank or max(manifest.max_rank for manifest in sources)
    slices = tuple(_merged(recipe, group, largest, sources[0]) for group in parts)
    manifest = AdapterManifest(
        slices,
        sources[0].base_model_name,
        sum(manifest.file_bytes for manifest in sources),
        hashlib.sha256(msgspec.json.encode(recipe) + b"".join(m.digest for m in sources)).digest(),
        tokenizer=sources[0].tokenizer,
    )
    told = tuple(manners) or ("",) * len(sources)
    return MergePlan(recipe, tuple(sources), manifest, parts, told)


def module_of(part: AdapterSlice) -> str:
    """As PEFT's files name it, without what stands before every module."""
    assert part.a is not None
    return part.a.name.rpartition(_FACTOR)[0].removeprefix("base_model.model.")


def _check_is_factors(manifest: AdapterManifest) -> None:
    if manifest.invocation_tokens:
        raise AdapterInvalidError(
            "the adapter is an activated LoRA, which acts from its invocation on; only adapters"
            " that act everywhere are merged"
        )
    for part in manifest.slices:
        if part.magnitude is not None:
            raise _cannot(part.magnitude, _WHAT_ELSE["gain"])
        for spec in (part.b_bias, part.bias):
            if spec is not None:
                raise _cannot(spec, _WHAT_ELSE["bias"])
        if part.is_lookup and part.a is not None:
            raise _cannot(part.a, _WHAT_ELSE["lookup"])
    for weight in manifest.full:
        raise _cannot(weight.spec, _WHAT_ELSE["full"])


def _check_one_tokenizer(recipe: Recipe, sources: Sequence[AdapterManifest]) -> None:
    """The merge is asked by it, too."""
    first = sources[0].tokenizer
    for index, manifest in enumerate(sources):
        if manifest.tokenizer != first:
            error = AdapterInvalidError(
                f"the adapter is asked by {_whose(manifest)}, source 1 by"
                f" {'another' if first and manifest.tokenizer else _whose(sources[0])}; adapters"
                f" are merged that have one tokenizer: take {TOKENIZER_NAME} out of the folders of"
                " those that the base's will do for"
            )
            raise blaming(error, recipe, index)


def _whose(manifest: AdapterManifest) -> str:
    return "a tokenizer of its own" if manifest.tokenizer else "the base's tokenizer"


def _cannot(spec: TensorSpec, reason: str) -> AdapterInvalidError:
    return AdapterInvalidError(
        f"tensor {spec.name[:200]!r}: the adapter {reason}; only adapters that are LoRA factors"
        " alone are merged"
    )


def _by_slice(sources: Sequence[AdapterManifest]) -> tuple[tuple[Part, ...], ...]:
    found: dict[tuple[int, int], list[Part]] = {}
    for index, manifest in enumerate(sources):
        for part in manifest.slices:
            found.setdefault((part.site, part.slice), []).append(Part(index, part))
    return tuple(tuple(found[key]) for key in sorted(found))


def _merged(
    recipe: Recipe, group: Sequence[Part], largest: int, first: AdapterManifest
) -> AdapterSlice:
    part = group[0].slice
    assert part.a is not None
    assert part.b is not None
    out_features, in_features = part.b.shape[0], part.a.shape[1]
    ranks = [one.slice.rank for one in group]
    match recipe.method:
        case "linear":
            rank = _sum_of_ranks(ranks, part)
        case "svd":
            rank = min(largest, _svd_ranks(ranks, part), out_features, in_features)
        case _:
            rank = _equal_rank(recipe.method, ranks, part)
    return AdapterSlice(
        part.site,
        part.slice,
        rank,
        _lorax_scale(group, first) if recipe.method.startswith("lorax") else 1.0,
        _factor(part.a, (rank, in_features)),
        _factor(part.b, (out_features, rank)),
        has_base_bias=part.has_base_bias,
        is_head=part.is_head,
    )


def _sum_of_ranks(ranks: Sequence[int], part: AdapterSlice) -> int:
    if sum(ranks) > MAX_RANK:
        raise AdapterInvalidError(
            f"{module_of(part)}: the sources' ranks add up to {sum(ranks)}, and an adapter's is at"
            f" most {MAX_RANK}; merge fewer, or by svd with a rank"
        )
    return sum(ranks)


def _svd_ranks(ranks: Sequence[int], part: AdapterSlice) -> int:
    if sum(ranks) > MAX_SVD_RANKS:
        raise AdapterInvalidError(
            f"{module_of(part)}: the sources' ranks add up to {sum(ranks)}, and svd takes at most"
            f" {MAX_SVD_RANKS}; merge fewer"
        )
    return sum(ranks)


def _equal_rank(method: str, ranks: Sequence[int], part: AdapterSlice) -> int:
    if len(set(ranks)) > 1:
        told = ", ".join(map(str, ranks))
        raise AdapterInvalidError(
            f"{module_of(part)}: the sources' ranks are {told}, and {method} needs equal ones; use"
            " linear, or svd with a rank"
        )
    return ranks[0]


def _lorax_scale(group: Sequence[Part], first: AdapterManifest) -> float:
    """LoRAX scales the merge as the first adapter, whatever the others' alphas."""
    return group[0].slice.scale if group[0].source == 0 else first.slices[0].scale


def _factor(like: TensorSpec, shape: tuple[int, int]) -> TensorSpec:
    return TensorSpec(like.name, "F32", shape, 0, shape[0] * shape[1] * 4)
