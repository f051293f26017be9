"""From a caller's wish for a merge to a recipe: LoRAX's `merged_adapters`, and saved merges.

In: typed fields. Out: a recipe, or a refusal that names the field. It must not know HTTP, the
engine, or what adapters there are.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar, get_args

from lory_router import validate
from lory_router.engine import SequenceRequest
from lory_router.errors import Invalid, shown
from lory_router.schemas_adapters import MergeBody
from lory_router.schemas_lorax import MergedAdapters
from lory_router.settings import RouterSettings
from lory_router.sources.reference import Reference
from lory_router.validate import Named
from lory_server.messages import Manner, Sampling
from lory_server.recipes import (
    ELECTING,
    MAX_SOURCES,
    PRUNING,
    RANDOM,
    MergeMethod,
    MergeSource,
    Recipe,
    SignMethod,
)

MAX_WEIGHT = 1000.0
MAX_RANK = 256
METHODS: Mapping[str, MergeMethod] = {
    **{name: name for name in get_args(MergeMethod)},
    "cat": "linear",
}
"""By what callers call them; PEFT's `cat` is the exact sum, which is our `linear`."""
SIGN_METHODS: Mapping[str, SignMethod] = {name: name for name in get_args(SignMethod)}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class MergeNamed:
    """A merge that a caller asked for in a request."""

    recipe: Recipe
    references: tuple[Reference | None, ...]
    """Where each source comes from; None: the local folder."""
    token: str
    """The caller's, for those places."""

    @property
    def adapter_id(self) -> str:
        """As headers tell it."""
        return ",".join(source.adapter_id for source in self.recipe.sources)

    @property
    def source_kind(self) -> str:
        first = self.references[0]
        return first.kind if first else "local"


@dataclass(frozen=True, slots=True)
class Fields:
    """What callers may say of a method, under the names that they know."""

    method_name: str
    method: str | None
    density: float | None
    majority_sign_method: str | None
    rank: int | None
    seed: int | None
    inside: str = ""
    """Before each name."""

    def invalid(self, name: str, reason: str) -> Invalid:
        return Invalid(f"`{self.inside}{name}` {reason}", param=self.inside + name)


def check_merged(
    wish: MergedAdapters,
    adapter_id: str | None,
    source: str | None,
    token: str | None,
    settings: RouterSettings,
) -> MergeNamed:
    """LoRAX's field; `adapter_source` and `api_token` are of all its adapters."""
    if adapter_id not in (None, "", validate.BASE_MODEL):
        raise Invalid(
            "at most one adapter and `merged_adapters` may be given", param="merged_adapters"
        )
    fields = Fields(
        "merge_strategy",
        wish.merge_strategy,
        wish.density,
        wish.majority_sign_method,
        wish.rank,
        wish.seed,
        inside="merged_adapters.",
    )
    _check_number(fields, "ids", len(wish.ids))
    if len(wish.weights) != len(wish.ids):
        raise fields.invalid("weights", f"must be as many as `ids`, {len(wish.ids)}")
    named = [
        _check_source(fields, f"ids[{index}]", name, source, token, settings)
        for index, name in enumerate(wish.ids)
    ]
    sources = tuple(
        MergeSource(one.adapter_id, _weight(fields, f"weights[{index}]", weight))
        for index, (one, weight) in enumerate(zip(named, wish.weights, strict=True))
    )
    recipe = _recipe(fields, sources)
    return MergeNamed(recipe, tuple(one.source for one in named), token or "")


def asked_of(
    named: Named | MergeNamed, prompt_ids: tuple[int, ...], sampling: Sampling, manner: Manner
) -> SequenceRequest:
    """A sequence of what was named, made in its manner."""
    if isinstance(named, MergeNamed):
        return SequenceRequest(
            prompt_ids,
            sampling,
            recipe=named.recipe,
            references=named.references,
            token=named.token,
            manner=manner.digest,
        )
    return SequenceRequest(
        prompt_ids,
        sampling,
        named.adapter_id,
        source=named.source,
        token=named.token,
        manner=manner.digest,
    )


