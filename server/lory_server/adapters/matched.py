"""What is told of an adapter: modules by the last part of their names, ranks, the file's size.

In: a manifest, and the sites it was checked against. Out: plain data for lists. It must not know
tiers or files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lory_server.adapters.manifest import AdapterManifest
from lory_server.messages import Matched
from lory_server.model.sites import Site


@dataclass(frozen=True, slots=True)
class Facts:
    """Of one revision; kept as long as it is in memory."""

    matched: tuple[Matched, ...]
    file_bytes: int
    """Of the weights file."""
    invocation_tokens: tuple[int, ...] = ()


def facts_of(manifest: AdapterManifest, sites: Sequence[Site]) -> Facts:
    """Modules in the order of the first of each name."""
    counts: dict[str, int] = {}
    ranks: dict[str, set[int]] = {}
    for part in manifest.slices:
        name = sites[part.site].slices[part.slice].module.rpartition(".")[2]
        counts[name] = counts.get(name, 0) + 1
        ranks.setdefault(name, set()).add(part.rank)
    for module in dict.fromkeys(weight.module for weight in manifest.full):
        name = module.rpartition(".")[2]
        counts[name] = counts.get(name, 0) + 1
        ranks.setdefault(name, set())
    matched = (Matched(name, count, tuple(sorted(ranks[name]))) for name, count in counts.items())
    return Facts(tuple(matched), manifest.file_bytes, manifest.invocation_tokens)
