"""How one adapter is merged from others: plain data, and the name that carries it.

A merge is an adapter like any other, and its name says all of it: MERGED and the recipe, as no
caller's name begins. It must not know torch, files, or what the methods compute.
"""

from typing import Literal

import msgspec

MERGED = "+"
"""First in the names of adapters that are merged when they are loaded; a recipe follows."""

MergeMethod = Literal[
    "linear",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "svd",
    "lorax_linear",
    "lorax_ties",
]
SignMethod = Literal["total", "frequency"]

MAX_SOURCES = 32
PRUNING = frozenset({"ties", "dare_linear", "dare_ties", "magnitude_prune", "lorax_ties"})
"""Methods that keep `density` of the numbers."""
ELECTING = frozenset({"ties", "dare_ties", "lorax_ties"})
"""Methods that elect a sign for each number."""
RANDOM = frozenset({"dare_linear", "dare_ties"})


class MergeSource(msgspec.Struct, frozen=True, array_like=True):
    adapter_id: str
    weight: float
    revision: str = ""
    """Or its beginning; empty: the one on disk."""


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """What the method does not use has its default, so that equal merges are equal recipes."""

    sources: tuple[MergeSource, ...]
    method: MergeMethod = "linear"
    density: float = 1.0
    """The share of numbers that is kept, above 0."""
    majority_sign_method: SignMethod = "total"
    rank: int = 0
    """Of the result of `svd`; 0: the largest of the sources'."""
    seed: int = 0
    name: str = ""
    """What the merge is called, if it was saved."""


def merged_id(recipe: Recipe) -> str:
    """The engine's name for it."""
    return MERGED + msgspec.json.encode(recipe).decode()


def read_recipe(adapter_id: str) -> Recipe:
    """What `merged_id` turns back."""
    return msgspec.json.decode(adapter_id.removeprefix(MERGED), type=Recipe)


def called(adapter_id: str) -> str:
    """An adapter's name as a person would tell it; one that only begins as a merge's, as it is."""
    if not adapter_id.startswith(MERGED):
        return adapter_id
    try:
        recipe = read_recipe(adapter_id)
    except msgspec.MsgspecError:
        return adapter_id
    sources = ", ".join(source.adapter_id for source in recipe.sources)
    return recipe.name or f"{recipe.method} of {sources}"