def check_saved(wish: MergeBody, settings: RouterSettings) -> Recipe:
    """Of POST /v1/adapters/merge; its sources are named as callers name them."""
    fields = Fields(
        "method", wish.method, wish.density, wish.majority_sign_method, wish.rank, wish.seed
    )
    _check_number(fields, "adapters", len(wish.adapters))
    sources: list[MergeSource] = []
    for index, one in enumerate(wish.adapters):
        place = f"adapters[{index}]"
        named = _check_source(fields, f"{place}.adapter_id", one.adapter_id, None, None, settings)
        if named.source is not None:
            raise fields.invalid(
                f"{place}.adapter_id", "comes from a source; a saved merge takes local adapters"
            )
        weight = _weight(fields, f"{place}.weight", one.weight)
        sources.append(MergeSource(named.adapter_id, weight))
    recipe = _recipe(fields, tuple(sources), name=wish.name)
    _check_used(fields, recipe.method)
    return recipe


def _check_number(fields: Fields, name: str, number: int) -> None:
    if not 1 <= number <= MAX_SOURCES:
        raise fields.invalid(name, f"must name 1 to {MAX_SOURCES} adapters. Given: {number}")


def _check_source(
    fields: Fields,
    place: str,
    name: str,
    source: str | None,
    token: str | None,
    settings: RouterSettings,
) -> Named:
    if name in ("", validate.BASE_MODEL, *settings.model_names):
        raise fields.invalid(place, "names no adapter, but the base")
    return validate.check_adapter(name, source, token, settings)


def _weight(fields: Fields, place: str, weight: float) -> float:
    if not (math.isfinite(weight) and abs(weight) <= MAX_WEIGHT):
        raise fields.invalid(place, f"must be between -{MAX_WEIGHT:g} and {MAX_WEIGHT:g}")
    return weight


def _recipe(fields: Fields, sources: tuple[MergeSource, ...], name: str = "") -> Recipe:
    """What the method does not use is left at its default."""
    method = _one_of(fields, fields.method_name, fields.method or "linear", METHODS)
    sign = _one_of(
        fields, "majority_sign_method", fields.majority_sign_method or "total", SIGN_METHODS
    )
    density = _density(fields, method)
    if fields.rank is not None and method != "svd":
        raise fields.invalid("rank", "is for the method svd")
    if fields.rank is not None and not 1 <= fields.rank <= MAX_RANK:
        raise fields.invalid("rank", f"must be between 1 and {MAX_RANK}")
    if fields.seed is not None and method not in RANDOM:
        raise fields.invalid("seed", "is for the methods dare_linear and dare_ties")
    if fields.seed is not None and not 0 <= fields.seed <= validate.MAX_SEED:
        raise fields.invalid("seed", "must be between 0 and 2**64 - 1")
    return Recipe(
        sources=sources,
        method=method,
        density=density if method in PRUNING else 1.0,
        majority_sign_method=sign if method in ELECTING else "total",
        rank=fields.rank or 0,
        seed=fields.seed or 0,
        name=name,
    )


def _one_of(fields: Fields, name: str, given: str, known: Mapping[str, T]) -> T:
    if given not in known:
        raise fields.invalid(name, f"is {shown(given)}; known are {', '.join(known)}")
    return known[given]


def _density(fields: Fields, method: MergeMethod) -> float:
    """LoRAX's client always sends one; nothing would be left of an adapter at 0."""
    if fields.density is None:
        if method in PRUNING:
            raise fields.invalid("density", f"is required for {method}, above 0 and at most 1")
        return 1.0
    if not (0 <= fields.density <= 1 and (fields.density > 0 or method not in PRUNING)):
        raise fields.invalid("density", "must be > 0 and <= 1")
    return fields.density


def _check_used(fields: Fields, method: MergeMethod) -> None:
    """Nothing is accepted and ignored where no other server's callers send it."""
    for name, users in (("density", PRUNING), ("majority_sign_method", ELECTING)):
        if getattr(fields, name) is not None and method not in users:
            raise fields.invalid(name, f"is for the methods {', '.join(sorted(users))}")
