"""What is told of an adapter: modules by the last part of their names, ranks, the file's size.

In: a manifest. Out: plain data for lists. It must not know tiers, files or the base.
"""

from dataclasses import dataclass

from lory_server.adapters.format import AdapterManifest, AdapterSlice
from lory_server.messages import Matched


@dataclass(frozen=True, slots=True)
class Facts:
    """Of one revision; kept as long as it is in memory."""

    matched: tuple[Matched, ...]
    file_bytes: int
    """Of the weights file."""

    @classmethod
    def of(cls, manifest: AdapterManifest) -> "Facts":
        return cls(matched_by(manifest), manifest.file_bytes)


def matched_by(manifest: AdapterManifest) -> tuple[Matched, ...]:
    """In the order of the first module of each name."""
    counts: dict[str, int] = {}
    ranks: dict[str, set[int]] = {}
    for part in manifest.slices:
        name = _last_part(part)
        counts[name] = counts.get(name, 0) + 1
        ranks.setdefault(name, set()).add(part.rank)
    return tuple(Matched(name, count, tuple(sorted(ranks[name]))) for name, count in counts.items())


def _last_part(part: AdapterSlice) -> str:
    """`q_proj` of `...self_attn.q_proj.lora_A.weight` or, of a bias alone, `...q_proj.bias`."""
    spec = part.a or part.bias
    assert spec is not None, "a slice has factors or a bias"
    module = spec.name.partition(".lora_")[0].removesuffix(".bias").removesuffix(".base_layer")
    return module.rpartition(".")[2]
